"""Cholesky factors of matrices that are positive definite only up to rounding."""

from __future__ import annotations

import torch


def damped_cholesky(
    matrices: torch.Tensor,
    damping: torch.Tensor | float,
    *,
    least: float = 0.0,
    attempts: int = 16,
    what: str = "matrix",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Cholesky factors of `M + damping I`, M `(..., n, n)`, and the damping used, `(...)`; changes the diagonals.

    Where a factorisation fails, its damping is raised tenfold, at least to `least`. After the last attempt a ValueError
    says that `what` is not positive definite.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    plain = diagonal.clone()
    damping = torch.as_tensor(damping, dtype=matrices.dtype, device=matrices.device).expand(matrices.shape[:-2])
    for attempt in range(attempts):
        torch.add(plain, damping.unsqueeze(-1), out=diagonal)
        lower, info = torch.linalg.cholesky_ex(matrices)
        failed = info != 0
        if not bool(failed.any()):
            return lower, damping
        if attempt + 1 < attempts:
            damping = torch.where(failed, (10 * damping).clamp_min(least), damping)
    raise ValueError(f"{what} is not positive definite, even with damping {float(damping[failed].max()):g}")
