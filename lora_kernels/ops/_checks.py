"""Argument checks shared by ops and their fakes. Every message names the argument, what it was and what it must be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS = (torch.bool, *FLOATS)  # of rows: a selection, or real factors


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Check that an argument is a dense tensor of the given shape, dtype and device.

    Args:
        name: the argument's name, for the message.
        value: the argument.
        shape: expected sizes, `None` for a free one; unchecked if `None`.
        dtypes: the dtypes allowed.
        device: expected device; unchecked if `None`.

    Raises:
        TypeError: if it is no tensor, is sparse, or has another dtype.
        ValueError: if its shape or device is another.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {_names([value.dtype])}, but must be one of {_names(dtypes)}")
    if shape is not None and (
        value.dim() != len(shape)
        or any(want is not None and got != want for got, want in zip(value.shape, shape, strict=True))
    ):
        expected = "(" + ", ".join("*" if each is None else str(each) for each in shape) + ")"
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have shape {expected}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but must be on {device}")


def check_range(
    name: str, value: object, *, low: float | None = None, high: float | None = None, integer: bool = False
) -> None:
    """Check that a number lies in a closed interval.

    Args:
        name: the argument's name, for the message.
        value: the argument.
        low: smallest allowed value, or `None`.
        high: largest allowed value, or `None`.
        integer: whether it must be an `int`.

    Raises:
        TypeError: if it is no number (a bool is none), or no integer where one is needed.
        ValueError: if it is NaN or outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{name} must be {'an int' if integer else 'a number'}, got {type(value).__name__} {value!r}")
    number = float(value)
    inside = not math.isnan(number) and (low is None or number >= low) and (high is None or number <= high)
    if not inside:
        bounds = [f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None)
        raise ValueError(f"{name} is {value!r}, but must be {' and '.join(bounds) or 'a number'}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that an argument is one of a closed list.

    Args:
        name: the argument's name, for the message.
        value: the argument.
        choices: what is allowed.

    Raises:
        ValueError: if it is something else; the message lists the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> None:
    """Check that an argument is a number and not NaN, also while `torch.compile` traces one that it keeps symbolic.

    Args:
        name: the argument's name, for the message.
        value: the argument.

    Raises:
        TypeError: if it is no number (a bool is none).
        ValueError: if it is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if value != value:
        raise ValueError(f"{name} is {value!r}, but must be a number")
