"""The leading singular triplets of large matrices from a few products with random blocks, batched over one shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_kernels.ops._checks import FLOATS, check_choice, check_range, check_tensor
from lora_kernels.ops.orthonormalize import gram, orthonormalize, times
from lora_kernels.ops.random_matrix import random_matrix
from lora_kernels.ops.small_linalg import eigh as small_eigh

METHODS = ("krylov", "subspace")
# The a-posteriori bounds hold with at least this probability.
CONFIDENCE = 0.999
# Below this share of the largest singular value the squares in a float64 Gram matrix show in a float32 result.
_GRAM_FLOOR = 1e-4
# Basis blocks this far from orthonormal are repaired by a Cholesky factor; farther, dependent directions are dropped.
_REPAIRABLE, _DEPENDENT = 0.3, 1e-2


@dataclass(frozen=True)
class RandomizedSVD:
    """The leading singular triplets of each matrix of a batch, `A ~ U diag(S) Vh`.

    Attributes:
        U: `(..., m, rank)`, orthonormal columns; the entry of largest magnitude of each is positive.
        S: `(..., rank)`, descending.
        Vh: `(..., rank, n)`, orthonormal rows.
        error: `(...)`, an upper bound on the spectral norm of `A - U diag(S) Vh` that holds with probability
            `CONFIDENCE` for each matrix, or `None` where no probes were drawn.
        method: `krylov`, `subspace`, `two_sided`, or `direct` where the basis would have been as large as the matrix
            and the full decomposition answered instead.
        products: how many block products with the matrix or its transpose were spent.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    error: torch.Tensor | None = None
    method: str = ""
    products: int = 0


@dataclass(frozen=True)
class LinearOperator:
    """A matrix, or a batch of them, known by its products.

    Attributes:
        shape: `(..., m, n)`.
        matmul: `(..., n, k)` to `A x`, `(..., m, k)`; must also take a block without the leading sizes.
        rmatmul: `(..., m, k)` to `A^T y`, `(..., n, k)`.
        dtype: of the blocks that both get, float32 or float64.
        device: of these blocks.
    """

    shape: tuple[int, ...]
    matmul: Callable[[torch.Tensor], torch.Tensor]
    rmatmul: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


def fix_pair(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the entry of largest magnitude of each column of u positive, and turn v's column with it.

    Args:
        u: `(..., m, k)`.
        v: `(..., n, k)`.

    Returns:
        Both.
    """
    largest = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, v * signs


def probe_bound(residuals: torch.Tensor) -> torch.Tensor:
    """An upper bound on the spectral norm of E from the products of E with independent gaussian vectors.

    `|E| <= alpha sqrt(2 / pi) max_i |E w_i|` but for a probability of `alpha^-p` (Halko, Martinsson and Tropp 2011,
    eq. 4.3); alpha is chosen so that this is `1 - CONFIDENCE` whatever p, so more probes make it tighter.

    Args:
        residuals: `(..., m, p)`, `E w_i` as columns.

    Returns:
        `(...)`, in the dtype of the residuals.
    """
    alpha = (1.0 - CONFIDENCE) ** (-1.0 / residuals.shape[-1])
    return torch.linalg.vector_norm(residuals, dim=-2).amax(-1) * (alpha * math.sqrt(2.0 / math.pi))


def _operator(a: torch.Tensor) -> LinearOperator:
    # 16-bit matrices are widened once: their products with a 16-bit block would round what the iteration lives on.
    wide = a.detach().to(torch.float64 if a.dtype == torch.float64 else torch.float32)
    batch = wide.shape[:-2]

    def matmul(x: torch.Tensor) -> torch.Tensor:
        if batch and x.dim() == 2 and wide.is_contiguous():  # one block for all: one product
            return (wide.flatten(0, -2) @ x).unflatten(0, wide.shape[:-1])
        return wide @ x

    return LinearOperator(tuple(wide.shape), matmul, lambda y: wide.mT @ y, wide.dtype, wide.device)


def _check_operator(a: LinearOperator) -> None:
    if a.dtype not in FLOATS[2:]:
        raise TypeError(f"the operator's dtype is {a.dtype}, but must be float32 or float64")
    if len(a.shape) < 2:
        raise ValueError(f"the operator's shape is {tuple(a.shape)}, but must be (..., m, n)")


def _name_bad_matrix(a: torch.Tensor | LinearOperator, product: torch.Tensor) -> None:
    """A NaN or infinite entry spoils a row of the first product, which is far smaller than the matrix."""
    if bool(torch.isfinite(product).all()):
        return
    where = a if isinstance(a, torch.Tensor) else product
    finite = torch.isfinite(where).flatten(-2).all(-1).reshape(-1)
    if bool(finite.all()):
        raise ValueError("a times a random block overflows: scale a down")
    what = "a" if where is a else "the product with a"
    raise ValueError(f"matrix {int((~finite).nonzero()[0])} of {what} holds NaN or infinite entries")


class _Counted:
    """The products of an operator, checked and counted; odd steps are with the transpose."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.count = operator, 0

    def __call__(self, block: torch.Tensor, transposed: bool) -> torch.Tensor:
        self.count += 1
        call, rows = (
            (self.operator.rmatmul, self.operator.shape[-1])
            if transposed
            else (self.operator.matmul, self.operator.shape[-2])
        )
        product = call(block)
        expected = (*self.operator.shape[:-2], rows, block.shape[-1])
        if tuple(product.shape) != expected or product.dtype != block.dtype:
            name = "rmatmul" if transposed else "matmul"
            raise ValueError(
                f"{name} returned {product.dtype} {tuple(product.shape)}, but must return {block.dtype} {expected}"
            )
        return product


def _mix(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat((left, right), dim=-1)


def _grow(
    apply: _Counted, first: torch.Tensor, transposed: bool, products: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate products and orthonormalisation.

    Args:
        apply: the products.
        first: the result of the first one.
        transposed: whether the second product is with the transpose.
        products: how many products in all, even.
        keep: whether the blocks of one side are kept (block Krylov, by Golub-Kahan bidiagonalisation) or only the last.

    Returns:
        Basis and its image under the last kind of product, both `(..., rows, columns)`.
    """
    basis = orthonormalize(first)[0]
    image = apply(basis, transposed)
    blocks, images = basis, image
    for _ in range(products // 2 - 1):
        fresh = apply(orthonormalize(image)[0], not transposed)
        if keep:
            # Cancellation leaves parts along the old blocks that the final small factor removes.
            for _ in range(2):
                fresh = fresh - blocks @ (blocks.mT @ fresh)
        basis = orthonormalize(fresh)[0]
        image = apply(basis, transposed)
        blocks = _mix(blocks, basis) if keep else basis
        images = _mix(images, image) if keep else image
    return blocks, images


def _careful_ritz(
    basis: torch.Tensor, image: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The triplets of one `basis image^T` in float64 without squaring."""
    kept, wide = basis.dtype, basis.to(torch.float64)
    values, vectors = small_eigh(gram(wide))
    # Columns that repeat others are noise. As many as one block are independent, and a block has `rank` or more.
    whiten = vectors[:, values > _DEPENDENT] * values[values > _DEPENDENT].rsqrt()
    wide, image = wide @ whiten, image.to(torch.float64) @ whiten
    q, r = orthonormalize(image)
    left, s, right = torch.linalg.svd(r, full_matrices=False)  # image = q left s right
    return (wide @ right.mT[:, :rank]).to(kept), s[:rank].to(kept), (q @ left[:, :rank]).to(kept)


def _ritz(basis: torch.Tensor, image: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading triplets of `basis basis^+ A`, `image = A^T basis`.

    Args:
        basis: `(b, p, c)`, almost orthonormal columns.
        image: `(b, q, c)`.
        rank: how many.

    Returns:
        `(b, p, rank)`, `(b, rank)` and `(b, q, rank)`.
    """
    overlap, square = gram(basis), gram(image)
    deviation = overlap - torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
    hard = ~(deviation.square().sum((-2, -1)) <= _REPAIRABLE**2)
    if bool(hard.any()):
        overlap[hard] = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
    # basis C^-T is orthonormal, and image C^-T is what A^T makes of it.
    lower = torch.linalg.cholesky(overlap)
    half = torch.linalg.solve_triangular(lower, square, upper=False)
    reduced = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    values, rotation = (
        small_eigh((reduced + reduced.mT) / 2)
        if reduced.shape[-1] <= 128
        else torch.linalg.eigh((reduced + reduced.mT) / 2)
    )
    values, rotation = values[..., -rank:].flip(-1), rotation[..., -rank:].flip(-1)
    rotation = torch.linalg.solve_triangular(lower.mT, rotation, upper=True)
    s = values.clamp_min(0).sqrt()
    u = basis @ rotation.to(basis.dtype)
    v = times(image, rotation / s.clamp_min(torch.finfo(s.dtype).tiny).unsqueeze(-2))
    hard = hard | ~(s[..., -1] > (_GRAM_FLOOR * s[..., 0] if basis.dtype == torch.float32 else torch.inf))
    s = s.to(basis.dtype)
    for index in hard.nonzero().flatten().tolist():
        u[index], s[index], v[index] = _careful_ritz(basis[index], image[index], rank)
    return u, s, v


def _direct(operator: LinearOperator, apply: _Counted, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *batch, m, n = operator.shape
    identity = torch.eye(min(m, n), dtype=operator.dtype, device=operator.device).expand(*batch, -1, -1)
    a = apply(identity, False) if n <= m else apply(identity, True).mT
    u, s, vh = torch.linalg.svd(a.to(torch.float64), full_matrices=False)
    return (
        u[..., :rank].to(operator.dtype),
        s[..., :rank].to(operator.dtype),
        vh[..., :rank, :].mT.to(operator.dtype),
    )


def randomized_svd(
    a: torch.Tensor | LinearOperator,
    rank: int,
    *,
    oversample: int | None = None,
    n_iter: int | None = None,
    method: str = "krylov",
    probes: int = 8,
    seed: int = 0,
    stream: int = 0,
) -> RandomizedSVD:
    """The `rank` leading singular triplets from `2 n_iter + 2` products with blocks of `rank + oversample` columns.

    `subspace` (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) keeps the last block of the iteration,
    `krylov` (Musco and Musco 2015, algorithm 2, by Golub-Kahan bidiagonalisation with full orthogonalisation) all of
    them, which for the same products gives a far smaller error. Both orthonormalise after every product and take the
    Ritz triplets from the last images, so no further product is spent on them. All arithmetic is that of float32
    products (float64 for float64 input) with float64 Gram matrices. The matrices of a batch share the random block, so
    a matrix gives the same triplets alone and in a batch, up to rounding. Not differentiable.

    Args:
        a: `(..., m, n)` float16, bfloat16, float32 or float64; 16-bit is widened to a float32 copy. Or a
            `LinearOperator`.
        rank: number of triplets, 1 <= rank <= min(m, n).
        oversample: extra columns of the block; by default 8 for `subspace` and `max(20, rank / 2)` for `krylov`.
        n_iter: rounds of two products after the first two; by default 2 for `subspace` and 1 for `krylov`, whose error
            is then the smaller one.
        method: `krylov` or `subspace`.
        probes: gaussian vectors for the bound on the error; 0 for none.
        seed: 64-bit key of the random block: the same seed gives the same bits.
        stream: which block (a layer, say), in [0, 2^32).

    Returns:
        The triplets, in float32 (float64 for float64), and the bound. Where the basis, `(n_iter + 1)` blocks, would
        not fit `min(m, n)` the decomposition is complete and `method` says `direct`.

    Raises:
        TypeError: if `a` is neither a float tensor nor an operator.
        ValueError: if a number is out of range, or a matrix holds NaN or infinite entries; the message has its index.
    """
    if isinstance(a, LinearOperator):
        operator = a
        _check_operator(a)
    else:
        check_tensor("a", a)
        if a.dim() < 2:
            raise ValueError(f"a has shape {tuple(a.shape)}, but must be (..., m, n)")
        operator = _operator(a)
    *batch, m, n = operator.shape
    check_range("rank", rank, low=1, high=min(m, n), integer=True)
    check_choice("method", method, METHODS)
    krylov = method == "krylov"
    extra = (max(20, rank // 2) if krylov else 8) if oversample is None else oversample
    rounds = (1 if krylov else 2) if n_iter is None else n_iter
    check_range("oversample", extra, low=0, integer=True)
    check_range("n_iter", rounds, low=0, integer=True)
    check_range("probes", probes, low=0, integer=True)
    width = rank + extra
    direct = width * (rounds + 1 if krylov else 1) > min(m, n)
    columns = (0 if direct else width) + probes
    drawn = random_matrix(n, columns, kind="gaussian", seed=seed, stream=stream, device=operator.device)
    drawn = drawn.to(operator.dtype)
    apply = _Counted(operator)
    if math.prod(batch) == 0:
        u, s, v = (drawn.new_empty(*batch, *size) for size in ((m, rank), (rank,), (n, rank)))
        return RandomizedSVD(u, s, v.mT, drawn.new_empty(batch) if probes else None, method, 0)
    # The bound's products share the pass over a with the first block.
    first = apply(drawn, False) if columns else drawn.new_empty(*batch, m, 0)
    _name_bad_matrix(a, first)
    if direct:
        u, s, v = _direct(operator, apply, rank)
        _name_bad_matrix(a, s.unsqueeze(-1))
    else:
        basis, image = _grow(apply, first[..., :width].contiguous(), True, 2 * rounds + 2, krylov)
        flat = basis.reshape(-1, m, basis.shape[-1]), image.reshape(-1, n, image.shape[-1])
        u, s, v = _ritz(*flat, rank)
        u, s, v = u.reshape(*batch, m, rank), s.reshape(*batch, rank), v.reshape(*batch, n, rank)
    error = None
    if probes:
        test = drawn[:, columns - probes :]
        error = probe_bound(first[..., columns - probes :] - (u * s.unsqueeze(-2)) @ (v.mT @ test))
    u, v = fix_pair(u, v)
    return RandomizedSVD(u, s, v.mT, error, "direct" if direct else method, apply.count)
