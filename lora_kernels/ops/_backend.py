"""Which implementation runs a call: `auto`, `triton`, `cpp` or `torch`.

A backend of an op is asked "can you take this call?" and answers `None` (yes) or the reason why not, in words for the
user. `auto` takes the first that says yes; a backend asked for by name that says no is an error, never a detour.

Plain Python chooses before the registered op is called, so `torch.compile` sees a constant.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels._checks import check_choice
from lora_kernels.ops import _ext

BACKENDS = ("auto", "triton", "cpp", "torch")

# A plain global, so that torch.compile can guard on it.
_override: str | None = None


def _validated(name: str, origin: str) -> str:
    if type(name) is not str or name not in BACKENDS:
        check_choice(origin, name, BACKENDS)
    return name


def requested(backend: str = "auto") -> str:
    """The backend asked for: by the call, else by `use_backend`, else by `LORA_KERNELS_BACKEND`, else auto."""
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
        ValueError: if `name` is not one of `BACKENDS`.
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


# What Triton's authors support; configurations are compiled ahead of time from here on (benchmarks/aot.py).
_LEAST_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.lru_cache(maxsize=64)
def _too_old(device: torch.device) -> str | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _LEAST_CAPABILITY:
        return None
    least = ".".join(map(str, _LEAST_CAPABILITY))
    return f"the Triton kernels need compute capability {least}, and {device} has {'.'.join(map(str, capability))}"


def triton_refuses(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of `device`, or `None` if they can."""
    missing: str | None = _triton_missing()
    if missing is not None:
        return missing
    if device.type == "cuda":
        reason: str | None = _too_old(device)
        return reason
    if device.type == "cpu":
        interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return None if interpreting else "triton runs on CPU tensors only under TRITON_INTERPRET=1"
    return f"no triton kernels for device type {device.type!r}"


def cpp_refuses(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on tensors of `device`, or `None` if they can."""
    if device.type != "cpu":
        return f"the C++ kernels take CPU tensors, not {device.type!r}"
    missing: str | None = _ext.missing()
    return missing


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=6)


class Refused(RuntimeError):
    """No backend that was asked for can take a call; `reasons` says by backend why it cannot."""

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons


@functools.cache
def provider(path: str) -> Callable[..., None]:
    """The function `module:function` below `lora_kernels.ops`, imported when used: Triton may be missing."""
    module, _, name = path.partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(f"lora_kernels.ops.{module}"), name)
    return function


@dataclass(frozen=True)
class Backend:
    """One way to run an op."""

    name: str  # `triton`, `cpp` or `torch`
    refuses: Callable[..., str | None]  # given the op's arguments: why it cannot take them, or `None`
    slower: Callable[..., bool] = lambda *_: False  # likewise: whether `auto` passes over it though it could
    provider: str | Callable[..., Any] = ""  # a name: `module:function` below `lora_kernels.ops`, imported when used

    def __call__(self, *args: Any) -> None:
        """Run the provider."""
        (provider(self.provider) if isinstance(self.provider, str) else self.provider)(*args)


def choose(op: str, backends: Sequence[Backend], requested_by_call: str, args: Sequence[Any]) -> Backend:
    """The first backend (best first) that takes a call, or the one asked for; `Refused` says why none can."""
    wanted = requested(requested_by_call)
    reasons: dict[str, str] = {}
    for backend in backends:
        if wanted not in ("auto", backend.name):
            continue
        # `slower` is the quicker question, and this is asked at every call.
        reason = "only on request" if wanted == "auto" and backend.slower(*args) else backend.refuses(*args)
        if reason is None:
            if wanted == "auto" and backend.name == "torch" and "cpp" in reasons and _ext.missing() is not None:
                _warn_once(f"lora_kernels runs on the plain torch backend: {_ext.missing()}")
            return backend
        reasons[backend.name] = reason
    if not reasons:
        raise Refused(f"{op} has no {wanted!r} implementation", reasons)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise Refused(f"{op} cannot run on backend {wanted!r} ({listed})", reasons)
