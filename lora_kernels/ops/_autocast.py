"""Autocast: what it asks for, and arithmetic without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Arithmetic in the dtypes of its operands, whatever autocast the caller is under; also a decorator."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", "cuda", *_accelerators()}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _accelerators() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return () if accelerator is None or not torch.amp.is_autocast_available(accelerator.type) else (accelerator.type,)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, as in `torch.nn.functional.linear`; `None` where it asks for nothing."""
    kind = x.device.type
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if not known or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
