"""The page of a diagnosis: grids, the most notable layers, and the history that a monitor wrote."""

from __future__ import annotations

import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_kernels.landscape.page import Curve, Finding, Grid, Page
from lora_kernels.landscape.report import Diagnosis, LayerDiagnosis, number
from lora_kernels.landscape.verdict import (
    LOUD_FAILURE,
    LOW_RANK_MINIMUM,
    NOT_JUDGED,
    RANK_LIMITED,
    STILL_TRAINING,
    WORST_FIRST,
)
from lora_kernels.reports import printable

_COLOURS = {LOUD_FAILURE: "#b3261e", LOW_RANK_MINIMUM: "#1b7f3b", STILL_TRAINING: "#c98a00", NOT_JUDGED: "#8a8a8a"}
_OTHER = "#6a4fb3"
_SENTENCES = {
    LOUD_FAILURE: "Loud failure: training went wrong in the layers named below.",
    STILL_TRAINING: "Still training: the adapter is not at a stationary point yet.",
    NOT_JUDGED: "Not judged: no layer fails loudly; the data for more than that were not given.",
    LOW_RANK_MINIMUM: "Low-rank minimum: training ended well in every layer.",
}
_RANK_LIMITED = "Rank-limited: stationary, and a larger rank would go lower."
_HUE_RANK, _HUE_SIZE, _HUE_BALANCE = 215, 20, 275
_CURVES = {
    "nuclear": "nuclear norm of s B A, all layers",
    "share": "largest |sBA| / |W|",
    "rank": "mean used rank",
    "balance": "largest imbalance",
}
# Times the median from which on an update is an outlier; the share of the rank up to which most of it counts as idle;
# the ratio of the factors' norms from which on they count as unbalanced (the template names the first and the last).
_OUTLIER, _IDLE, _UNBALANCED = 5.0, 0.25, 10.0
# What can be notable, the most serious first; the template says what it means and what to do.
_FINDINGS = (
    "not finite", "loud failure", "zero update", "rank-limited", "intruder dimensions", "outlier", "still training",
    "idle rank", "unbalanced factors", "largest updates",
)  # fmt: skip


def diagnosis_page(diagnosis: Diagnosis, log: Sequence[Mapping[str, Any]] = ()) -> Page:
    """The page of a diagnosis, with the lines of a monitor's log if there are any."""
    kind = diagnosis.verdict.kind
    certified = any(layer.certificate is not None for layer in diagnosis)
    return Page(
        title=f"Loss landscape of {printable(diagnosis.adapter)}",
        headline=_SENTENCES.get(kind, _RANK_LIMITED),
        colour=_COLOURS.get(kind, _OTHER),
        facts=_facts(diagnosis),
        grids=_grids(diagnosis),
        hint=None if certified else _hint(diagnosis),
        findings=findings(diagnosis),
        history=_history(log) if log else None,
        notes=[printable(note) for note in diagnosis.all_notes()],
    )


def _facts(diagnosis: Diagnosis) -> list[str]:
    facts = [reason.replace("_", " ") for reason in diagnosis.verdict.reasons]
    layers = [layer for layer in diagnosis if layer.spectrum.status != "not_finite"]
    if diagnosis.batches:
        facts.append(f"{diagnosis.tokens:,.0f} tokens in {diagnosis.batches} batches")
    if layers:
        full = sum(0 < layer.spectrum.usable_rank <= layer.spectrum.numerical_rank for layer in layers)
        sizes = [size(layer) for layer in layers]
        of = " / |W|" if layers[0].spectrum.spectral_share is not None else ""
        facts.append(f"whole rank in use in {full} of {len(layers)}")
        facts.append(f"|sBA|{of}: median {statistics.median(sizes):.3g}, largest {max(sizes):.3g}")
    return facts


def _hint(diagnosis: Diagnosis) -> tuple[str, str]:
    """What to add for the layers to be judged, and the command that does it."""
    missing = {
        "--base (the model's folder)": all(layer.spectrum.spectral_share is None for layer in diagnosis),
        "--data (training text: .csv or .jsonl)": not diagnosis.batches,
        "--weight-decay (that of training, above 0)": not diagnosis.weight_decay,
    }
    needed = " and ".join(name for name, is_missing in missing.items() if is_missing)
    advice = f"Add {needed}." if needed else "No layer could be certified: see the notes below."
    options = "--base MODEL --data train.jsonl --weight-decay 0.01 --out PAGES"
    command = printable(f"lora-kernels inspect {shlex.quote(diagnosis.adapter)} {options}")
    return f"Whether a point is a minimum follows from the loss gradient and the weight decay. {advice}", command


def _grids(diagnosis: Diagnosis) -> list[Grid]:
    """The used rank, the size and the balance of every layer, and the verdicts if there are any."""
    finite = {layer.name: layer.spectrum for layer in diagnosis if layer.spectrum.status != "not_finite"}
    used = {name: spectrum.numerical_rank for name, spectrum in finite.items()}
    usable = {name: spectrum.usable_rank for name, spectrum in finite.items()}
    leading = {name: ", ".join(f"{value:.2g}" for value in spectrum.values[:8]) for name, spectrum in finite.items()}
    shares = {name: used[name] / usable[name] if usable[name] else None for name in finite}
    compared = any(layer.spectrum.spectral_share is not None for layer in diagnosis)
    kinds = list(reversed(WORST_FIRST))
    grids = [
        Grid(
            title="Used rank",
            meaning=f"singular values above {diagnosis.thresholds.rank_tolerance:g} of the largest; colour: share of r",
            values={layer.name: shares.get(layer.name, math.nan) for layer in diagnosis},
            texts={name: str(rank) for name, rank in used.items()},
            tips={name: f"rank {used[name]} of {usable[name]}; {leading[name]}" for name in finite},
            hue=_HUE_RANK,
        ),
        Grid(
            title="Size of the update" + (", |sBA| / |W|" if compared else ", |sBA|"),
            meaning="spectral norm"
            + (", relative to the base weight's" if compared else "; with --base: relative to |W|"),
            values={layer.name: size(layer) for layer in diagnosis},
            hue=_HUE_SIZE,
            log=True,
        ),
        Grid(
            title="Imbalance of A and B",
            meaning="|AAᵀ − BᵀB| / (|A|² + |B|²): 0 at every stationary point under weight decay",
            values={layer.name: layer.spectrum.balance for layer in diagnosis},
            hue=_HUE_BALANCE,
        ),
        Grid(
            title="Verdict",
            meaning="minimum: optimality conditions met; loud failure: full rank and large",
            values={layer.name: kinds.index(layer.verdict.kind) for layer in diagnosis},
            tips={layer.name: "; ".join((*layer.verdict.reasons, *layer.notes)) for layer in diagnosis},
            palette=tuple((kind.replace("_", " "), _COLOURS.get(kind, _OTHER)) for kind in kinds),
        ),
    ]
    judged = any(layer.verdict.kind != NOT_JUDGED for layer in diagnosis)
    return grids if judged else grids[:-1]


def _history(log: Sequence[Mapping[str, Any]]) -> tuple[str, list[Curve], list[Grid]]:
    """Curves over training, the used rank at the last measurement, and the growth since the first."""
    first, last = log[0], log[-1]
    curves = [
        Curve(title=title, points=tuple((line["step"], _value(line, key, math.nan)) for line in log))
        for key, title in _CURVES.items()
        if any(line.get(key) is not None for line in log)
    ]
    ranks = {name: _value(layer, "numerical_rank") for name, layer in last["layers"].items()}
    lengths = {name: _value(layer, "spectral", math.nan) for name, layer in last["layers"].items()}
    before = {name: _value(first["layers"].get(name), "spectral") for name in lengths}
    growth = {name: lengths[name] / start if (start := before[name]) else None for name in lengths}
    grids = [
        Grid(
            title=f"Used rank at step {last['step']}",
            meaning="singular values of s B A above the tolerance",
            values=ranks,
            texts={name: number(rank) for name, rank in ranks.items()},
            high=max((rank for rank in ranks.values() if rank is not None), default=1.0) or 1.0,
            hue=_HUE_RANK,
        ),
        Grid(
            title=f"Growth of |sBA| since step {first['step']}",
            meaning="spectral norm at the last measurement over that at the first",
            values=growth,
            hue=_HUE_SIZE,
            log=True,
        ),
    ]
    return f"While it trained: {len(log)} measurements, steps {first['step']} to {last['step']}", curves, grids


def _value(entry: Any, key: str, default: float | None = None) -> Any:
    """A number of a line that a monitor wrote."""
    value = entry.get(key) if isinstance(entry, Mapping) else None
    return value if isinstance(value, (int, float)) and abs(value) < 2**63 else default


def size(layer: LayerDiagnosis) -> float:
    """`|s B A|_2 / |W|_2`, or `|s B A|_2` where the weight was not read."""
    share = layer.spectrum.spectral_share
    return layer.spectrum.spectral if share is None else share


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """What is notable in a diagnosis, the most serious first; a layer can be in several findings."""
    sizes = [size(layer) for layer in diagnosis if layer.spectrum.status == "ok"]
    median = statistics.median(sizes) if sizes else 0.0
    layers: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for layer in diagnosis:
        for title, score, text in _remarks(layer, median):
            layers[title].append((score, layer.name, text))
    return [
        Finding(title=title, layers=tuple(entry[1:] for entry in sorted(layers[title], key=lambda entry: -entry[0])))
        for title in _FINDINGS
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
    used, usable = spectrum.numerical_rank, spectrum.usable_rank
    if used <= _IDLE * usable:
        yield "idle rank", usable / used, f"rank {used} of {usable}"
    small, large = sorted((spectrum.norm_a, spectrum.norm_b))
    if large > _UNBALANCED * small:
        yield "unbalanced factors", large / small, f"|A| {spectrum.norm_a:.2g}, |B| {spectrum.norm_b:.2g}"
