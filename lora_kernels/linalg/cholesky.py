"""Cholesky factors of matrices that are positive definite only up to rounding."""

from __future__ import annotations

import torch


def damped_cholesky(
    matrix: torch.Tensor, damping: float, *, least: float = 0.0, attempts: int = 16, what: str = "matrix"
) -> tuple[torch.Tensor, float]:
    """The Cholesky factor of `M + damping I`, M `(n, n)`, and the damping used; changes the diagonal of M.

    A failure raises the damping tenfold, at least to `least`; after the last attempt it is a ValueError about `what`.
    """
    diagonal = matrix.diagonal()
    plain = diagonal.clone()
    for attempt in range(attempts):
        torch.add(plain, damping, out=diagonal)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not bool(failed):
            return lower, damping
        if attempt + 1 < attempts:
            damping = max(10 * damping, least)
    raise ValueError(f"{what} is not positive definite, even with damping {damping:g}")
