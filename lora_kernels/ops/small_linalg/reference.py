"""The definition of the small dense algebra in plain torch."""

from __future__ import annotations

import torch

# As kSignTie in csrc/eigh_lanes.h. Entries that tie differ by rounding only, which must not decide a sign.
_SIGN_TIE = 0.999


def fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Make one entry per column positive: the first of at least 0.999 times the largest magnitude in it."""
    if vectors.numel() == 0:
        return vectors
    magnitudes = vectors.abs()
    near = magnitudes >= _SIGN_TIE * magnitudes.amax(dim=-2, keepdim=True)
    leader = vectors.gather(-2, near.byte().argmax(dim=-2, keepdim=True))
    return torch.where(leader < 0, -vectors, vectors)


def eigh(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending eigenvalues `(..., n)`, and eigenvectors `(..., n, n)` as columns, of the lower triangle."""
    values, vectors = torch.linalg.eigh(matrices)
    return values, fix_signs(vectors)


def sylvester(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """X `(..., r, k)` of least norm with the least residual of `P X + X Q = R`, P and Q symmetric."""
    p_values, p_vectors = torch.linalg.eigh(p)
    q_values, q_vectors = torch.linalg.eigh(q)
    sums = p_values.unsqueeze(-1) + q_values.unsqueeze(-2)
    largest = p_values.abs().amax(-1) + q_values.abs().amax(-1)
    zero = torch.finfo(p.dtype).eps * max(p.shape[-1], q.shape[-1]) * largest
    singular = sums.abs() <= zero[..., None, None]
    middle = p_vectors.mT @ rhs @ q_vectors / sums.masked_fill(singular, 1)
    solution: torch.Tensor = p_vectors @ middle.masked_fill(singular, 0) @ q_vectors.mT
    return solution


def factor_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The first r singular values of `scaling * B A`, descending, by forming it; zeros behind the min(m, n)-th."""
    values = torch.linalg.svdvals(scaling * (b @ a))[..., : a.shape[-2]]
    return torch.nn.functional.pad(values, (0, a.shape[-2] - values.shape[-1]))
