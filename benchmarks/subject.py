"""What a subject of `benchmarks.compare` is: cases that are measured, and rows of ours against a peer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from benchmarks.records import CONSOLE


@dataclass(frozen=True)
class Row:
    """Ours against one peer.

    Attributes:
        what: the problem.
        peer: who.
        ours: seconds.
        theirs: seconds.
        floor: the least that the problem costs at the machine's rates, in seconds; `None` if it was not recorded.
        target: the ratio that was asked for.
        group: of the rows of a case with the same peer and group, the one with the lowest ratio stands in the summary.
    """

    what: str
    peer: str
    ours: float
    theirs: float
    floor: float | None = None
    target: float | None = None
    group: str = ""

    @property
    def ratio(self) -> float:
        """Time of the peer over ours."""
        return self.theirs / self.ours

    @property
    def over_floor(self) -> float | None:
        """Our time over the floor's."""
        return self.ours / self.floor if self.floor else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; `None` without one."""
        return None if self.target is None else self.ratio >= self.target


def nothing(_entry: Mapping[str, Any]) -> list[Any]:
    """No rows, or no lines."""
    return []


def no_options(_parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


@dataclass(frozen=True)
class Subject:
    """Something that is compared.

    Its record is `results/<name>.json`: `{"cases": {case: entry}}`; a case that is measured again replaces its entry.

    Attributes:
        name: of the subject.
        about: what is compared with what, and what must agree before any time is taken.
        cases: by name, measured with the options of the command line; each returns its entry. Raises `SystemExit` if
            the numbers are wrong.
        rows: of an entry.
        notes: of an entry, lines to print after the rows.
        full: the cases that run by default.
        quick: those of `--quick`.
        table: those that are in the summary; all of `full` by default.
        pooled: whether the summary takes the rows of all cases for those of one.
        rounds: timed calls of each side.
        options: adds those of this subject to a parser.
    """

    name: str
    about: str
    cases: Mapping[str, Callable[[argparse.Namespace], dict[str, Any]]]
    rows: Callable[[Mapping[str, Any]], list[Row]]
    full: Sequence[str]
    quick: Sequence[str]
    notes: Callable[[Mapping[str, Any]], list[str]] = nothing
    table: Sequence[str] | None = None
    pooled: bool = False
    rounds: int = 5
    options: Callable[[argparse.ArgumentParser], None] = field(default=no_options)

    def headlines(self, cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Row, int]]:
        """The rows of the summary.

        Args:
            cases: of the record.

        Returns:
            Case, row, and of how many rows it is the one with the lowest ratio.
        """
        groups: dict[tuple[str, str, str], list[tuple[str, Row]]] = {}
        for case in self.full if self.table is None else self.table:
            for row in self.rows(cases[case]) if case in cases else ():
                groups.setdefault(("" if self.pooled else case, row.group, row.peer), []).append((case, row))
        return [(*min(rows, key=lambda pair: pair[1].ratio), len(rows)) for rows in groups.values()]


def show(subject: Subject, case: str, entry: Mapping[str, Any]) -> None:
    """Print an entry."""
    rows = subject.rows(entry)
    if rows:
        table = Table("", "peer", "ours", "the peer's", "peer / ours", "ours / floor", title=f"{subject.name}, {case}")
        for row in rows:
            over = "" if row.over_floor is None else f"{row.over_floor:.2f}"
            wanted = "" if row.target is None else f" ({row.target:.3g} asked for)"
            times = [duration(row.ours), duration(row.theirs)]
            table.add_row(row.what, row.peer, *times, f"{row.ratio:.2f}{wanted}", over)
        CONSOLE.print(table)
    for line in subject.notes(entry):
        CONSOLE.print(line, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds in words: three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
