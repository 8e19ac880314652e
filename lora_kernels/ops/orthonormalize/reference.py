"""The definition of orthonormalisation in plain torch."""

from __future__ import annotations

import torch


def orthonormalize(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The QR decomposition with a nonnegative diagonal of R, by Householder reflections in float64.

    Q is orthonormal whatever the rank of y; where R has a zero on its diagonal the column of Q is one of many.

    Args:
        y: `(..., n, k)` with n >= k.

    Returns:
        Q `(..., n, k)` and the upper triangular R `(..., k, k)`, both float64.
    """
    return householder(y.to(torch.float64))


def householder(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the dtype of y."""
    q, r = torch.linalg.qr(y)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(r.dtype)
    return q * signs.unsqueeze(-2), r * signs.unsqueeze(-1)
