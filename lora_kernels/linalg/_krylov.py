"""Bases of block Krylov iterations, and their Ritz triplets."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_kernels.ops.orthonormalize import factored, gram, orthonormalize, times
from lora_kernels.ops.small_linalg import eigh

# Singular values below this share of the largest lose float32 accuracy in a float64 Gram matrix.
_GRAM_FLOOR = 1e-4
# Up to this distance from orthonormal a Cholesky factor repairs a basis; beyond it, dependent columns are dropped.
_REPAIRABLE, _DEPENDENT = 0.3, 1e-2
# Inner products of columns up to this need no repair.
_NEGLIGIBLE = {torch.float32: 4e-7, torch.float64: 1e-14}
# Condition number of the next block up to which scaling by a Cholesky factor is enough.
_LOOSE_CONDITION = 1e3
# Columns of a Gram matrix that are computed at a time: of wider ones nearly half is known by symmetry.
_STRIP = 64


def _scaled(y: torch.Tensor) -> torch.Tensor:
    """Well conditioned columns with the span of y, orthonormal to about 1e-4 in float32."""
    _, inverse, failed, condition = factored(gram(y))
    bad = failed | ~(condition <= _LOOSE_CONDITION**2)
    scaled = y @ inverse.mT.to(y.dtype)
    if bool(bad.any()):
        scaled[bad] = orthonormalize(y[bad])[0]
    return scaled


def _without(y: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Y minus its projection onto the orthonormal columns of a block."""
    inside = block.mT @ y
    if y.dim() == 2:
        return torch.addmm(y, block, inside, alpha=-1.0)
    return torch.baddbmm(y, block, inside, alpha=-1.0) if y.dim() == 3 else y - block @ inside


def grow(
    product: Callable[..., torch.Tensor], first: torch.Tensor, rounds: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Blocks of nearly orthonormal columns from `first = A x` on, and their images under A^T."""
    # What the columns lack, and the overlap of blocks that cancellation leaves in float32, `ritz` repairs.
    blocks = [_scaled(first)]
    images = [product(blocks[0], transposed=True)]
    for _ in range(rounds):
        following = product(_scaled(images[-1]), transposed=False)
        # In float64 a second pass removes the overlap.
        for block in blocks * (2 if following.dtype == torch.float64 else 1):
            following = _without(following, block)
        blocks.append(_scaled(following))
        images.append(product(blocks[-1], transposed=True))
    return blocks, images


def _careful_ritz(
    basis: torch.Tensor, image: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triplets of one `basis image^T` in float64, without squaring the image."""
    dtype, wide = basis.dtype, basis.to(torch.float64)
    values, vectors = torch.linalg.eigh(gram(wide))
    # Dependent columns are dropped. The independent ones are at least a block, which has `rank` columns or more.
    whiten = vectors[:, values > _DEPENDENT] * values[values > _DEPENDENT].rsqrt()
    wide, image = wide @ whiten, image.to(torch.float64) @ whiten
    q, r = orthonormalize(image)
    left, s, right = torch.linalg.svd(r, full_matrices=False)  # image = q left s right
    return (wide @ right.mT[:, :rank]).to(dtype), s[:rank].to(dtype), (q @ left[:, :rank]).to(dtype)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].stride(-1) != 1 and parts[0].stride(-2) == 1:  # columns are contiguous
        return torch.cat([part.mT for part in parts], dim=-2).mT
    return torch.cat(parts, dim=-1)


def _wide_gram(y: torch.Tensor) -> torch.Tensor:
    """`y^T y` in float64 for many columns, by rows of blocks of the upper triangle."""
    size = y.shape[-1]
    product = torch.empty(*y.shape[:-2], size, size, dtype=torch.float64, device=y.device)
    for low in range(0, size, _STRIP):
        strip = slice(low, low + _STRIP)
        rows = gram(y[..., strip], y[..., low:])
        product[..., strip, low:] = rows
        product[..., low:, strip] = rows.mT
    return product


def ritz(
    blocks: list[torch.Tensor], images: list[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading triplets of `Q Q^+ A`, Q the blocks side by side: `(b, p, rank)`, `(b, rank)` and `(b, q, rank)`."""
    # `blocks` `(b, p, c)` have nearly orthonormal columns, nearly orthogonal to those of other blocks; `images`
    # `(b, q, c)` are A^T times the blocks.
    basis, image = _side_by_side(blocks), _side_by_side(images)
    overlap, square = (basis.mT @ basis).to(torch.float64), _wide_gram(image)
    eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    difference = (overlap - eye).abs()
    hard = ~(difference.square().sum((-2, -1)) <= _REPAIRABLE**2)
    lower = None
    if not bool((difference <= _NEGLIGIBLE[basis.dtype]).all()):
        overlap[hard] = eye
        # Q C^-T is orthonormal, and A^T Q C^-T = image C^-T.
        lower = torch.linalg.cholesky(overlap)
        half = torch.linalg.solve_triangular(lower, square, upper=False)
        square = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    values, rotation = eigh((square + square.mT) / 2)
    values, rotation = values[..., -rank:].flip(-1), rotation[..., -rank:].flip(-1)
    if lower is not None:
        rotation = torch.linalg.solve_triangular(lower.mT, rotation, upper=True)
    s = values.clamp_min(0).sqrt()
    u = basis @ rotation.to(basis.dtype)
    v = times(image, rotation / s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2))
    hard = hard | ~(s[..., -1] > (_GRAM_FLOOR * s[..., 0] if basis.dtype == torch.float32 else torch.inf))
    s = s.to(basis.dtype)
    for index in hard.nonzero().flatten().tolist():
        u[index], s[index], v[index] = _careful_ritz(basis[index], image[index], rank)
    return u, s, v
