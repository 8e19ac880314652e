"""What all reports have in common: plain text and strict JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, ClassVar

from rich.console import Console


class Printed:
    """A report that rich can print: `print` shows the same as plain text."""

    text_width: ClassVar[int] = 160

    def __str__(self) -> str:
        """The same as plain text."""
        console = Console(width=self.text_width, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


class Report(Printed):
    """A report, a dataclass, that can be written as JSON as well."""

    def to_dict(self) -> dict[str, object]:
        """Plain Python values; NaN becomes `None`."""
        fields: Any = asdict(self)  # type: ignore[call-overload]
        made: dict[str, object] = plain(fields)  # type: ignore[assignment]
        return made

    def to_json(self, indent: int | None = 2) -> str:
        """The report as strict JSON.

        Args:
            indent: as in `json.dumps`.

        Returns:
            The text.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def plain(value: object) -> object:
    """Values that JSON can hold: tuples as lists, keys as text, what is not finite as `None`.

    Args:
        value: a tree of dictionaries, lists and tuples.

    Returns:
        The same tree.
    """
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
