"""What a start means for training: how far it moves the model, what the first step gains, and which rate suits it."""

from __future__ import annotations

import math
import statistics as quantiles
from collections.abc import Iterable

from lora_kernels.init.problem import LoraFactors
from lora_kernels.statistics.store import Statistics

# From here on a learning rate is one for stock LoRA rather than for full fine-tuning.
LORA_RATE = 1e-4
WARNING = "learning rate: "  # begins a sentence that deserves a `RuntimeWarning`
# Closer than this the rates of two starts are alike.
_ALIKE = 1.5


def outlook(
    factors: LoraFactors, scaling: float, statistics: Statistics, name: str, *, offset: bool
) -> dict[str, float | None]:
    """What a start of rank 1 or more means, by the names of `LayerReport`; changes of the mean loss to first order."""
    # `start_change` is `<G, s B A>`, 0 with `offset`, where the base cancels the start; `first_step` is `-(|s B^T G|_1
    # + |s G A^T|_1)`, per unit of Adam's learning rate. Both are `None` without a gradient.
    a, b = factors.A.detach(), factors.B.detach()
    (rank, n), m = a.shape, b.shape[0]
    # How much farther a step of Adam moves the weight than from stock LoRA's start at the same rate, by which every
    # entry is moved. With independent signs |dB A|^2 is m |A|^2, and |B dA|^2 n |B|^2;
    # stock LoRA has B = 0 and A uniform within 1 / sqrt(n), so |A|^2 = r / 3.
    moved = m * float(a.square().sum()) + n * float(b.square().sum())
    ratio = math.sqrt(moved / (m * rank / 3))
    if (layer := statistics.get(name)) is None or not layer.has_gradient:
        return {"start_change": 0.0 if offset or not bool(b.any()) else None, "step_ratio": ratio}
    gradient = layer.gradient_operator()
    of_a, of_b = gradient.transposed_times(b).mT, gradient.times(a.mT)
    a = a.to(of_a)
    change = 0.0 if offset else scaling * float((of_a * a).sum())
    step = -abs(scaling) * float(of_a.abs().sum() + of_b.abs().sum())
    return {"start_change": change, "first_step": step, "step_ratio": ratio}


def advice(
    method: str, ratios: Iterable[float], *, starts_away: bool, full_rate: bool, learning_rate: float | None
) -> tuple[str, ...]:
    """Sentences about learning rates, from the `step_ratio` of all layers."""
    # The last is a warning if and only if a LoRA-sized rate meets a start away from zero that moves farther than LoRA
    # does.
    if not (values := list(ratios)):
        return ()
    # (No advice for starts that move less: LoRA-DA's best rate is not larger, see benchmarks/results/quality_*.)
    ratio, sentences = quantiles.median(values), []
    if full_rate:
        sentences.append(f"the authors of {method} train it at rates of full fine-tuning (about 2e-5 for 7B models)")
    if ratio > _ALIKE:
        sentences.append(
            f"a step moves the weights {ratio:.1f} times as far as stock LoRA's at the same rate (median over layers): "
            f"begin with a rate {ratio:.1f} times smaller"
        )
    if learning_rate is not None and starts_away and learning_rate >= LORA_RATE and ratio > _ALIKE:
        sentences.append(
            f"{WARNING}{method} starts at B != 0, and learning_rate={learning_rate:g} is a rate for B = 0; it moves "
            f"the weights as {learning_rate * ratio:.1e} would there. Try {learning_rate / ratio:.1e}"
        )
    return tuple(sentences)
