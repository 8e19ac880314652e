"""The definition of the covariance op in plain torch."""

from __future__ import annotations

import torch

from lora_kernels.ops._rows import counted


def covariance(x: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_t w_t x_t x_t^T` `(n, n)` and `sum_t w_t x_t` `(n,)` in float64, without rows of weight zero."""
    rows, factor = counted(x, weight)
    return (rows * factor).mT @ rows, (rows * factor).sum(0)
