"""The definition of the sketch ops in plain torch."""

from __future__ import annotations

import torch

from lora_kernels.ops.random_matrix import reference as random_reference


def project(
    a: torch.Tensor,
    k: int,
    *,
    seed: int,
    stream: int = 0,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`a @ Omega` `(..., k)`."""
    omega = random_reference.random_matrix(a.shape[-1], k, kind, seed=seed, stream=stream, dtype=dtype)
    return a.to(dtype) @ omega.to(a.device)


def sketch(
    left: torch.Tensor,
    right: torch.Tensor,
    k: int,
    weight: torch.Tensor | None = None,
    *,
    seed: int,
    stream: int = 0,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_t w_t left_t (right_t^T Omega)` `(p, k)` and `sum_t w_t left_t` `(p,)`; rows of weight zero do not count."""
    tokens = left.shape[:-1].numel()
    one, two = (rows.reshape(tokens, rows.shape[-1]).to(dtype) for rows in (left, right))
    if weight is not None:
        flat = weight.reshape(-1)
        keep = flat != 0
        one, two = one[keep] * flat[keep].to(dtype).unsqueeze(-1), two[keep]
    return one.mT @ project(two, k, seed=seed, stream=stream, kind=kind, dtype=dtype), one.sum(0)
