"""What an optimizer of pairs is given: checks of groups, pairs and numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels._checks import check_range, check_tensor
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.training.lora_pro.shards import Layout

Scaling = float | Callable[[], float]
Place = tuple[int, int]  # number of the group, and of the parameter in it


@dataclass(frozen=True)
class Pair:
    """Where a pair stands in an optimizer's groups.

    By place and not by identity: wrappers (accelerate with FSDP2) exchange the parameters of a finished optimizer.
    """

    a: Place
    b: Place
    scaling: Scaling  # s, or a function that says what it is now

    def current_scaling(self, name: str) -> float:
        """The scaling as it is now, finite and not zero."""
        value = float(self.scaling() if callable(self.scaling) else self.scaling)
        if value == 0.0 or not math.isfinite(value):
            raise ValueError(f"scaling of {name} is {value!r}, but must be finite and not zero")
        return value


def check_pair(name: str, a: Any, b: Any) -> None:
    """Check that two parameters, A `(r, n)` and B `(m, r)`, can be the factors of a pair."""
    check_tensor(f"A of {name}", a, shape=(None, None))
    check_tensor(f"B of {name}", b, shape=(None, a.shape[0]), dtypes=(a.dtype,), device=a.device)
    if a is b:
        raise ValueError(f"A and B of {name} are the same parameter, but must be two")
    if min(*a.shape, *b.shape) == 0:
        raise ValueError(f"{name} has the shapes {tuple(a.shape)} and {tuple(b.shape)}, but no size may be 0")
    if is_sharded(a) != is_sharded(b) or Layout.of(a) != Layout.of(b):
        raise ValueError(f"A and B of {name} must be sharded alike, or both be whole")


def check_options(group: dict[str, Any]) -> None:
    """Check lr, betas, eps and weight_decay of a parameter group."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        check_tensor("lr", lr, numbers=True)
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}, but must be a number or a tensor of one element")
        lr = float(lr)
    check_range("lr", lr, low=0.0, high=sys.float_info.max)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}, but must be two numbers")
    for index, beta in enumerate(betas):
        check_range(f"betas[{index}]", beta, low=0.0, high=1.0)
        if beta == 1.0:
            raise ValueError(f"betas[{index}] is {beta!r}, but must be below 1")
    check_range("eps", group["eps"], low=0.0, high=sys.float_info.max)
    check_range("weight_decay", group["weight_decay"], low=0.0, high=sys.float_info.max)


def check_scalings(scaling: Any, count: int) -> list[Scaling]:
    """One scaling (a number, or a function that returns one) per pair, from one or a sequence of them."""
    scalings = list(scaling) if isinstance(scaling, Sequence) else [scaling] * count
    if len(scalings) != count:
        raise ValueError(f"scaling has {len(scalings)} entries, but must be one number or one per pair ({count})")
    for value in scalings:
        if callable(value):
            continue
        check_range("scaling", value, low=-sys.float_info.max, high=sys.float_info.max)
        if value == 0:
            raise ValueError("scaling is 0, but must not be: such a pair never learns")
    return scalings


def check_gradient(name: str, gradient: torch.Tensor) -> None:
    """Check that a gradient is dense."""
    if gradient.layout != torch.strided:
        raise ValueError(f"the gradient of {name} has layout {gradient.layout}, but LoraPro needs dense gradients")
