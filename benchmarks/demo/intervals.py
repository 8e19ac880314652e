"""Paired comparisons of two arms: "ahead" and "behind" only where the 95 % t interval excludes zero."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves all above, on the safe side.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = {"loss": True, "accuracy": False, "general_loss": True}  # whether lower is better


@dataclass(frozen=True)
class Comparison:
    """A method against random LoRA.

    Attributes:
        difference: mean over seeds of method minus random.
        half_width: half of the 95 % t interval of that mean; None with one seed.
        verdict: "ahead", "behind", "level" or "one seed".
    """

    difference: float
    half_width: float | None
    verdict: str


def compare(random: Sequence[float], method: Sequence[float], lower_is_better: bool) -> Comparison:
    """Compare two arms with one value per seed, the same seeds in the same order."""
    if not random or len(random) != len(method):
        raise ValueError(f"method has {len(method)} values, but must have as many as random: {len(random)}, not 0")
    differences = [b - a for a, b in zip(random, method, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Comparison(mean, None, "one seed")
    quantile = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1]
    half_width = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= half_width:
        return Comparison(mean, half_width, "level")
    return Comparison(mean, half_width, "ahead" if (mean < 0) == lower_is_better else "behind")


def format_difference(comparison: Comparison, measure: str) -> str:
    """A difference with its uncertainty, such as "+0.105 ± 0.164"; accuracies in percentage points."""
    scale, form, unit = (100, ".1f", " pp") if measure == "accuracy" else (1, ".3f", "")
    text = f"{scale * comparison.difference:+{form}}"
    if comparison.half_width is not None:
        text += f" ± {scale * comparison.half_width:{form}}"
    return text + unit


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None
