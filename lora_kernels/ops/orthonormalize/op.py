"""Orthonormalisation: the Cholesky rounds, and where Householder is the better choice.

There is one backend, torch: the products of a round are bound by the read of y, which no kernel of ours can avoid, as
R is not known before all of y has been read.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, normal, on_torch
from lora_kernels.ops.orthonormalize import reference

_UNIT = 2.0**-53  # of float64
# Bound on the loss of orthogonality of one round that a float32 result does not show (its own rounding is larger).
_SILENT_LOSS = 3e-8
# Columns may leave a round with at most this |Q^T Q - 1| for the next one to finish the work.
_ALMOST = 0.25
# What the slow path accepts from Cholesky before it turns to Householder.
_ORTHOGONAL = 1e-12
# Elements widened to float64 at a time: on the CPU the copy stays in the second-level cache, elsewhere it takes 512 MB.
_CPU_CHUNK, _CHUNK = 1 << 16, 1 << 26


def _blocks(y: torch.Tensor) -> list[tuple[Any, Any]]:
    """Indices of what is widened at a time (matrices of a batch of short ones, or rows of all) and of its matrices."""
    rows, columns = y.shape[-2:]
    copied = y.dtype != torch.float64 and y.device.type == "cpu"
    step = max(128, _CPU_CHUNK // max(1, columns)) if copied else max(rows, 1, _CHUNK // max(1, columns))
    if y.dim() == 3 and step >= rows:
        count = max(1, step // max(1, rows))
        matrices = (slice(low, low + count) for low in range(0, y.shape[0], count))
        return [(some, some) for some in matrices]
    return [((..., slice(low, low + step), slice(None)), ...) for low in range(0, rows, step)]


def gram(y: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """`y^T other` (or `y^T y`), `(..., k, l)`, accumulated in float64."""
    right = y if other is None else other
    total = y.new_zeros((*y.shape[:-2], y.shape[-1], right.shape[-1]), dtype=torch.float64)
    for block, matrices in _blocks(y):
        part = y[block].to(torch.float64)
        total[matrices] += part.mT @ (part if other is None else right[block].to(torch.float64))
    return total


def times(y: torch.Tensor, small: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`y small`, `(..., n, k)` by `(..., k, l)` float64, in float64 arithmetic, rounded to y's dtype, in y's layout."""
    if y.dtype == torch.float64:
        return torch.matmul(y, small, out=out)
    # With columns in one piece the product from the left is several times faster on the CPU.
    turned = y.shape[-1] > 1 and y.stride(-1) != 1 and y.stride(-2) == 1
    left = small.mT.contiguous() if turned else small
    if out is None:
        shape = (*y.shape[:-2], small.shape[-1], y.shape[-2]) if turned else (*y.shape[:-1], small.shape[-1])
        out = y.new_empty(shape).mT if turned else y.new_empty(shape)
    for block, matrices in _blocks(y):
        wide = y[block].to(torch.float64)
        out[block] = (left[matrices] @ wide.mT).mT if turned else wide @ small[matrices]
    return out


def factored(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cholesky factors of `y^T y`, their inverses, flags of bad pivots, and a bound on the condition of y, squared."""
    lower, info = torch.linalg.cholesky_ex(product)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    condition = product.diagonal(dim1=-2, dim2=-1).sum(-1) * inverse.square().sum((-2, -1))
    return lower, inverse, info != 0, condition


def _round(
    y: torch.Tensor, shift: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One Cholesky round: the new columns, R, the flags of bad pivots, and a bound on the condition of y, squared."""
    product = gram(y)
    if shift is not None:
        product = product + torch.diag_embed(shift.unsqueeze(-1).expand(product.shape[:-1]))
    lower, inverse, bad, condition = factored(product)
    return times(y, inverse.mT, out), lower.mT, bad, condition


def _defect(q: torch.Tensor) -> torch.Tensor:
    """Largest `|Q^T Q - 1|` of a matrix; NaN where it holds one."""
    product = gram(q)
    product.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return product.abs().amax((-2, -1))


def _careful(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices for which two plain rounds were not enough: shifted Cholesky, two rounds more, else Householder."""
    wide = y.to(torch.float64)
    scale = wide.abs().amax(-2, keepdim=True)  # columns of any length: squares neither overflow nor vanish
    scale = torch.where(scale > 0, scale, 1.0)
    wide = wide / scale
    rows, columns = wide.shape[-2:]
    shift = 11.0 * (rows * columns + columns * (columns + 1)) * _UNIT * wide.square().sum((-2, -1))
    q, total, failed, _ = _round(wide, shift)
    for _ in range(2):
        q, r, bad, _ = _round(q)
        total, failed = r @ total, failed | bad
    index = (failed | ~(_defect(q) <= _ORTHOGONAL)).nonzero().squeeze(-1)
    if index.numel() > 0:
        q[index], total[index] = reference.orthonormalize(wide[index])
    return q.to(y.dtype), (total * scale).to(y.dtype)


def _householder_is_faster(y: torch.Tensor) -> bool:
    # On a CPU 1.4 to 4 times, in float64, for 16 to 64 columns. In float32 LAPACK's QR is faster for a few columns too,
    # but loses a digit of orthogonality on long ones. On GPUs it is far slower.
    return y.device.type == "cpu" and y.dtype == torch.float64


def _run(q: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> None:
    """Fill Q and R of `(b, n, k)` float32 or float64."""
    if _householder_is_faster(y):
        basis, triangle = _householder(y)
        q.copy_(basis)
        r.copy_(triangle)
    else:
        r.copy_(_cholesky(q, y))


def _householder(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LAPACK's QR of `(b, n, k)`."""
    q, r = reference.householder(y)
    # Q too: LAPACK loses a NaN at the head of the last column, and R is finite.
    finite = torch.isfinite(r.sum((-2, -1))) & torch.isfinite(q.sum((-2, -1)))
    if not bool(finite.all()):
        finite = torch.isfinite(y).all(-1).all(-1)  # else the sum alone overflows
        if not bool(finite.all()):
            raise ValueError(f"matrix {int((~finite).nonzero()[0])} of y holds NaN or infinite entries")
        # Lengths of columns overflow: Q does not depend on their scale, and what R cannot hold is infinite.
        index = (
            (~(torch.isfinite(q) & torch.isfinite(r.sum(-2, keepdim=True))).flatten(-2).all(-1)).nonzero().squeeze(-1)
        )
        scale = y[index].abs().amax(-2, keepdim=True)
        scale = torch.where(scale > 0, scale, 1.0)
        q[index], r[index] = reference.householder(y[index] / scale)
        r[index] = (r[index] * scale).triu()
    return q, r


def _cholesky(q: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cholesky rounds on `(b, n, k)` float32 or float64: fills Q, returns R."""
    narrow = y.dtype == torch.float32
    _, total, failed, condition = _round(y, out=q)
    # In float64 one round leaves |Q^T Q - 1| <= u cond^2: nothing that a float32 result could show, mostly.
    open_ = ~(condition * (y.shape[-1] * _UNIT) <= _SILENT_LOSS) | failed
    if not narrow or bool(open_.any()):
        index: Any = open_.nonzero().squeeze(-1) if narrow else slice(None)
        part = q[index]
        defect = _defect(part)
        second, r, bad, _ = _round(part)
        bad = bad | ~(defect <= _ALMOST) | failed[index]
        q[index], total[index] = second, r @ total[index]
        if bool(bad.any()):
            hard = index[bad] if narrow else bad.nonzero().squeeze(-1)
            finite = torch.isfinite(y[hard]).all(-1).all(-1)
            if not bool(finite.all()):
                raise ValueError(f"matrix {int(hard[~finite][0])} of y holds NaN or infinite entries")
            fixed, triangle = _careful(y[hard])
            q[hard], total[hard] = fixed, triangle.to(total.dtype)
    return total


def _body(backend: Backend, q: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> None:
    if y.numel() > 0:
        matrices = y.to(q.dtype).reshape(-1, *y.shape[-2:])
        backend(q.view(matrices.shape), r.view(-1, *r.shape[-2:]), matrices)


columns = Op("orthonormalize", _body, writes=("q", "r"), backends=(on_torch(_run),))


def orthonormalize(y: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal columns Q that span y, and the triangular R with `y = Q R`, for a batch of tall matrices.

    CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015): `G = y^T y = R^T R`, `Q = y R^-1`, twice, with
    Gram matrix, factor and product in float64. For float32 results the second round is left out for the matrices of
    the batch whose condition number (bounded by `|R|_F |R^-1|_F`) shows that it could not change a float32 digit.
    A matrix whose Gram matrix has a bad pivot, or whose columns are still not orthogonal after the two rounds, is
    done again by itself: columns scaled, Gram matrix shifted by `11 (n k + k (k + 1)) u |y|_F^2`, and two rounds
    after it (shifted CholeskyQR3, Fukaya et al. 2020); if that does not give orthonormal columns either (y is
    rank-deficient or zero) Householder QR in float64 answers for that matrix. So Q is always orthonormal; where y
    is rank-deficient the surplus columns of Q are arbitrary and belong to a (near) zero on the diagonal of R.
    On the CPU, LAPACK's Householder QR answers at once where it is faster: in float64.
    Not differentiable. One synchronisation with the device per round.

    Args:
        y: `(..., n, k)`, n >= k, float16, bfloat16, float32 or float64; 16-bit is widened to float32.
        backend: `auto` or `torch`, the only one.

    Returns:
        Q `(..., n, k)`, and R `(..., k, k)`, upper triangular with nonnegative diagonal; float64 for float64 input,
        else float32. `|Q^T Q - 1|` stays below 1e-6 (float32; measured 1e-8 to 1e-7) and 1e-13 (float64).

    Raises:
        TypeError: on another dtype.
        ValueError: on fewer rows than columns, or NaN or infinite entries; the message has the matrix' index.
        RuntimeError: if the backend asked for does not exist.
    """
    check_tensor("y", y, form="(..., n, k)")
    if y.shape[-2] < y.shape[-1]:
        raise ValueError(f"y has shape {tuple(y.shape)}, but must have at least as many rows as columns")
    dtype, k = torch.promote_types(y.dtype, torch.float32), y.shape[-1]
    q, r = y.new_empty(y.shape, dtype=dtype), y.new_empty((*y.shape[:-2], k, k), dtype=dtype)
    columns(backend, q, r, y)
    return q, r


@columns.self_test(terms=97)
def _example(device: torch.device) -> Example:
    (y,) = normal(device, (3, 97, 20))

    def error(result: tuple[torch.Tensor, torch.Tensor]) -> float:
        q, r = (factor.double() for factor in result)
        eye = torch.eye(20, dtype=torch.float64, device=device)
        return float(torch.linalg.norm(q @ r - y) / torch.linalg.norm(y) + (q.mT @ q - eye).abs().max())

    return {"y": y}, error
