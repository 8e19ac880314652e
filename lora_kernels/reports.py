"""What all reports have in common: plain text and strict JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import rich.table
from rich.console import Console
from rich.text import Text

PREFIX = "base_model.model."  # of every module of a PEFT model


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
    """A table of texts that users gave: brackets are no markup, names of layers are folded and not cut."""

    def __init__(self, *headers: str, title: str, **settings: Any) -> None:
        super().__init__(title=Text(printable(title), style="table.title"), **settings)
        for header in headers:
            self.add_column(header, overflow="fold" if header == "layer" else "ellipsis")

    def add_row(self, *cells: Any, **settings: Any) -> None:
        """Add a row of texts, or of what rich can print."""
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **settings)


class Printed:
    """A report that rich can print: `print` shows the same as plain text."""

    text_width: ClassVar[int] = 160

    def __str__(self) -> str:
        """The same as plain text."""
        plain_console = Console(width=self.text_width, no_color=True, markup=False, emoji=False, highlight=False)
        with plain_console.capture() as captured:
            plain_console.print(self)
        return captured.get()


class Report(Printed):
    """A report, a dataclass, that can be written as JSON as well."""

    def to_dict(self) -> dict[str, object]:
        """Plain Python values; NaN becomes `None`."""
        fields: Any = asdict(self)  # type: ignore[call-overload]
        values: dict[str, object] = plain(fields)  # type: ignore[assignment]
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """The report as strict JSON.

        Args:
            indent: as in `json.dumps`.

        Returns:
            The text.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def plain(value: object) -> object:
    """A tree that JSON can hold: tuples as lists, keys as text, what is not finite as `None`."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
