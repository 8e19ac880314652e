"""What all reports have in common: plain text and strict JSON."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import rich.measure
import rich.table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

PREFIX = "base_model.model."  # of every module of a PEFT model
Layer = TypeVar("Layer")
_NAME = 26  # columns that a name of a layer has at least, where others are optional


def console(width: int = 160, *, stderr: bool = False) -> Console:
    """A console for text that users gave (names, paths: brackets are no markup); `width` is that of no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else width, stderr=stderr, markup=False, emoji=False, highlight=False)


def printable(text: str) -> str:
    """A text without control characters, which are written as Python writes them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def short_name(name: str) -> str:
    """The name of a layer as reports print it."""
    return printable(name.removeprefix(PREFIX))


def counted(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on layers, given as pairs, as lines: one that several layers share is one line with their number."""
    names: dict[str, list[str]] = {}
    for name, note in notes:
        names.setdefault(note, []).append(short_name(name))
    return [
        f"{layers[0]}: {note}" if len(layers) == 1 else f"{len(layers)} layers ({layers[0]}, ...): {note}"
        for note, layers in names.items()
    ]


class Table(rich.table.Table):
    """A table of texts that users gave: brackets are no markup, names of layers are folded and not cut.

    With `optional` columns every row is one line: columns without a text are left out, then optional ones, the first
    first, as long as the table is too wide, and at last long names of layers lose their beginnings.
    """

    def __init__(self, *headers: str, title: str, optional: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(title=Text(printable(title), style="table.title"), **settings)
        self._optional = optional
        for header in headers:
            self.add_column(header, overflow="fold" if header == "layer" else "ellipsis")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, and the names of the columns that there is no room for."""
        if not self._optional:
            yield from super().__rich_console__(console, options)
            return
        table, unlimited = copy.copy(self), options.update(max_width=10**4)
        cells = {str(column.header): [str(cell) for cell in column.cells] for column in self.columns}
        names, left_out = cells["layer"], []
        longest = max(map(len, names), default=0)

        def excess() -> int:
            columns = [column for column in self.columns if str(column.header) not in left_out]
            table.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
            return rich.measure.Measurement.get(console, unlimited, table).maximum - options.max_width

        left_out += [header for header, texts in cells.items() if names and not any(texts)]
        narrow = [header for header in self._optional if header not in left_out]
        while narrow and excess() > max(0, longest - _NAME):
            left_out.append(narrow.pop(0))
        room = max(_NAME, longest - max(0, excess()))
        layer = next(column for column in table.columns if str(column.header) == "layer")
        shared = os.path.commonprefix(names).rpartition(".")[0]
        layer._cells = [Text(_cut(name, room, shared)) for name in names]
        yield from rich.table.Table.__rich_console__(table, console, options)
        if hidden := [header for header in self._optional if header in left_out and any(cells[header])]:
            yield Text(f"(no room for {', '.join(hidden)})", style="dim")

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row of texts, or of what rich can print."""
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **settings)


def _cut(name: str, room: int, shared: str) -> str:
    """A name of at most `room` letters, without the beginning that all share, and if need be without its middle."""
    if len(name) <= room:
        return name
    rest = "…" + name[len(shared) :].removeprefix(".")
    return rest if len(rest) <= room else f"{rest[:8]}…{rest[9 - room :]}"


class Layers(Generic[Layer]):
    """A report that goes through its layers."""

    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)


class Report:
    """A report, a dataclass: `print` shows what rich does, as plain text; it can be written as JSON as well."""

    text_width: ClassVar[int] = 160

    def __str__(self) -> str:
        """The same as plain text."""
        plain_console = Console(width=self.text_width, no_color=True, markup=False, emoji=False, highlight=False)
        with plain_console.capture() as captured:
            plain_console.print(self)
        return captured.get()

    def to_dict(self) -> dict[str, object]:
        """Plain Python values, with derived ones; numbers that are not finite become `None`."""
        values: dict[str, object] = plain(self)  # type: ignore[assignment]
        return values

    def to_json(self) -> str:
        """The report as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=str)


def plain(value: object) -> object:
    """A tree that JSON can hold: tuples as lists, keys as text, what is not finite as `None`."""
    # A dataclass is a dictionary of its fields and of the properties that its class names in `derived`.
    if is_dataclass(value):
        names = (*(field.name for field in fields(value)), *getattr(value, "derived", ()))
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
