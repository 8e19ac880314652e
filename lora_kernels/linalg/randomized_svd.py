"""The leading singular triplets of large matrices from a few products with random blocks, batched over one shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_kernels._checks import FLOATS, check_range, check_tensor
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.orthonormalize.op import factored, gram, orthonormalize, times
from lora_kernels.ops.random_matrix.op import check_key, random_matrix
from lora_kernels.ops.small_linalg.op import eigh

# The a-posteriori bounds hold with at least this probability.
CONFIDENCE = 0.999
# On CPUs, matrices of up to this many elements are transposed by a product from the left (measured: 0.4 to 0.7 of the
# time of the other form at 1024 x 1024 and 512 x 512, 1.4 to 1.9 at 2048 x 5504).
_ROWWISE = 1 << 21
# Blocks have a multiple of this many columns: the width of vendors' float32 kernels.
_LANES = 16
# Up to this rank the default is two rounds with `rank` columns; above it, three rounds with half as many.
_WIDE_RANK = 24
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


@dataclass(frozen=True)
class RandomizedSVD:
    """The leading singular triplets of a batch of matrices, `A ~ U diag(S) Vh`.

    Attributes:
        U: `(..., m, rank)`, orthonormal columns; the entry of largest magnitude of each is positive.
        S: `(..., rank)`, descending.
        Vh: `(..., rank, n)`, orthonormal rows.
        error: `(...)`, an upper bound on the spectral norm of `A - U diag(S) Vh` that holds with probability
            `CONFIDENCE` per matrix; infinite without probes.
        method: `krylov`, `two_sided`, or `direct` (the full decomposition, as the basis would have been as large as the
            matrix).
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    error: torch.Tensor
    method: str


@dataclass(frozen=True)
class LinearOperator:
    """A matrix, or a batch of matrices, given by its products.

    Attributes:
        shape: `(..., m, n)`.
        matmul: x `(..., n, k)` to `A x` `(..., m, k)`; must also accept x without the leading sizes.
        rmatmul: y `(..., m, k)` to `A^T y` `(..., n, k)`.
        dtype: of x and y, float32 or float64.
        device: of x and y.
    """

    shape: tuple[int, ...]
    matmul: Callable[[torch.Tensor], torch.Tensor]
    rmatmul: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


def fix_pair(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the entry of largest magnitude of each column of u `(..., m, k)` positive, with v `(..., n, k)` to match."""
    largest = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, v * signs


def probe_bound(residuals: torch.Tensor) -> torch.Tensor:
    """An upper bound `(...)` on the spectral norm of E from its products `(..., m, p)` with gaussian vectors."""
    # `|E| <= alpha sqrt(2 / pi) max_i |E w_i|` with probability `1 - alpha^-p` (Halko, Martinsson and Tropp 2011, eq.
    # 4.3); alpha is chosen for `CONFIDENCE`, so that more probes make the bound tighter.
    alpha = (1.0 - CONFIDENCE) ** (-1.0 / residuals.shape[-1])
    # In float64, where squares of float32 numbers neither overflow nor underflow.
    longest = torch.linalg.vector_norm(residuals, dim=-2, dtype=torch.float64).amax(-1)
    bound: torch.Tensor = longest * (alpha * math.sqrt(2.0 / math.pi))
    return bound.to(residuals.dtype)


def dense_operator(a: torch.Tensor) -> LinearOperator:
    """A tensor as an operator; 16-bit tensors are widened, since 16-bit products would lose the small directions."""
    wide = a.detach().to(torch.float64 if a.dtype == torch.float64 else torch.float32)
    rowwise = wide.device.type == "cpu" and wide.shape[-2] * wide.shape[-1] <= _ROWWISE

    def rmatmul(y: torch.Tensor) -> torch.Tensor:
        return (y.mT @ wide).mT if rowwise else wide.mT @ y

    return LinearOperator(tuple(wide.shape), lambda x: wide @ x, rmatmul, wide.dtype, wide.device)


def _block_plan(rank: int, n_iter: int | None) -> tuple[int, int]:
    """Columns of the block and number of rounds of `randomized_svd`."""
    # The defaults are the cheapest with a smaller error than subspace iteration with 8 extra columns and 2 rounds, on
    # spectra `1 / i` and `exp(-i / 50)`, ranks 16 and 64.
    rounds = (2 if rank <= _WIDE_RANK else 3) if n_iter is None else n_iter
    # The basis has rounds + 1 blocks: three times the rank with two rounds, twice the rank with three.
    wanted = {0: 2 * rank, 1: rank + 16, 2: rank if rank <= _WIDE_RANK else 3 * rank // 4}.get(rounds, rank // 2)
    return -(-max(wanted, -(-rank // (rounds + 1)) + 4) // _LANES) * _LANES, rounds


def _name_bad_matrix(a: torch.Tensor | LinearOperator, product: torch.Tensor) -> None:
    """Raise if the first product shows that a matrix has NaN or infinite entries; it is smaller than the matrix."""
    # The sum is cheaper than a test of all entries, which decides if the sum overflows.
    if bool(torch.isfinite(product.sum())) or bool(torch.isfinite(product).all()):
        return
    where = a if isinstance(a, torch.Tensor) else product
    finite = torch.isfinite(where).flatten(-2).all(-1).reshape(-1)
    if bool(finite.all()):
        raise ValueError("a times a random block overflows: scale a down")
    what = "a" if where is a else "the product with a"
    raise ValueError(f"matrix {int((~finite).nonzero()[0])} of {what} holds NaN or infinite entries")


def _product(operator: LinearOperator, block: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    name, size = ("rmatmul", -1) if transposed else ("matmul", -2)
    product: torch.Tensor = getattr(operator, name)(block)
    expected = (*operator.shape[:-2], operator.shape[size], block.shape[-1])
    if tuple(product.shape) != expected or product.dtype != block.dtype:
        raise ValueError(
            f"{name} returned {product.dtype} {tuple(product.shape)}, but must return {block.dtype} {expected}"
        )
    return product


def _direct(
    a: torch.Tensor | LinearOperator, operator: LinearOperator, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *batch, m, n = operator.shape
    identity = torch.eye(min(m, n), dtype=operator.dtype, device=operator.device).expand(*batch, -1, -1)
    product = _product(operator, identity, transposed=m < n)
    dense = product.mT if m < n else product
    _name_bad_matrix(a, dense)
    u, s, vh = torch.linalg.svd(dense.to(torch.float64), full_matrices=False)
    u, s, v = (factor[..., :rank].to(operator.dtype) for factor in (u, s, vh.mT))
    return u, s, v


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


def _grow(
    product: Callable[..., torch.Tensor], first: torch.Tensor, rounds: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Blocks of nearly orthonormal columns from `first = A x` on, and their images under A^T."""
    # What the columns lack, and the overlap of blocks that cancellation leaves in float32, `_ritz` repairs.
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


def _ritz(
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


@without_autocast()
def randomized_svd(
    a: torch.Tensor | LinearOperator, rank: int, *, n_iter: int | None = None, probes: int = 8, seed: int = 0
) -> RandomizedSVD:
    """The `rank` leading singular triplets from `2 n_iter + 2` products with random blocks.

    Block Krylov (Musco and Musco 2015, algorithm 2, by Golub-Kahan bidiagonalisation with full orthogonalisation):
    columns are made nearly orthonormal after every product, and the Ritz triplets of all `n_iter + 1` blocks come from
    their last images, without a further product. Products are in float32 (float64 for float64 input), Gram matrices in
    float64. The matrices of a batch share the random block, so a matrix has the same triplets alone and in a batch, up
    to rounding. Not differentiable.

    Args:
        a: `(..., m, n)` float16, bfloat16, float32 or float64; 16-bit is widened to a float32 copy. Or a
            `LinearOperator`.
        rank: number of triplets, 1 <= rank <= min(m, n).
        n_iter: rounds of two products after the first two; by default 2 up to rank 24 and 3 above. A block has `rank`
            columns with two rounds and half as many with three, rounded up to 16.
        probes: gaussian vectors for the bound on the error; 0 for none.
        seed: 64-bit key of the random block: the same seed gives the same bits.

    Returns:
        The triplets, in float32 (float64 for float64), and the bound. If the basis would exceed `min(m, n)`, the full
        decomposition is computed, and `method` is `direct`.

    Raises:
        TypeError: if `a` is neither a float tensor nor an operator, or a numeric argument is not a number.
        ValueError: if a number is out of range, or a matrix holds NaN or infinite entries; the message has its index.
    """
    if not isinstance(a, LinearOperator):
        check_tensor("a", a, numbers=True)
    elif a.dtype not in FLOATS[2:]:
        raise TypeError(f"the operator's dtype is {a.dtype}, but must be float32 or float64")
    if len(a.shape) < 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, but must be (..., m, n)")
    operator = a if isinstance(a, LinearOperator) else dense_operator(a)
    *batch, m, n = operator.shape
    check_range("rank", rank, low=1, high=min(m, n), integer=True)
    check_range("n_iter", n_iter, low=0, integer=True, optional=True)
    check_range("probes", probes, low=0, integer=True)
    check_key(seed)
    width, rounds = _block_plan(rank, n_iter)
    direct = width * (rounds + 1) > min(m, n)
    width = 0 if direct else width
    # A block of random signs is as good as a gaussian one and cheaper; the bound needs gaussian numbers.
    start = random_matrix(n, width, kind="rademacher", seed=seed, device=operator.device)
    test = random_matrix(n, probes, kind="gaussian", seed=seed, step=1, device=operator.device)
    drawn = torch.cat((start, test), dim=-1).to(operator.dtype)
    if math.prod(batch) == 0:
        u, s, v = (drawn.new_empty(*batch, *size) for size in ((m, rank), (rank,), (n, rank)))
        return RandomizedSVD(u, s, v.mT, drawn.new_empty(batch), "krylov")
    # The probes share the pass over a with the first block.
    first = _product(operator, drawn, transposed=False) if width + probes else drawn.new_empty(*batch, m, 0)
    _name_bad_matrix(a, first)
    if direct:
        u, s, v = _direct(a, operator, rank)
    else:
        parts = _grow(functools.partial(_product, operator), first[..., :width].contiguous(), rounds)
        blocks, images = ([part.reshape(-1, *part.shape[-2:]) for part in group] for group in parts)
        u, s, v = _ritz(blocks, images, rank)
        u, s, v = u.reshape(*batch, m, rank), s.reshape(*batch, rank), v.reshape(*batch, n, rank)
    error = s.new_full(batch, math.inf)
    if probes:
        error = probe_bound(first[..., width:] - (u * s.unsqueeze(-2)) @ (v.mT @ drawn[:, width:]))
    u, v = fix_pair(u, v)
    return RandomizedSVD(u, s, v.mT, error, "direct" if direct else "krylov")
