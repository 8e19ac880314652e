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
# Inner products of columns up to this need no repair: the blocks themselves are no more orthonormal.
_NEGLIGIBLE = {torch.float32: 4e-7, torch.float64: 1e-14}
# Condition number of the next block up to which scaling by a Cholesky factor is enough.
_LOOSE_CONDITION = 1e3


def _scaled(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Well conditioned columns with the span of y, not orthonormal in float32, and y's Gram matrix."""
    product = gram(y)
    _, inverse, failed, condition = factored(product)
    bad = failed | ~(condition <= _LOOSE_CONDITION**2)
    scaled = y @ inverse.mT.to(y.dtype)
    if bool(bad.any()):
        scaled[bad] = orthonormalize(y[bad])[0]
    return scaled, product


def _without(y: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Y minus its projection onto the orthonormal columns of a block."""
    inside = block.mT @ y
    if y.dim() == 2:
        return torch.addmm(y, block, inside, alpha=-1.0)
    return torch.baddbmm(y, block, inside, alpha=-1.0) if y.dim() == 3 else y - block @ inside


def grow(
    apply: Callable[[torch.Tensor, bool], torch.Tensor], first: torch.Tensor, rounds: int, keep: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Alternate products with A^T and A, starting from `first = A x`."""
    # `apply(block, transposed)` multiplies by A or A^T. With `keep` all blocks are kept (block Krylov by Golub-Kahan
    # bidiagonalisation), otherwise only the last. Returns blocks of orthonormal columns, their images under A^T, and
    # the Gram matrices of all images but the last.
    blocks = [orthonormalize(first)[0]]
    images, grams = [apply(blocks[0], True)], []
    for _ in range(rounds):
        direction, product = _scaled(images[-1])
        following = apply(direction, False)
        if keep:
            # `ritz` repairs the overlap that cancellation leaves in float32; in float64 a second pass removes it.
            for block in blocks * (2 if following.dtype == torch.float64 else 1):
                following = _without(following, block)
            grams.append(product)
        else:
            blocks, images = [], []
        blocks.append(orthonormalize(following)[0])
        images.append(apply(blocks[-1], True))
    return blocks, images, grams


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
    """The leading triplets of `Q Q^+ A`, Q the blocks side by side: `(b, p, rank)`, `(b, rank)` and `(b, q, rank)`."""
    # `blocks` `(b, p, c)` have orthonormal columns, nearly orthogonal to those of other blocks; `images` `(b, q, c)`
    # are A^T times the blocks; `grams` are the Gram matrices of the first images, as far as known, float64.
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
