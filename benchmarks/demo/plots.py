"""The demo's picture: held-out loss against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.demo.side import Evaluation

COLOURS = ("#E69F00", "#0072B2")  # of Okabe and Ito: the colour-blind can tell them apart


def plot_losses(curves: dict[str, Sequence[Evaluation]], path: Path) -> None:
    """Draw each side's held-out loss against its clock, with the loss that the first side ends at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (label, points), colour, marker in zip(curves.items(), COLOURS, "os", strict=False):
        axes.plot(
            [point.seconds for point in points],
            [point.loss for point in points],
            color=colour,
            marker=marker,
            label=label,
        )
    first = next(iter(curves.values()))[-1]
    axes.axhline(first.loss, color=COLOURS[0], linewidth=1, linestyle=":")
    axes.set(xlabel="seconds of start and training steps", ylabel="held-out loss (nats per token)", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
