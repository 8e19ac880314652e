"""The demo's picture: training and held-out loss."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.report import group_by_arm
from benchmarks.demo.training import Result

SMOOTHING_SHARE = 0.1


def plot_losses(results: Sequence[Result], path: Path) -> None:
    """Draw mean over seeds, and a band from the lowest to the highest seed, by arm; every arm has the same seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = len(results[0].train_loss)
    window = max(1, round(SMOOTHING_SHARE * steps))
    for index, (arm, runs) in enumerate(group_by_arm(results).items()):
        label, colour = f"{arm}, rate {runs[0].learning_rate:g}", f"C{index}"
        curves = [[statistics.fmean(run.train_loss[i : i + window]) for i in range(steps - window + 1)] for run in runs]
        _band(left, range(window, steps + 1), curves, color=colour, label=label)
        held_out = [[evaluation.loss for evaluation in run.evaluations] for run in runs]
        _band(right, [point.step for point in runs[0].evaluations], held_out, color=colour, label=label, marker="o")
    left.set_title(f"training loss, mean of the last {window} steps")
    right.set_title("held-out loss")
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="cross-entropy (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def _band(axes: Any, steps: Sequence[int], curves: list[list[float]], **style: str) -> None:
    columns = list(zip(*curves, strict=True))
    axes.plot(steps, [statistics.fmean(column) for column in columns], **style)
    axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=style["color"], alpha=0.2)
