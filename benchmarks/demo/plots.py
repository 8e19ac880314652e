"""The demo's two pictures: loss curves and the rank of each layer."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.report import group_by_arm, smooth, window_of
from benchmarks.demo.task import RunRecord


def require_matplotlib() -> None:
    """Checks before the long part that the plots can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots was True, must be False without matplotlib; or pip install 'lora_kernels[plots]'")


def plot_losses(records: Sequence[RunRecord], path: Path) -> None:
    """Draws the smoothed training loss and the held-out loss: mean line, band from lowest to highest seed.

    Args:
        records: All runs, every arm with the same seeds.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = window_of(len(records[0].train_loss))
    for colour, (arm, runs) in enumerate(group_by_arm(records).items()):
        label = f"{arm}, rate {runs[0].learning_rate:g}"
        curves = [smooth(run.train_loss, window) for run in runs]
        _band(left, list(range(window, window + len(curves[0]))), curves, f"C{colour}", label)
        held_out = [[evaluation.loss for evaluation in run.evaluations] for run in runs]
        _band(right, [evaluation.step for evaluation in runs[0].evaluations], held_out, f"C{colour}", label, marker="o")
    left.set_title(f"training loss, mean of the last {window} steps")
    right.set_title("held-out loss")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150, format="png")


def plot_ranks(records: Sequence[RunRecord], path: Path) -> None:
    """Draws the rank of each layer in every arm's last run.

    Args:
        records: All runs.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    last = {arm: runs[-1] for arm, runs in group_by_arm(records).items()}
    names = list(dict.fromkeys(name for run in last.values() for name in run.ranks))
    figure = Figure(figsize=(9, max(3.0, 0.24 * len(names) + 1.2)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(last)
    for index, (arm, run) in enumerate(last.items()):
        places = [row + (index - (len(last) - 1) / 2) * height for row in range(len(names))]
        label = f"{arm}, {sum(run.ranks.values())} in all"
        axes.barh(places, [run.ranks.get(name, 0) for name in names], height, color=f"C{index}", label=label)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("LoRA rank")
    axes.set_title("rank per layer, last seed")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")


def _band(
    axes: Any, steps: list[int], curves: list[list[float]], colour: str, label: str, marker: str | None = None
) -> None:
    columns = list(zip(*curves, strict=True))
    axes.plot(steps, [statistics.fmean(column) for column in columns], color=colour, label=label, marker=marker)
    axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0)
