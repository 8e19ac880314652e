"""How near a step of LoRA comes to the gradient of the full weight: LoRA-Pro's claim.

Per step and layer, G is the gradient of the loss with respect to W, and `E = s B dA + s dB A` what the optimizer makes
of it: with the gradients themselves under plain LoRA, with the adjusted ones under LoRA-Pro, before Adam. Where B and A
point bounds |G - E| from below, whatever dA and dB are (`closest`); a random start has a bound of its own (`chance`).
`taken` is the distance of the step after Adam, scaled to be as near to G as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.claims.small import TEXTS, TOKENS, model_and_batches
from benchmarks.demo.side import Recipe, prepare
from benchmarks.demo.texts import Batch
from benchmarks.records import CONSOLE
from lora_kernels.adapters.view import lora_layers
from lora_kernels.training.lora_pro.adjustment import Adjustment
from lora_kernels.training.lora_pro.buckets import Bucket, Layout, Scratch

RANK, STEPS = 8, 5
# By arm, its optimizer and about the best of the rates that `rates_gsm8k.json` has swept.
ARMS = {
    "LoRA": ("adamw", 1e-3),
    "LoRA-Pro, efficient": ("lora_pro_efficient", 1e-3),
    "LoRA-Pro, full": ("lora_pro", 1e-4),
}
BLOCKS = (0, 9, 19, 29)  # the decoder layers of SmolLM2 whose linear layers are measured
# Singular values of a factor below this share of the largest are zero.
_ZERO = 1e-6
MEASURES = ("distance", "scaled", "closest", "taken")


def bound(gradient: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """The least `|G - E| / |G|` of all `E = B X + Y A`: what G has outside of B's columns and A's rows."""
    rest = gradient
    for factor, left in ((b, True), (a.mT, False)):
        u, s, _ = torch.linalg.svd(factor, full_matrices=False)
        u = u[:, s > _ZERO * s.max()] if bool(s.max() > 0) else u[:, :0]
        rest = rest - (u @ (u.mT @ rest) if left else (rest @ u) @ u.mT)
    return float(rest.norm() / gradient.norm())


@torch.no_grad()
def adjusted(a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA-Pro's gradients of a pair that has its own in `.grad`."""
    bucket = Bucket([0], [scaling], [(a, b)], Layout()).fill(Scratch(), 0)
    Adjustment([bucket], torch.tensor([scaling], dtype=torch.float64), 1e-8)(cross=True)
    return next(bucket.adjusted())


def moved(a: torch.Tensor, b: torch.Tensor, da: torch.Tensor, db: torch.Tensor, scaling: float) -> torch.Tensor:
    """`s B dA + s dB A`."""
    return scaling * (b @ da + db @ a)


def sine(gradient: torch.Tensor, step: torch.Tensor) -> float:
    """`min_c |G - c step| / |G|`; 1 for a step of zero."""
    sizes = float(gradient.norm() * step.norm())
    cosine = float((gradient * step).sum()) / sizes if sizes > 0 else 0.0
    return math.sqrt(max(0.0, 1.0 - cosine**2))


def _run(
    arm: str, base: Any, batches: Sequence[Batch], blocks: Sequence[int]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Per measure its mean over layers at every step, and the baselines of the first one."""
    kind, rate = ARMS[arm]
    # Before the weights get gradients, so that the optimizer does not know them.
    side = prepare(arm, Recipe(optimizer=kind), base, rate, batches, steps=1, rank=RANK)
    places = tuple(f".layers.{block}." for block in blocks)
    layers = {name: layer for name, layer in lora_layers(side.model) if any(place in name for place in places)}
    weights = [layer.get_base_layer().weight for layer in layers.values()]
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    baselines: dict[str, list[float]] = {"chance": [], "sign": []}
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for number, batch in enumerate(batches):
            side.model(**batch).loss.backward()
            before, sums = {}, dict.fromkeys(MEASURES, 0.0)
            for name, layer in layers.items():
                a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
                gradient = layer.get_base_layer().weight.grad
                before[name] = a.detach().clone(), b.detach().clone()
                da, db = (a.grad, b.grad) if kind == "adamw" else adjusted(a, b, s)
                equivalent = moved(*before[name], da, db, s)
                sums["distance"] += float((gradient - equivalent).norm() / gradient.norm())
                sums["scaled"] += sine(gradient, equivalent)
                sums["closest"] += bound(gradient, *before[name])
                if number == 0:
                    m, n = gradient.shape
                    baselines["chance"].append(math.sqrt((1 - RANK / m) * (1 - RANK / n)))
                    baselines["sign"].append(sine(gradient, gradient.sign()))
            side.optimizer.step()
            for name, layer in layers.items():
                a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
                a0, b0 = before[name]
                step = moved(a0, b0, a.detach() - a0, b.detach() - b0, s)
                sums["taken"] += sine(layer.get_base_layer().weight.grad, step)
            for measure, total in sums.items():
                values[measure].append(total / len(layers))
            CONSOLE.print(
                f"{arm}, step {number + 1}: " + ", ".join(f"{key} {one[-1]:.4f}" for key, one in values.items())
            )
            side.model.zero_grad()
    finally:
        for weight in weights:
            weight.requires_grad_(False).grad = None
    return values, {name: sum(numbers) / len(numbers) for name, numbers in baselines.items()}


def measure(quick: bool = False) -> dict[str, Any]:
    """Train every arm for a few steps, and measure at each.

    Args:
        quick: two steps of a small model.

    Returns:
        The entry.
    """
    steps, blocks = (2, (0, 1)) if quick else (STEPS, BLOCKS)
    name, base, (batches,) = model_and_batches(quick, steps, [0])
    arms: dict[str, Any] = {}
    baselines: dict[str, float] = {}
    for arm, (optimizer, rate) in ARMS.items():
        values, baselines = _run(arm, base, batches, blocks)
        arms[arm] = {"optimizer": optimizer, "learning_rate": rate, **values}
    return {
        "model": name,
        "rank": RANK,
        "steps": steps,
        "texts": TEXTS,
        "max_tokens": TOKENS,
        "blocks": list(blocks),
        "baselines": baselines,
        "arms": arms,
    }


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Means over the steps."""
    lines = [
        f"{arm}: |G - E| / |G| {sum(one['distance']) / entry['steps']:.3f}, the least that its factors allow "
        f"{sum(one['closest']) / entry['steps']:.3f}, after Adam {sum(one['taken']) / entry['steps']:.3f}"
        for arm, one in entry["arms"].items()
    ]
    return [*lines, ", ".join(f"{name} {value:.3f}" for name, value in entry["baselines"].items())]
