"""The most notable layers of a diagnosis: what is unusual about them, what it means, and what to do."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

from lora_kernels.landscape.page import Finding
from lora_kernels.landscape.report import Diagnosis, LayerDiagnosis
from lora_kernels.landscape.verdict import LOUD_FAILURE, RANK_LIMITED, STILL_TRAINING

# Times the median from which on an update is an outlier.
_OUTLIER = 5.0
# Share of the rank up to which most of it counts as idle.
_IDLE = 0.25
# Ratio of the factors' norms from which on they count as unbalanced.
_UNBALANCED = 10.0

# What can be notable, the most serious first: meaning and advice.
_TEXTS = {
    "not finite": (
        "the layer puts out NaN: training has diverged",
        "go back to an earlier checkpoint; lower the learning rate, or clip gradients",
    ),
    "loud failure": (
        "the update uses the whole rank and is large beside the weight: the base model is overwritten",
        "train again with a learning rate 3 to 10 times smaller, or a smaller lora_alpha",
    ),
    "zero update": (
        "s B A is zero: the adapter changes nothing here",
        "check that the layer is used and that the optimizer has its factors, or take it out of target_modules",
    ),
    "rank-limited": (
        "stationary at full rank: with this weight decay a larger rank would reach a lower loss",
        "raise r for these layers (rank_pattern)",
    ),
    "intruder dimensions": (
        "new directions as large as the leading ones of the weight, which can make a model forget",
        "test the model on other tasks; lower the learning rate or lora_alpha if it forgets",
    ),
    "outlier": (
        f"more than {_OUTLIER:g} times the median update of this model",
        "if the model forgets, scale these layers down (alpha_pattern)",
    ),
    "still training": (
        "gradient and weight decay are not in balance, which they are at a stationary point (0)",
        "train longer, or decay the learning rate to zero, and inspect again",
    ),
    "idle rank": (
        "the other singular values are negligible",
        "a smaller r would do here (rank_pattern)",
    ),
    "unbalanced factors": (
        f"A and B differ in size more than {_UNBALANCED:g}-fold; weight decay makes them equal in the end",
        "nothing if training was short; otherwise train longer, or with weight decay",
    ),
    "largest updates": ("within the usual range of this model", "nothing"),
}


def size(layer: LayerDiagnosis) -> float:
    """`|s B A|_2 / |W|_2`, or `|s B A|_2` where the weight was not read."""
    share = layer.spectrum.spectral_share
    return layer.spectrum.spectral if share is None else share


def usable_rank(layer: LayerDiagnosis) -> int:
    """The largest rank that the update can have."""
    return min(layer.spectrum.rank, *layer.spectrum.shape)


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """What is notable in a diagnosis, the most serious first; a layer can be in several findings."""
    sizes = [size(layer) for layer in diagnosis if layer.spectrum.status == "ok"]
    median = statistics.median(sizes) if sizes else 0.0
    layers: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for layer in diagnosis:
        for title, score, number in _remarks(layer, median):
            layers[title].append((score, layer.name, number))
    return [
        Finding(
            title=title,
            meaning=meaning,
            advice=advice,
            layers=tuple(entry[1:] for entry in sorted(layers[title], key=lambda entry: -entry[0])),
        )
        for title, (meaning, advice) in _TEXTS.items()
        if layers[title]
    ]


def _remarks(layer: LayerDiagnosis, median: float) -> Iterator[tuple[str, float, str]]:
    """Yield the findings that a layer is in: title, how notable it is there, and its number in words."""
    spectrum, certificate, kind = layer.spectrum, layer.certificate, layer.verdict.kind
    if spectrum.status == "not_finite":
        yield "not finite", 1.0, "NaN or inf"
        return
    if spectrum.status == "zero":
        yield "zero update", 1.0, "0"
        return
    length = f"{size(layer):.3g}" + ("" if spectrum.spectral_share is None else " of |W|")
    if kind == LOUD_FAILURE:
        yield "loud failure", size(layer), length
    elif median > 0 and size(layer) > _OUTLIER * median:
        yield "outlier", size(layer), f"{length}, median {median:.3g}"
    else:
        yield "largest updates", size(layer), length
    if certificate is not None and kind == RANK_LIMITED:
        yield "rank-limited", certificate.ratio, f"s|G|/λ = {certificate.ratio:.3g}"
    if certificate is not None and kind == STILL_TRAINING:
        yield "still training", certificate.stationarity, f"stationarity {certificate.stationarity:.3g}"
    if layer.overlap is not None and layer.overlap.intruders:
        yield "intruder dimensions", layer.overlap.intruders, f"{layer.overlap.intruders} intruders"
    used, usable = spectrum.numerical_rank, usable_rank(layer)
    if used <= _IDLE * usable:
        yield "idle rank", usable / used, f"rank {used} of {usable}"
    small, large = sorted((spectrum.norm_a, spectrum.norm_b))
    if large > _UNBALANCED * small:
        yield "unbalanced factors", large / small, f"|A| {spectrum.norm_a:.2g}, |B| {spectrum.norm_b:.2g}"
