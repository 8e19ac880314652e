"""The definition of orthonormalisation in plain torch."""

from __future__ import annotations

import torch


def orthonormalize(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q `(..., n, k)` and R `(..., k, k)` with a nonnegative diagonal, by Householder reflections in float64.

    Q is orthonormal whatever the rank of y; where R has a zero on its diagonal the column of Q is one of many.
    """
    return householder(y.to(torch.float64))


def householder(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the dtype of y."""
    q, r = torch.linalg.qr(y)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r.dtype)
    return q * signs.unsqueeze(-2), r * signs.unsqueeze(-1)
