"""Progress bars: shown for all that runs inside `progress_bars(True)`, and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_shown: ContextVar[bool] = ContextVar("progress_bars", default=False)


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show progress bars inside this context, or hide them."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def progress_bar(total: int, title: str, unit: str) -> tqdm[Any]:
    """A bar that disappears when it is closed; it shows nothing outside `progress_bars(True)`."""
    return tqdm(total=total, desc=title, unit=unit, disable=not _shown.get(), leave=False)
