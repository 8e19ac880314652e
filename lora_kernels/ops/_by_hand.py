"""Ops that are not an `Op` yet, as the lists of ops take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lora_kernels.ops._backend import Refused
from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops._op import normal, relative_error
from lora_kernels.ops.lora_linear import forms, lora_linear, reference, use_form


class ByHand(NamedTuple):
    """What `Op` knows of an op, under the same names; `backends` are names."""

    name: str
    backends: tuple[str, ...]
    error: Callable[[torch.device, str], float]
    bound: float
    kernel_module: str


def _linear(device: torch.device, backend: str) -> float:
    tensors = normal(device, (97, 70), (33, 70), (33,), (8, 70), (33, 8))
    leaves, exact = ([each.to(dtype).requires_grad_() for each in tensors] for dtype in (torch.float32, torch.float64))
    settings: dict[str, Any] = {"scaling": 0.5, "dropout": Dropout(0.1, 1)}
    y, truth = lora_linear(*leaves, **settings, backend=backend), reference.lora_linear(*exact, **settings)
    results = (y, *torch.autograd.grad(y.sum(), leaves))
    return relative_error(results, (truth, *torch.autograd.grad(truth.sum(), exact)))


def _gemm(device: torch.device, backend: str) -> float:
    reason = forms.gemm_refuses(device, torch.float32)
    if reason is not None:
        raise Refused(reason, {backend: reason})
    with use_form("gemm"):
        return _linear(device, backend)


_BOUND = (97 + 70 + 33 + 8) * torch.finfo(torch.float32).eps
BY_HAND = (
    ByHand("lora_linear", ("triton", "cpp", "torch"), _linear, _BOUND, "lora_kernels.ops.lora_linear.kernel"),
    ByHand("lora_linear gemm", ("triton",), _gemm, _BOUND, "lora_kernels.ops.lora_linear.kernel"),
)
