"""The definition of the small dense algebra in plain torch."""

from __future__ import annotations

import torch


def fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Make the entry of largest magnitude of each column positive (the first of equals).

    Args:
        vectors: `(..., n, k)`.

    Returns:
        The columns, each multiplied by 1 or -1.
    """
    if vectors.numel() == 0:
        return vectors
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def eigh(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenpairs of symmetric matrices, of which the lower triangle is read.

    Args:
        matrices: `(..., n, n)` float32 or float64.

    Returns:
        Values `(..., n)`, ascending, and vectors `(..., n, n)` as columns, signs fixed.
    """
    values, vectors = torch.linalg.eigh(matrices)
    return values, fix_signs(vectors)
