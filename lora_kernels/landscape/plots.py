"""Pictures of a diagnosis. matplotlib is imported only when one is drawn, and needs no display."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kernels.landscape.report import Diagnosis
from lora_kernels.reports import short_name

# Decades below a layer's largest singular value that the heat map shows.
_DECADES = 4
# Layers whose names are written beside the heat map; with more, every k-th is.
_NAMED = 60


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional dependency)

    return Figure(figsize=(width, height), layout="constrained")


def plot_spectra(diagnosis: Diagnosis, path: Path) -> None:
    """The singular values of every layer, relative to its largest, and that one beside them.

    Args:
        diagnosis: with at least one layer.
        path: PNG file to write.
    """
    spectra = [each.spectrum for each in diagnosis]
    columns = max(1, *(each.rank for each in spectra))
    rows = []
    for each in spectra:
        top = each.spectral
        relative = [math.log10(max(v / top, 10.0**-_DECADES)) if top > 0 else math.nan for v in each.values]
        rows.append(relative + [math.nan] * (columns - len(relative)))
    figure = _figure(10, min(40.0, max(3.0, 0.16 * len(rows) + 1.5)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left.set_facecolor("0.85")  # where a layer has no value: a smaller rank, a zero update, or NaN
    extent = (0.5, columns + 0.5, len(rows) - 0.5, -0.5)
    image = left.imshow(
        rows, aspect="auto", interpolation="nearest", vmin=-_DECADES, vmax=0, cmap="viridis", extent=extent
    )
    figure.colorbar(image, ax=left, label="log10 of the share of the largest", location="left", shrink=0.6)
    step = -(-len(rows) // _NAMED)
    left.set_yticks(range(0, len(rows), step), [short_name(each.name) for each in diagnosis][::step], fontsize=6)
    left.set_xlabel("singular value of s B A")
    shares = [each.spectral_share for each in spectra]
    known = all(each is not None for each in shares)
    lengths = [each if known else spectrum.spectral for each, spectrum in zip(shares, spectra, strict=True)]
    right.barh(range(len(rows)), [each if each is not None and math.isfinite(each) else 0.0 for each in lengths])
    right.set_xlabel("|s B A|_2 / |W|_2" if known else "|s B A|_2")
    right.grid(axis="x", alpha=0.3)
    figure.suptitle("spectra of the updates")
    figure.savefig(path, dpi=130, format="png")


def _place(name: str) -> tuple[str, int]:
    """Which kind of layer a name is, and in which block."""
    numbers = re.search(r"\.(\d+)\.", f".{short_name(name)}.")
    if numbers is None:
        return short_name(name), 0
    low, high = numbers.span()
    whole = f".{short_name(name)}."
    return (whole[:low] + ".*." + whole[high:]).strip("."), int(numbers[1])


def plot_ranks(diagnosis: Diagnosis, path: Path) -> None:
    """The numerical rank of every layer: kinds of layers down, blocks across, coloured by the share of the rank used.

    Args:
        diagnosis: with at least one layer.
        path: PNG file to write.
    """
    places = {each.name: _place(each.name) for each in diagnosis}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    grid = [[math.nan] * len(blocks) for _ in kinds]
    figure = _figure(max(6.0, 0.3 * len(blocks) + 3.5), max(2.5, 0.3 * len(kinds) + 1.2))
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    for each in diagnosis:
        kind, block = places[each.name]
        row, column = kinds.index(kind), blocks.index(block)
        usable = min(each.spectrum.rank, *each.spectrum.shape)
        grid[row][column] = each.spectrum.numerical_rank / usable if usable else math.nan
        colour = "white" if grid[row][column] > 0.6 else "black"
        rank = str(each.spectrum.numerical_rank)
        axes.text(column, row, rank, ha="center", va="center", fontsize=6, color=colour)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="YlOrRd")
    figure.colorbar(image, ax=axes, label="share of the adapter's rank")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axes.set_xticks(range(len(blocks)), [str(each) for each in blocks], fontsize=6)
    axes.set_xlabel("block")
    tolerance = diagnosis.thresholds.rank_tolerance
    axes.set_title(f"numerical rank (singular values above {tolerance:g} of the largest)", fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def plot_training(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Norm, rank and balance over training.

    Args:
        log: the lines of a monitor, at least one.
        path: PNG file to write.
    """
    panels = [
        ("nuclear", "nuclear norm of s B A, all layers"),
        ("share", "largest |s B A|_2 / |W|_2"),
        ("rank", "mean numerical rank"),
        ("balance", "largest imbalance of A and B"),
    ]
    shown = [(key, title) for key, title in panels if any(line.get(key) is not None for line in log)]
    figure = _figure(10, 2.6 * max(1, -(-len(shown) // 2)))
    steps = [line["step"] for line in log]
    all_axes = figure.subplots(-(-len(shown) // 2) or 1, 2, squeeze=False).flatten()
    for axes, (key, title) in zip(all_axes, shown, strict=False):
        axes.plot(steps, [math.nan if line.get(key) is None else line[key] for line in log], marker=".")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=130, format="png")
