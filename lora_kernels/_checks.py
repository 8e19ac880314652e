"""Argument checks shared by ops and their fakes. Every message names the argument, what it was and what it must be."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS = (torch.bool, *FLOATS)  # of rows: a selection, or real factors


def repr_short(value: object) -> str:
    """A value in a message: short, and nothing that could itself fail (a number of 5000 digits, say) or take long."""
    if isinstance(value, torch.Tensor):
        return "a tensor"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  (whatever a foreign object does)
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _has_address(value: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one with numbers in memory."""
    return (
        type(value).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and (value.is_cpu or value.is_cuda)
        and value.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._is_zerotensor(value)
    )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(sizes) != len(shape):
        return False
    for got, want in zip(sizes, shape, strict=True):  # noqa: SIM110  (asked at every call, where a generator takes longer)
        if want is not None and got != want:
            return False
    return True


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
    numbers: bool = False,
    contiguous: str = "",
    form: str = "",
) -> None:
    """Raise unless an argument is a dense tensor.

    `None` in `shape` is any size, `numbers` refuses the meta device, `contiguous` is `rows` or `all`, and `form`, as
    "(..., n)", names the axes that there must be.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {_names([value.dtype])}, but must be one of {_names(dtypes)}")
    if shape is not None and not _fits(value.shape, shape):
        expected = "(" + ", ".join("*" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have shape {expected}")
    if value.dim() < form.count(","):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must be {form}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but must be on {device}")
    if contiguous == "rows" and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} has strides {value.stride()}, but its rows must be contiguous")
    if contiguous == "all" and not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}, but must be contiguous")
    if numbers and value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, but must hold numbers")
    # Memory that was given back (`untyped_storage().resize_(0)`): reading it would end the process.
    if not torch.compiler.is_compiling() and _has_address(value) and value.data_ptr() == 0:
        raise ValueError(f"{name} has no memory: its storage was freed")


def check_written(name: str, value: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """Raise unless a tensor can be written in place: no two elements in one place, no input there, no gradient."""
    if torch.compiler.is_compiling():
        return
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which writing in place would spoil")
    if value.is_neg():
        raise ValueError(
            f"{name} is a view that negates, into which nothing can be written: resolve_neg() makes a copy"
        )
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < extent:
            raise ValueError(f"{name} has strides {value.stride()}: elements share memory, but each must have its own")
        extent += (size - 1) * stride
    for other, tensor in inputs.items():
        if tensor is not None and _overlap(value, tensor):
            raise ValueError(f"{name} and {other} share memory, but {name} is written while {other} is read")


def _overlap(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors surely share memory: where both are in one piece; columns of one matrix may lie apart."""
    if not (_has_address(one) and _has_address(two)) or one.device != two.device:
        return False
    first, second = one.data_ptr(), two.data_ptr()
    if first == second:
        return True
    whole = one.is_contiguous() and two.is_contiguous()
    return whole and first < second + two.nbytes and second < first + one.nbytes


def as_device(name: str, value: object) -> torch.device:
    """A device that exists here, from a `torch.device` or a name."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(
            f"{name} must be a torch.device or the name of one, got {type(value).__name__} {repr_short(value)}"
        )
    try:
        device = torch.device(value)
        if not torch.compiler.is_compiling():
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ValueError(f"{name} is {repr_short(value)}, but must be a device of this machine: {reason}") from None
    return device


def _too_large(value: float) -> bool:
    """Whether an integer is beyond all floats."""
    return type(value) is int and not -(2**1023) <= value <= 2**1023


def check_range(
    name: str,
    value: object,
    *,
    low: float | None = None,
    high: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raise unless an argument is a number (not a bool, not NaN) in a closed interval, or `None` where it may be."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(
            f"{name} must be {'an int' if integer else 'a number'}, got {type(value).__name__} {repr_short(value)}"
        )
    inside = not math.isnan(value) if isinstance(value, float) else integer or not _too_large(value)
    if not (inside and (low is None or value >= low) and (high is None or value <= high)):
        bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
        raise ValueError(f"{name} is {repr_short(value)}, but must be {' and '.join(bounds) or 'a number'}")


def check_positive(name: str, value: object, high: float = sys.float_info.max) -> None:
    """Raise unless an argument is a number above 0, and finite or at most `high`."""
    check_range(name, value)
    if not 0 < value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, but must be above 0 and finite")


def check_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise unless an argument is of a type; `expected` says in words what it must be."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__} {repr_short(value)}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise unless an argument is one of a closed list, which the message gives."""
    # By type first: what a tensor or an array makes of a comparison is no answer.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} is {repr_short(value)}, but must be one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> None:
    """Raise unless an argument is a number and not NaN, also where `torch.compile` keeps it symbolic."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {repr_short(value)}")
    if value != value or _too_large(value):
        raise ValueError(f"{name} is {repr_short(value)}, but must be a number that a float can hold")
