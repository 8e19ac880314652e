"""Claims of the papers in small, see `benchmarks.claims`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.claims import directions, ends, equivalent
from benchmarks.subject import Subject, nothing

_CASES = {"equivalent": equivalent, "directions": directions, "ends": ends}


def _notes(entry: Mapping[str, Any]) -> list[str]:
    return _CASES[entry["claim"]].notes(entry)


SUBJECT = Subject(
    name="claims",
    about="Claims of the papers on a small scale, beside chance or a baseline: the equivalent gradient of LoRA-Pro, "
    "the directions of LoRA-Dash, the ends of training under weight decay. Not against a peer.",
    cases={
        name: lambda options, name=name: {"claim": name, **_CASES[name].measure(options.quick)}  # type: ignore[misc]
        for name in _CASES
    },
    rows=nothing,
    notes=_notes,
    full=tuple(_CASES),
    quick=tuple(_CASES),
)
