"""Draw `docs/figures` from the committed records: `python -m benchmarks.figures`.

`docs/figures/index.json` holds the digest of every record that a figure was drawn from, so that a test can tell a
figure that is older than its record.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import sensing
from benchmarks.claims import report
from benchmarks.demo import study_report
from benchmarks.records import RESULTS, ROOT, cases

FOLDER = ROOT / "docs" / "figures"
INDEX = "index.json"
# Okabe and Ito's colours, which the colour-blind tell apart too.
OURS, PEER, THIRD, FOURTH, BOUND = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "0.3"
# The same input, the same bytes: no dates, and no random names.
_STYLE = {"svg.hashsalt": "lora_kernels", "font.size": 9, "axes.axisbelow": True}
Bars = Sequence[tuple[str, Sequence[float | None], str]]


def _bars(axes: Any, names: Sequence[str], sides: Bars, unit: str, pattern: str = "{:.3g}") -> None:
    """Horizontal bars by name, one per side, their values beside them; `None` leaves one out."""
    height = 0.8 / len(sides)
    for index, (label, values, colour) in enumerate(sides):
        places = [place + (index - (len(sides) - 1) / 2) * height for place in range(len(names))]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        axes.barh(
            [place for place, _ in known], [value for _, value in known], height * 0.92, label=label, color=colour
        )
        for place, value in known:
            axes.text(value, place, " " + pattern.format(value), va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    if len(sides) > 1:
        axes.legend(fontsize=7)


def train() -> Figure:
    """Time of a step and bytes kept, by side."""
    entry = cases("train")["llama"]
    titles = {"peft": "PEFT", "compiled": "torch.compile", "hand_written": "addmm by hand", "ours": "ours"}
    colours = {"peft": PEER, "compiled": THIRD, "hand_written": FOURTH, "ours": OURS}
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, unit in (
        (left, {side: value["p50"] for side, value in entry["seconds"].items()}, "s per training step"),
        (right, {side: size / 1e6 for side, size in entry["bytes_saved_for_adapters"].items()}, "MB kept for adapters"),
    ):
        known = [side for side in titles if side in values]
        _bars(axes, [titles[side] for side in known], [("", [values[side] for side in known], OURS)], unit)
        for bar, side in zip(axes.patches, known, strict=True):
            bar.set_color(colours[side])
    floor = entry.get("floor", {}).get("seconds")
    if floor:
        left.axvline(floor, color=BOUND, linestyle="--", linewidth=1)
        left.set_title("dashed: the FLOPs at the machine's rate", fontsize=8)
    return figure


def layers() -> Figure:
    """PEFT over ours by shape and rank, and what FLOPs allow."""
    # As they are installed; those without the extension stand in the table.
    entries = [entry for entry in cases("linear")["layers"]["entries"] if entry.get("extension", True)]
    figure = Figure(figsize=(10, 0.28 * len(entries) / 2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, dropout in zip(panels, sorted({entry["dropout"] for entry in entries}), strict=True):
        shown = [entry for entry in entries if entry["dropout"] == dropout]
        tokens = {entry["tokens"] for entry in shown}
        names = [_layer_name(entry, len(tokens) > 1) for entry in shown]
        places = range(len(shown))
        axes.barh(places, [entry["peft_over_ours"] for entry in shown], color=OURS, height=0.7, label="PEFT / ours")
        bounds = [
            entry["seconds"]["peft"]["p50"] / entry["seconds"]["base"]["p50"] / entry["floor_over_base"]
            for entry in shown
        ]
        axes.scatter(bounds, places, marker="|", s=90, color=BOUND, label="at most, by FLOPs", zorder=3)
        for side, label, marker, colour in (
            ("compiled", "torch.compile / ours", "D", THIRD),
            ("hand_written", "addmm by hand / ours", "s", FOURTH),
        ):
            if all(side in entry["seconds"] for entry in shown):
                ratios = [entry["seconds"][side]["p50"] / entry["seconds"]["ours"]["p50"] for entry in shown]
                axes.scatter(ratios, places, marker=marker, s=16, color=colour, label=label, zorder=4)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(places, names, fontsize=7)
        axes.set(xlabel="times faster than the peer", title=f"dropout {dropout:g}")
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    panels[1].legend(fontsize=7)
    return figure


def _layer_name(entry: dict[str, Any], tokens: bool) -> str:
    dtype = entry.get("dtype", "float32")
    sizes = f"{entry['tokens']} x {entry['n']} → {entry['m']}" if tokens else f"{entry['n']} → {entry['m']}"
    return f"{sizes}, r {entry['rank']}" + ("" if dtype == "float32" else f", {dtype}")


def init() -> Figure:
    """Seconds of every initialisation."""
    eva, methods = cases("eva")["llama"]["seconds"], cases("init")["llama"]["methods"]
    ours = [eva["ours"]["p50"], *(method["ours"]["seconds"]["p50"] for method in methods.values())]
    theirs = [eva["peft"]["p50"], *(method["peer"]["seconds"]["p50"] for method in methods.values())]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    _bars(axes, ["eva", *methods], [("ours", ours, OURS), ("the peer", theirs, PEER)], "s, logarithmic")
    axes.set_xscale("log")
    axes.legend(loc="center right", fontsize=7)
    return figure


def llm() -> Figure:
    """Training steps of SmolLM2-135M over the passes of its base alone, rank 8 in float32."""
    entries = [step for step in cases("llm").values() if step["rank"] == 8 and step["dtype"] == "float32"]
    entries.sort(key=lambda entry: (entry["dropout"], entry["tokens"]))
    names = [f"{entry['batch']} x {entry['length']} tokens, dropout {entry['dropout']:g}" for entry in entries]
    titles = {"peft": ("PEFT", PEER), "hand_written": ("addmm by hand", FOURTH), "ours": ("ours", OURS)}
    sides = [
        (title, [entry["seconds"][side]["p50"] / entry["seconds"]["base"]["p50"] for entry in entries], colour)
        for side, (title, colour) in titles.items()
    ]
    figure = Figure(figsize=(8, 0.55 * len(entries) + 0.9), layout="constrained")
    axes = figure.subplots()
    _bars(axes, names, sides, "time of a training step over forward and backward of the bare model", "{:.2f}")
    axes.axvline(1, color=BOUND, linestyle="--", linewidth=1)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(
        f"{entries[0]['model']}, LoRA on all {entries[0]['layers']} linear layers, rank 8, on a CPU", fontsize=9
    )
    return figure


def lora_pro() -> Figure:
    """The full step by side, with its floor."""
    entry = cases("lora_pro")["full"]
    titles = {"faithful": "the authors' procedure", "careful": "careful torch", "ours": "ours"}
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    values = [1e3 * entry["seconds"][side]["p50"] for side in titles]
    _bars(axes, list(titles.values()), [("", values, OURS)], "ms per full step")
    for bar, side in zip(axes.patches, titles, strict=True):
        bar.set_color(OURS if side == "ours" else PEER)
    axes.axvline(1e3 * entry["floor"]["seconds"], color=BOUND, linestyle="--", linewidth=1)
    axes.set_title("dashed: bytes or FLOPs at the machine's rates", fontsize=8)
    return figure


def linalg() -> Figure:
    """How many times faster than torch: SVD, batched small problems, spectra of adapters."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    entries = [entry for case in ("small", "large", "batch") for entry in cases("svd")[case]["entries"]]
    names = [f"{' x '.join(map(str, entry['shape']))}, {entry['spectrum']}, r {entry['rank']}" for entry in entries]
    sides = ("torch.svd_lowrank+8", "torch.linalg.svd")
    bars: Bars = [
        (side, [entry["times_faster"].get(side) for entry in entries], colour)
        for side, colour in zip(sides, (OURS, PEER), strict=True)
    ]
    _bars(left, names, bars, "torch / ours, randomized SVD")
    small, orders = (
        cases("small_linalg"),
        sorted({entry["order"] for entry in cases("small_linalg")["eigh"]["entries"]}),
    )
    colours = (OURS, PEER, THIRD, FOURTH)
    for (op, case), colour in zip(small.items(), colours, strict=True):
        ratios = {entry["order"]: entry["torch_over_ours"] for entry in case["entries"] if entry["dtype"] == "float32"}
        right.plot(orders, [ratios.get(order, math.nan) for order in orders], marker="o", color=colour, label=op)
    spectrum = cases("spectrum")["adapters"]
    right.set(xlabel="order, or rank", ylabel="torch / ours, batches in float32", xscale="log")
    right.set_xticks(orders, [str(order) for order in orders])
    right.minorticks_off()
    right.set_title(f"spectra of adapters, against svdvals of B A: {spectrum['smallest_ratio']:,.0f}", fontsize=8)
    left.set_xscale("log")
    left.axvline(1, color="black", linewidth=1)
    right.axhline(1, color="black", linewidth=1)
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=2)
    return figure


def landscape() -> Figure:
    """Verdicts on runs with a known answer."""
    entry = cases("landscape")["sensing"]
    figure: Figure = sensing.draw(entry["runs"], entry["confusion"])
    return figure


def claims() -> Figure:
    """Claims of the papers in small."""
    record = json.loads((RESULTS / f"{report.COSTS}.json").read_text())
    figure: Figure = report.draw(cases("claims"), record)
    return figure


# By name: the records it is drawn from, and how.
FIGURES: dict[str, tuple[tuple[str, ...], Callable[[], Figure]]] = {
    "train": (("train",), train),
    "llm": (("llm",), llm),
    "layers": (("linear",), layers),
    "init": (("init", "eva"), init),
    "lora_pro": (("lora_pro",), lora_pro),
    "linalg": (("svd", "small_linalg", "spectrum"), linalg),
    "landscape": (("landscape",), landscape),
    "claims": (("claims", report.COSTS), claims),
}


# How a record of `benchmarks.demo.study` is drawn, by the first word of its name.
STUDIES = {"quality": study_report.draw, "rates": study_report.draw_rates}


def sources() -> dict[str, tuple[str, ...]]:
    """The records of every figure, those of the studies among them."""
    studies = {file.stem: (file.stem,) for kind in STUDIES for file in sorted(RESULTS.glob(f"{kind}_*.json"))}
    return {**{name: needed for name, (needed, _) in FIGURES.items()}, **studies}


def digests() -> dict[str, dict[str, str]]:
    """By figure, the digests of its records as they are now."""
    return {
        name: {one: hashlib.sha256((RESULTS / f"{one}.json").read_bytes()).hexdigest() for one in needed}
        for name, needed in sources().items()
    }


def main(folder: Path = FOLDER) -> int:
    """Draw all figures.

    Args:
        folder: where to.

    Returns:
        0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name in sources():
            file = folder / f"{name}.svg"
            if name in FIGURES:
                FIGURES[name][1]().savefig(file, metadata={"Date": None})
            else:
                STUDIES[name.split("_")[0]](json.loads((RESULTS / f"{name}.json").read_text()), file)
            # Matplotlib leaves blanks at the ends of lines.
            file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")
    (folder / INDEX).write_text(json.dumps(digests(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
