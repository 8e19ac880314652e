"""What a variant of PEFT's LoRA can add to an adapter's product in the fused layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Extension(NamedTuple):
    """More rank of an adapter: `+ ((x right^T) * coordinates) left^T + s sign (x A0^T) B0^T`, x not dropped.

    A variant whose forward is `base(x) + s B A drop(x)` and such parts says so by a method `fused(layer, adapter)`
    that returns them.
    """

    coordinates: torch.Tensor | None  # `(k,)`, not scaled by s; `None` without LoRA-Dash
    left: torch.Tensor | None = None  # `(m, k)`, or `None` before the coordinates have directions
    right: torch.Tensor | None = None  # `(k, n)`, without a gradient, or `None` as `left`
    # A0 `(r, n)`, B0 `(m, r)`, without gradients, and the sign; or `None`.
    start: tuple[torch.Tensor, torch.Tensor, float] | None = None


class _Tied(torch.autograd.Function):
    """The first argument, and a gradient of exactly zero for the second."""

    @staticmethod
    def forward(value: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG004
        ctx.size, ctx.dtype = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return g, g.new_zeros(ctx.size, dtype=ctx.dtype)


def tied(value: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """`value`, in whose graph the coordinates get a gradient of exactly zero."""
    # DistributedDataParallel waits for the gradients of all parameters, also those of coordinates without directions.
    result: torch.Tensor = _Tied.apply(value, coordinates) if coordinates.requires_grad else value  # type: ignore[no-untyped-call]
    return result
