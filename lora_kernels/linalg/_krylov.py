"""Bases of block Krylov iterations, and the singular triplets that they hold."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_kernels.ops.orthonormalize import gram, orthonormalize, times
from lora_kernels.ops.small_linalg import eigh

# Below this share of the largest singular value the squares in a float64 Gram matrix show in a float32 result.
_GRAM_FLOOR = 1e-4
# Basis blocks this far from orthonormal are repaired by a Cholesky factor; farther, dependent directions are dropped.
_REPAIRABLE, _DEPENDENT = 0.3, 1e-2
# Products of columns no larger than this need no repair: the blocks themselves are no better.
_NEGLIGIBLE = {torch.float32: 4e-7, torch.float64: 1e-14}
# Columns of the next block may be this ill conditioned before it is orthonormalised with care.
_LOOSE_CONDITION = 1e3


def _scaled(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns that span y and are well conditioned, which is all that the next product needs; and y's Gram matrix.

    The product with the inverse factor is taken in y's dtype: in float32 it costs orthogonality, not the span.
    """
    product = gram(y)
    lower, info = torch.linalg.cholesky_ex(product)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    condition = product.diagonal(dim1=-2, dim2=-1).sum(-1) * inverse.square().sum((-2, -1))
    bad = (info != 0) | ~(condition <= _LOOSE_CONDITION**2)
    scaled = y @ inverse.mT.to(y.dtype)
    if bool(bad.any()):
        scaled[bad] = orthonormalize(y[bad])[0]
    return scaled, product


def _without(y: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """The part of y orthogonal to the columns of a block."""
    inside = block.mT @ y
    if y.dim() == 2:
        return torch.addmm(y, block, inside, alpha=-1.0)
    return torch.baddbmm(y, block, inside, alpha=-1.0) if y.dim() == 3 else y - block @ inside


def grow(
    apply: Callable[[torch.Tensor, bool], torch.Tensor], first: torch.Tensor, rounds: int, keep: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Alternate products with A^T and A, from the result of a first one with A.

    `apply` multiplies a block by the matrix, or by its transpose if told so; `rounds` pairs of products follow the
    second one; all blocks are kept (block Krylov, by Golub-Kahan bidiagonalisation) or only the last. Returns blocks of
    orthonormal columns, their images under A^T, and the Gram matrices of the images but for the last one.
    """
    blocks = [orthonormalize(first)[0]]
    images, grams = [apply(blocks[0], True)], []
    for _ in range(rounds):
        direction, product = _scaled(images[-1])
        fresh = apply(direction, False)
        if keep:
            # What cancellation leaves of the overlap in float32, `ritz` repairs; float64 has that done here.
            for block in blocks * (2 if fresh.dtype == torch.float64 else 1):
                fresh = _without(fresh, block)
            grams.append(product)
        else:
            blocks, images = [], []
        blocks.append(orthonormalize(fresh)[0])
        images.append(apply(blocks[-1], True))
    return blocks, images, grams


def _careful_ritz(
    basis: torch.Tensor, image: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triplets of one `basis image^T` in float64 without squaring."""
    kept, wide = basis.dtype, basis.to(torch.float64)
    values, vectors = torch.linalg.eigh(gram(wide))
    # Columns that repeat others are noise. As many as one block are independent, and a block has `rank` or more.
    whiten = vectors[:, values > _DEPENDENT] * values[values > _DEPENDENT].rsqrt()
    wide, image = wide @ whiten, image.to(torch.float64) @ whiten
    q, r = orthonormalize(image)
    left, s, right = torch.linalg.svd(r, full_matrices=False)  # image = q left s right
    return (wide @ right.mT[:, :rank]).to(kept), s[:rank].to(kept), (q @ left[:, :rank]).to(kept)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].stride(-1) != 1 and parts[0].stride(-2) == 1:  # products from the left: their columns are contiguous
        return torch.cat([part.mT for part in parts], dim=-2).mT
    return torch.cat(parts, dim=-1)


def _assemble(parts: list[list[torch.Tensor]]) -> torch.Tensor:
    """A symmetric matrix from the blocks of its upper triangle, row by row."""
    count = len(parts)
    rows = [
        torch.cat([parts[i][j - i] if j >= i else parts[j][i - j].mT for j in range(count)], dim=-1)
        for i in range(count)
    ]
    return torch.cat(rows, dim=-2)


def ritz(
    blocks: list[torch.Tensor], images: list[torch.Tensor], grams: list[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading triplets of `Q Q^+ A`, Q the blocks side by side: `(b, p, rank)`, `(b, rank)` and `(b, q, rank)`.

    `blocks` `(b, p, c)` have orthonormal columns, almost orthogonal to those of the others; `images` `(b, q, c)` are
    `A^T` times a block, `grams` their known Gram matrices, float64.
    """
    count = len(blocks)
    batch, _, width = blocks[0].shape
    eye = torch.eye(width * count, dtype=torch.float64, device=blocks[0].device)
    ones = eye[:width, :width].expand(batch, -1, -1)
    overlap = _assemble(
        [[ones] + [(blocks[i].mT @ other).to(torch.float64) for other in blocks[i + 1 :]] for i in range(count)]
    )
    square = _assemble(
        [
            [grams[i] if i < len(grams) else gram(images[i])] + [gram(images[i], other) for other in images[i + 1 :]]
            for i in range(count)
        ]
    )
    basis, image = _side_by_side(blocks), _side_by_side(images)
    difference = (overlap - eye).abs()
    hard = ~(difference.square().sum((-2, -1)) <= _REPAIRABLE**2)
    lower = None
    if not bool((difference <= _NEGLIGIBLE[basis.dtype]).all()):
        overlap[hard] = eye
        # Q C^-T is orthonormal, and image C^-T is what A^T makes of it.
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
