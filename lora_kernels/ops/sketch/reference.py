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
    """`a @ Omega`.

    Args:
        a: `(..., q)`.
        k: columns of Omega, `(q, k)`.
        seed: of Omega.
        stream: of Omega.
        kind: of Omega.
        dtype: of the arithmetic and the result.

    Returns:
        `(..., k)`.
    """
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
    """`sum_t w_t left_t (right_t^T Omega)` and `sum_t w_t left_t`.

    Rows of weight zero do not count, whatever they hold.

    Args:
        left: `(..., p)`.
        right: `(..., q)`.
        k: columns of Omega, `(q, k)`.
        weight: `(...)` bool or real, or `None` for ones.
        seed: of Omega.
        stream: of Omega.
        kind: of Omega.
        dtype: of the arithmetic and the result.

    Returns:
        The sketch `(p, k)` and the sum `(p,)`.
    """
    one, two = left.reshape(-1, left.shape[-1]).to(dtype), right.reshape(-1, right.shape[-1]).to(dtype)
    if weight is not None:
        flat = weight.reshape(-1)
        keep = flat != 0
        one, two = one[keep] * flat[keep].to(dtype).unsqueeze(-1), two[keep]
    return one.mT @ project(two, k, seed=seed, stream=stream, kind=kind, dtype=dtype), one.sum(0)
