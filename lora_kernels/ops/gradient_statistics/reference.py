"""The definition of the gradient statistics in plain torch."""

from __future__ import annotations

import torch


def _counted(rows: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = rows.shape[:-1].numel()
    flat = torch.ones(tokens, device=rows.device) if weight is None else weight.reshape(-1)
    return flat != 0, flat[flat != 0].to(dtype).unsqueeze(-1)


def weight_gradient(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`sum_t w_t g_t x_t^T` `(m, n)` of g `(..., m)`, x `(..., n)`, w `(...)`; rows of weight zero do not count."""
    keep, factor = _counted(g, weight, dtype)
    left, right = (side.reshape(keep.numel(), side.shape[-1])[keep].to(dtype) for side in (g, x))
    return left.mT @ (right * factor)


def fisher_diagonal(
    g: torch.Tensor, weight: torch.Tensor | None = None, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`sum_t v_t g_t^2` `(m,)` of g `(..., m)`, v `(...)`; rows of weight zero do not count, whatever they hold."""
    keep, factor = _counted(g, weight, dtype)
    return (g.reshape(keep.numel(), g.shape[-1])[keep].to(dtype).square() * factor).sum(0)


def fisher_scaled(
    gradient: torch.Tensor,
    fisher: torch.Tensor,
    *,
    scale: float,
    damping: float,
    power: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`scale * G[i, :] / (f[i] + damping)^power` `(m, n)`."""
    return scale * gradient.to(dtype) / (fisher.to(dtype) + damping).pow(power).unsqueeze(-1)
