"""Reports as one HTML page: grids of depth x module, and the most notable layers. No script, nothing loaded."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lora_kernels.reports import short_name

# Columns up to which a cell is wide enough for a number.
_WITH_TEXT = 48
# Letters of a module that fit beside its row.
_LABEL = 20
_NO_VALUE, _NOT_FINITE = "#d9d9d9", "#000"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A value per layer, drawn as a table of modules (down) and blocks (across)."""

    title: str  # what is shown
    meaning: str  # one sentence on how to read it
    # By layer name; `None` is drawn grey and NaN black. Layers that share a cell (experts of a block) are drawn as
    # their mean.
    values: Mapping[str, float | None]
    # What stands in a cell, where it has one layer and is wide enough.
    texts: Mapping[str, str] = field(default_factory=dict)
    tips: Mapping[str, str] = field(default_factory=dict)  # what a pointer over a cell shows instead of the value
    high: float = 1.0  # value of the darkest colour; the lightest is 0
    log: bool = False  # colours are logarithmic instead, up to the largest value and over one to three decades
    hue: int = 215  # of the colours, in degrees
    # Labels and colours; a value is then an index, and a cell of several layers has the largest.
    palette: tuple[tuple[str, str], ...] = ()

    def colours(self, names: Sequence[str]) -> tuple[str, str]:
        """Background and text colour of the cell of these layers."""
        values = [value for name in names if (value := self.values.get(name)) is not None]
        if not values:
            return _NO_VALUE, "#000"
        if self.palette:
            return self.palette[int(max(values))][1], "#fff"
        mean = sum(values) / len(values)
        if math.isnan(mean):
            return _NOT_FINITE, "#fff"
        value, (low, high) = mean, self._ends
        if self.log:
            value, low, high = (math.log(max(number, 1e-300)) for number in (value, low, high))
        level = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else float(value >= high)
        return self._colour(level), "#fff" if level > 0.75 else "#000"

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Values of the lightest and of the darkest colour."""
        if not self.log:
            return 0.0, self.high
        positive = [value for value in self.values.values() if value is not None and 0 < value < math.inf]
        high = max(positive, default=1.0)
        return max(high / 1000, min(high / 10, min(positive, default=high))), high

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Labels and colours: of the palette, as far as it is used, or of the ends of the scale."""
        if self.palette:
            used = {int(value) for value in self.values.values() if value is not None}
            return [entry for index, entry in enumerate(self.palette) if index in used]
        return [(f"{end:.2g}", self._colour(level)) for level, end in enumerate(self._ends)]

    def _colour(self, level: float) -> str:
        return f"hsl({self.hue} 65% {95 - 60 * level:.0f}%)"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something notable that layers have in common."""

    title: str  # its name; if it is one of the template's, that has the next two
    meaning: str = ""  # what it means
    advice: str = ""  # what to do
    layers: tuple[tuple[str, str], ...]  # names and their number in words, the most notable first


def select(findings: Sequence[Finding], count: int = 10) -> list[tuple[Finding, tuple[tuple[str, str], ...]]]:
    """Findings with those of their layers that are to be shown, `count` in all, each finding with at least three."""
    share, left, chosen = max(3, count // max(1, len(findings))), count, []
    for finding in findings:
        layers = finding.layers[: left if finding is findings[-1] else min(share, left)]
        left -= len(layers)
        chosen.append((finding, layers))
    return [(finding, layers) for finding, layers in chosen if layers]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A number over training steps."""

    title: str  # what is shown
    points: tuple[tuple[float, float], ...]  # steps and values; NaN is left out

    @property
    def line(self) -> str:
        """The points of an SVG polyline in a box of 100 x 40, x to the right and y down."""
        points = [point for point in self.points if math.isfinite(point[1])]
        if not points:
            return ""
        (left, right), (low, high) = ((min(side), max(side)) for side in zip(*points, strict=True))
        return " ".join(
            f"{100 * (x - left) / ((right - left) or 1):.2f},{40 - 40 * (y - low) / ((high - low) or 1):.2f}"
            for x, y in points
        )

    @property
    def change(self) -> str:
        """The first and the last value."""
        return f"{self.points[0][1]:.3g} → {self.points[-1][1]:.3g}"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    headline: str  # the result in a sentence
    colour: str = "#1d1d1f"  # of the headline
    facts: Sequence[str] = ()  # numbers of the whole model
    grids: Sequence[Grid] = ()
    hint: tuple[str, str] | None = None  # what to add for a better result, and the command line that does it
    findings: Sequence[Finding] = ()  # the most serious first
    history: tuple[str, Sequence[Curve], Sequence[Grid]] | None = None  # of a monitor, with a title
    notes: Sequence[str] = ()

    def to_html(self) -> str:
        """The page; all text is escaped."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415  (slow to import)

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["short_name"] = short_name
        template = environment.get_template("page.html.j2")
        return template.render(page=self, layout=layout, chosen=select(self.findings), with_text=_WITH_TEXT)


@dataclass(frozen=True)
class Row:
    """One kind of module: its label, its full name with `*` for numbers, and the layers of each block."""

    label: str
    kind: str
    cells: tuple[tuple[str, ...], ...]
    span: int


def layout(names: Iterable[str]) -> tuple[list[int], list[Row]]:
    """Blocks, and a row per kind of module; a layer outside all blocks has one cell as wide as they are."""
    places: dict[str, dict[int | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        kind, block = _place(name)
        places[kind][block].append(name)
    blocks = sorted({block for row in places.values() for block in row if block is not None})
    rows = []
    for label, (kind, row) in zip(_labels(list(places)), places.items(), strict=True):
        if None in row:
            rows.append(Row(label, kind, (tuple(row[None]),), max(1, len(blocks))))
        else:
            rows.append(Row(label, kind, tuple(tuple(row.get(block, ())) for block in blocks), 1))
    return blocks, rows


def _place(name: str) -> tuple[str, int | None]:
    """The kind of a layer, its name with `*` for every number, and the block it lies in, the first of them."""
    parts = short_name(name).split(".")
    numbers = [part for part in parts if part.isdecimal() and len(part) < 10]
    kind = ".".join("*" if part in numbers else part for part in parts)
    return kind, int(numbers[0]) if numbers else None


def _labels(kinds: Sequence[str]) -> list[str]:
    """The shortest tail of each dotted name in which no other name ends; a long one without its middle."""
    tails = {kind: [kind.split(".", count)[-1] for count in range(kind.count("."), -1, -1)] for kind in kinds}
    counts = Counter(tail for kind in kinds for tail in tails[kind])
    usable = {kind: (tail for tail in tails[kind] if counts[tail] == 1 and tail[:2] != "*.") for kind in kinds}
    labels = [next(usable[kind], kind) for kind in kinds]
    short = [re.sub(r"\..*\.", "…", label) if len(label) > _LABEL else label for label in labels]
    return [brief if short.count(brief) == 1 else label for brief, label in zip(short, labels, strict=True)]
