"""Autocast: what it asks for, and arithmetic without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a device type."""
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Arithmetic in the dtypes of its operands, whatever autocast the caller is under; also a decorator."""
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", "cuda", "cpu" if accelerator is None else accelerator.type}:
            if autocasts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, as in `torch.nn.functional.linear`; `None` where it asks for nothing."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if autocasts(kind) and x.dtype != torch.float64 else None
