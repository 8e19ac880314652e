"""The definition of the covariance op in plain torch."""

from __future__ import annotations

import torch


def covariance(
    x: torch.Tensor, weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_t w_t x_t x_t^T` `(n, n)` and `sum_t w_t x_t` `(n,)`, without rows of weight zero, whatever they hold."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype)
    if weight is None:
        return rows.mT @ rows, rows.sum(0)
    flat = weight.reshape(-1)
    rows, flat = rows[flat != 0], flat[flat != 0].to(dtype)
    weighted = rows * flat.unsqueeze(-1)
    return weighted.mT @ rows, weighted.sum(0)
