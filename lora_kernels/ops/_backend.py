"""Which implementation runs a call: `auto`, `triton`, `cpp` or `torch`.

Every op holds one `Dispatcher` with an `Implementation` per backend. An implementation is asked "can you take this
call?" and answers `None` (yes) or the reason why not, in words that are shown to the user. `auto` takes the first
that says yes; a backend that was asked for by name and says no is an error, never a detour.

The choice is made in plain Python before the registered op is called, so `torch.compile` sees a constant.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._checks import check_choice

BACKENDS = ("auto", "triton", "cpp", "torch")

# A plain global, so that torch.compile can guard on it.
_override: str | None = None


def _validated(name: str, origin: str) -> str:
    if type(name) is not str or name not in BACKENDS:
        check_choice(origin, name, BACKENDS)
    return name


def requested(backend: str = "auto") -> str:
    """The backend that a call asks for: its own argument, else `use_backend`, else `LORA_KERNELS_BACKEND`, else auto.

    Args:
        backend: what the caller passed.

    Returns:
        One of `BACKENDS`.

    Raises:
        ValueError: if a name is none of `BACKENDS`.
    """
    if _validated(backend, "backend") != "auto":
        return backend
    if _override is not None:
        return _override
    return _validated(os.environ.get("LORA_KERNELS_BACKEND", "auto"), "LORA_KERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, in all threads.

    Args:
        name: one of `BACKENDS`.

    Yields:
        Nothing.

    Raises:
        ValueError: if `name` is none of `BACKENDS`.
    """
    global _override
    before, _override = _override, _validated(name, "backend")
    try:
        yield
    finally:
        _override = before


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401, PLC0415  (importing it is the question)
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_refuses(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, or `None` if they can."""
    missing: str | None = _triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        return None
    if device.type == "cpu":
        return None if interpreting() else "triton runs on CPU tensors only under TRITON_INTERPRET=1"
    return f"no triton kernels for device type {device.type!r}"


def cpp_refuses(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on tensors of `device`, or `None` if they can."""
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type!r}"
    missing: str | None = _ext.missing()
    return missing


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        backend: `triton`, `cpp` or `torch`.
        refuses: called with the op's arguments; the reason why this implementation cannot take them, or `None`.
        explicit_only: true where it is never the right choice by itself (Triton's interpreter on CPU tensors).
    """

    backend: str
    refuses: Callable[..., str | None]
    explicit_only: Callable[..., bool] = lambda *_args, **_kwargs: False


class Dispatcher:
    """Chooses among the implementations of one op, in their order of preference."""

    def __init__(self, name: str, implementations: Sequence[Implementation]) -> None:
        """Keep the candidates of op `name`, best first."""
        self.name = name
        self.implementations = tuple(implementations)

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str | None]:
        """Per backend, why it cannot take this call (`None`: it can)."""
        return {each.backend: each.refuses(*args, **kwargs) for each in self.implementations}

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that runs this call.

        Args:
            backend: what the caller passed; see `requested`.
            args: the op's arguments.
            kwargs: the op's keyword arguments.

        Returns:
            `triton`, `cpp` or `torch`.

        Raises:
            ValueError: if `backend` is unknown.
            RuntimeError: if the backend asked for cannot take the call, or none can; the message lists the reasons.
        """
        wanted = requested(backend)
        reasons: dict[str, str] = {}
        for each in self.implementations:
            if wanted not in ("auto", each.backend):
                continue
            # Asked in this order since it is asked at every call: refusals take longer to find.
            aside = wanted == "auto" and each.explicit_only(*args, **kwargs)
            reason = "only on request" if aside else each.refuses(*args, **kwargs)
            if reason is None:
                if wanted == "auto" and each.backend == "torch" and "cpp" in reasons and _ext.missing() is not None:
                    _warn_once(f"lora_kernels runs on the plain torch backend: {_ext.missing()}")
                return each.backend
            reasons[each.backend] = reason
        if wanted not in reasons and wanted != "auto":
            raise RuntimeError(f"{self.name} has no {wanted!r} implementation")
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RuntimeError(f"{self.name} cannot run on backend {wanted!r} ({listed})")
