"""Top-k eigenpairs of symmetric matrices, batched over matrices of one shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels._checks import check_range, check_tensor
from lora_kernels.linalg.randomized_svd import LinearOperator
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.orthonormalize.op import orthonormalize
from lora_kernels.ops.random_matrix.op import check_key
from lora_kernels.ops.random_matrix.reference import random_matrix
from lora_kernels.ops.small_linalg.op import eigh as small_eigh
from lora_kernels.ops.small_linalg.reference import fix_signs

# Up to this order a full decomposition costs less than the iteration (measured: k = 32, float64, 2 CPU cores).
DIRECT_ORDER = 600
# The order of the matrix must be at least this many times the size of the Krylov basis.
_BASIS_SHARE = 3
_SMALL_ORDER = 128
# Extra columns of the block: more need fewer rounds, which cost more.
_OVERSAMPLE = 8
# Rounds before the full decomposition is computed instead.
_MAX_ROUNDS = 6


@dataclass(frozen=True)
class TopEigenpairs:
    """The k largest eigenpairs of a batch of matrices.

    Attributes:
        values: `(..., k)`, descending.
        vectors: `(..., n, k)`, orthonormal columns with the signs of `ops.eigh`.
        residuals: `(...)`, the largest `||S v - lambda v||` over the k pairs, relative to the largest `|lambda|`.
        method: `direct` (full decomposition), `krylov`, or `krylov+direct` if the iteration did not converge and the
            full decomposition was computed instead.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residuals: torch.Tensor
    method: str


def _direct(matrices: torch.Tensor | LinearOperator, k: int, method: str) -> TopEigenpairs:
    if isinstance(matrices, LinearOperator):
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        dense = matrices.matmul(identity)
        matrices = (dense + dense.mT) / 2
    # The small solver fixes all signs; above its sizes only those of the k requested columns are fixed.
    solve = small_eigh if matrices.shape[-1] <= _SMALL_ORDER else torch.linalg.eigh
    values, vectors = solve(matrices)
    values, vectors = values[..., -k:].flip(-1), fix_signs(vectors[..., -k:].flip(-1))
    return TopEigenpairs(values, vectors, _residuals(matrices @ vectors, values, vectors), method)


def _residuals(image: torch.Tensor, values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    error = torch.linalg.vector_norm(image - vectors * values.unsqueeze(-2), dim=-2).amax(-1)
    scale = values.abs().amax(-1)
    return torch.where(scale > 0, error / scale.clamp_min(torch.finfo(scale.dtype).tiny), error)


def _orthonormalize(block: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    # Two projections are enough (Giraud, Langou, Rozloznik 2005): the second removes the rounding of the first.
    for _ in range(2):
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        block = orthonormalize(block)[0]  # on a GPU products, where Householder QR would loop over the batch
    return block


@without_autocast()
def eigh_topk(
    matrices: torch.Tensor | LinearOperator, k: int, *, tolerance: float = 1e-9, seed: int = 0
) -> TopEigenpairs:
    """The k largest eigenpairs of symmetric matrices by a thick-restarted block Krylov iteration.

    Every round grows the orthonormal basis `[V, S V, S^2 V, ...]` from a block of `k + 8` columns and computes the Ritz
    pairs of the whole basis (Musco and Musco 2015, arXiv 1504.05477, section 3; restart as in Wu and Simon 2000), until
    `||S v - lambda v|| <= tolerance * lambda_1` for all k pairs. Products are batched. Small matrices, and a k that is
    a large share of n, get the full decomposition, which is cheaper; so do those that six rounds do not solve.

    Args:
        matrices: `(..., n, n)` symmetric, both triangles valid. float16/bfloat16/float32 are computed in float64. Or a
            symmetric float64 `LinearOperator`: the full decomposition multiplies it with the identity.
        k: number of pairs, 1 <= k <= n.
        tolerance: relative residual at which a pair counts as converged.
        seed: Philox key of the starting block: the same seed gives the same bits.

    Returns:
        The pairs in float64.

    Raises:
        TypeError: if `matrices` is neither a float tensor nor a float64 operator, or a numeric argument is not a
            number.
        ValueError: if it is not square, k is out of range, or an entry is NaN or infinite.
    """
    if not isinstance(matrices, LinearOperator):
        check_tensor("matrices", matrices, numbers=True)
    elif matrices.dtype != torch.float64:
        raise TypeError(f"the operator's dtype is {matrices.dtype}, but must be float64")
    if len(matrices.shape) < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}, but must be square in its last two sizes")
    n = matrices.shape[-1]
    check_range("k", k, low=1, high=n, integer=True)
    check_range("tolerance", tolerance, low=0.0)
    check_key(seed)
    if isinstance(matrices, LinearOperator):
        device, apply = matrices.device, matrices.matmul
    else:
        if not bool(torch.isfinite(matrices).all()):
            raise ValueError("matrices holds NaN or infinite entries")
        matrices = matrices.to(torch.float64)
        device, apply = matrices.device, matrices.__matmul__
    block = k + _OVERSAMPLE
    if n <= DIRECT_ORDER or block * _BASIS_SHARE * 3 > n:
        return _direct(matrices, k, "direct")
    depth = max(2, min(8, n // (_BASIS_SHARE * block) - 1))  # blocks that a round adds to the first one

    start = apply(random_matrix(n, block, "gaussian", seed=seed).to(device))
    if not bool(torch.isfinite(start).all()):
        raise ValueError("the product with matrices holds NaN or infinite entries")
    vectors = _orthonormalize(start, None)
    image = apply(vectors)
    previous = float("inf")
    for remaining in reversed(range(_MAX_ROUNDS)):
        bases, images = [vectors], [image]
        for _ in range(depth):
            basis = torch.cat(bases, dim=-1)
            bases.append(_orthonormalize(images[-1], basis))
            images.append(apply(bases[-1]))
        basis, image = torch.cat(bases, dim=-1), torch.cat(images, dim=-1)
        projected = basis.mT @ image
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        values, rotation = values[..., -block:].flip(-1), rotation[..., -block:].flip(-1)
        vectors, image = basis @ rotation, image @ rotation
        residual = torch.linalg.vector_norm(image - vectors * values.unsqueeze(-2), dim=-2)[..., :k].amax(-1)
        worst = float((residual / values[..., 0].abs().clamp_min(torch.finfo(values.dtype).tiny)).max())
        if worst <= tolerance:
            values, vectors = values[..., :k], fix_signs(vectors[..., :k])
            return TopEigenpairs(values, vectors, _residuals(apply(vectors), values, vectors), "krylov")
        if worst * min(1.0, worst / previous) ** remaining > tolerance and previous < float("inf"):
            break  # at this rate the remaining rounds will not converge: the spectrum does not decay
        previous = worst
    return _direct(matrices, k, "krylov+direct")
