"""The definition of the gradient statistics in plain torch."""

from __future__ import annotations

import torch

from lora_kernels.ops._rows import counted


def weight_gradient(g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """`sum_t w_t g_t x_t^T` `(m, n)` of g `(..., m)`, x `(..., n)`, w `(...)`; rows of weight zero do not count."""
    (left, _), (right, factor) = counted(g, weight), counted(x, weight)
    return left.mT @ (right * factor)


def fisher_diagonal(g: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """`sum_t v_t g_t^2` `(m,)` of g `(..., m)`, v `(...)`; rows of weight zero do not count, whatever they hold."""
    rows, factor = counted(g, weight)
    return (rows.square() * factor).sum(0)
