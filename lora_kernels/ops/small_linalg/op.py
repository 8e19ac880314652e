"""Eigenpairs, Cholesky factors and solves, and Sylvester equations of small matrices."""

from __future__ import annotations

import torch

from lora_kernels._checks import check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, normal, on_torch
from lora_kernels.ops.small_linalg import drivers, reference
from lora_kernels.ops.small_linalg.drivers import on_compiled


def _eigh_torch(values: torch.Tensor, vectors: torch.Tensor, flat: torch.Tensor) -> None:
    drivers.raise_first(drivers.not_finite(flat.tril()))
    pairs = reference.eigh(flat)  # where it does not converge, torch's error names the matrix
    values.copy_(pairs[0])
    vectors.copy_(pairs[1])


def _eigh_compiled(values: torch.Tensor, vectors: torch.Tensor, flat: torch.Tensor) -> None:
    drivers.raise_first(drivers.run("eigh", (flat, values, vectors), flat.shape[:2]))
    if flat.device.type != "cpu":
        vectors.copy_(reference.fix_signs(vectors))


def _eigh(backend: Backend, values: torch.Tensor, vectors: torch.Tensor, matrices: torch.Tensor) -> None:
    if matrices.numel() > 0:
        backend(values.view(-1, values.shape[-1]), drivers.room(vectors), drivers.dense(matrices))


eigenpairs = Op(
    "eigh",
    _eigh,
    writes=("values", "vectors"),
    backends=(
        on_compiled(_eigh_compiled, lambda _values, _vectors, a: (a, a.shape[-1]), "eigh", op="eigh"),
        on_torch(_eigh_torch),
    ),
)


def eigh(matrices: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenpairs of a batch of symmetric matrices.

    On the CPU tridiagonalisation and implicit QL (Golub and Van Loan, section 8.3), one matrix per vector lane, in
    float64 throughout; on the GPU Jacobi rotations (section 8.5), one matrix per block; LAPACK or cuSOLVER through
    torch where those win. Not differentiable.

    Args:
        matrices: `(..., n, n)` float32 or float64; the lower triangle is read.
        backend: `auto`, `cpp` (C++ on the CPU up to n = 128, CUDA as far as shared memory goes) or `torch`.

    Returns:
        Values `(..., n)`, ascending, and vectors `(..., n, n)` as columns; of the entries of each vector that come
        within 0.1 % of its largest magnitude, the first is positive.

    Raises:
        TypeError: on another dtype.
        ValueError: on a shape that is not square, or a matrix with NaN or infinite entries; the message has its index.
        RuntimeError: if the iteration does not converge, or the backend asked for cannot take the call.
    """
    drivers.check_square("matrices", matrices)
    values, vectors = matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)
    eigenpairs(backend, values, vectors, matrices)
    return values, vectors


@eigenpairs.self_test(terms=12 * 12, dtype=torch.float64)
def _eigh_example(device: torch.device) -> Example:
    (a,) = normal(device, (20, 12, 12), dtype=torch.float64)
    a = a + a.mT

    def error(result: tuple[torch.Tensor, torch.Tensor]) -> float:
        values, vectors = result
        return float(torch.linalg.norm(a @ vectors - vectors * values.unsqueeze(-2)) / torch.linalg.norm(a))

    return {"matrices": a}, error


def _factors_torch(flat: torch.Tensor) -> torch.Tensor:
    factors: torch.Tensor
    factors, info = torch.linalg.cholesky_ex(flat)
    broken = drivers.not_finite(flat.tril())
    # LAPACK gives 0, or the order of the first minor that is not positive.
    drivers.raise_first(torch.where(broken > 0, broken, torch.where(info > 0, info + (drivers.NOT_POSITIVE - 1), 0)))
    return factors


def _cholesky(backend: Backend, out: torch.Tensor, matrices: torch.Tensor) -> None:
    if matrices.numel() > 0:
        backend(drivers.room(out), drivers.dense(matrices))


factor = Op(
    "cholesky",
    _cholesky,
    writes=("out",),
    backends=(
        on_compiled(
            lambda out, flat: drivers.raise_first(drivers.run("cholesky", (flat, out), flat.shape[:2])),
            lambda _out, a: (a, a.shape[-1]),
            "cholesky",
        ),
        on_torch(lambda out, flat: out.copy_(_factors_torch(flat))),
    ),
)


def cholesky(matrices: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Cholesky factors `L` of a batch of symmetric positive definite matrices, `matrices = L L^T`.

    Left-looking on the CPU (Golub and Van Loan, section 4.2), one matrix per vector lane, in float64 throughout;
    right-looking on the GPU, one matrix per block. Not differentiable.

    Args:
        matrices: `(..., r, r)` float32 or float64; the lower triangle is read.
        backend: `auto`, `cpp` (C++ on the CPU up to r = 128, CUDA as far as shared memory goes) or `torch`.

    Returns:
        `(..., r, r)`, lower triangular with a positive diagonal, zero above it.

    Raises:
        TypeError: on another dtype.
        ValueError: on a shape that is not square, or a matrix that is not positive definite or holds NaN or infinite
            entries; the message has its index.
        RuntimeError: if the backend asked for cannot take the call.
    """
    drivers.check_square("matrices", matrices)
    out = matrices.new_empty(matrices.shape)
    factor(backend, out, matrices)
    return out


def definite(device: torch.device) -> list[torch.Tensor]:
    """Two batches of positive definite matrices and right-hand sides, for self-tests."""
    p, q, rhs = normal(device, (20, 12, 12), (20, 7, 7), (20, 12, 7), dtype=torch.float64)
    return [root @ root.mT + torch.eye(root.shape[-1], device=device) for root in (p, q)] + [rhs]


@factor.self_test(terms=12 * 12, dtype=torch.float64)
def _cholesky_example(device: torch.device) -> Example:
    p = definite(device)[0]
    return {"matrices": p}, lambda factors: float(torch.linalg.norm(factors @ factors.mT - p) / torch.linalg.norm(p))


def _solve_compiled(out: torch.Tensor, flat: torch.Tensor, rhs: torch.Tensor) -> None:
    if flat.device.type == "cpu":
        drivers.run("cholesky_solve", (flat, rhs, out), rhs.shape)
        return
    factors = torch.empty_like(flat)
    status = drivers.run("cholesky", (flat, factors), flat.shape[:2])
    if rhs.numel() > 0:
        drivers.run("cholesky_substitute", (factors, rhs, out), rhs.shape, reports=False)
    drivers.raise_first(status)


def _cholesky_solve(backend: Backend, out: torch.Tensor, matrices: torch.Tensor, rhs: torch.Tensor) -> None:
    if matrices.numel() > 0:
        backend(drivers.room(out), drivers.dense(matrices), drivers.dense(rhs))


solution = Op(
    "cholesky_solve",
    _cholesky_solve,
    writes=("out",),
    backends=(
        on_compiled(_solve_compiled, lambda _out, a, _rhs: (a, a.shape[-1]), "cholesky"),
        on_torch(lambda out, flat, rhs: out.copy_(torch.cholesky_solve(rhs, _factors_torch(flat)))),
    ),
)


def cholesky_solve(matrices: torch.Tensor, rhs: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Solutions of `matrices X = rhs` for a batch of symmetric positive definite matrices, by `cholesky`.

    Unlike `torch.cholesky_solve` this takes the matrices, not their factors. Not differentiable.

    Args:
        matrices: `(..., r, r)` float32 or float64; the lower triangle is read.
        rhs: `(..., r, c)`, same batch shape, dtype and device. Entries that are NaN or infinite stay in their column.
        backend: as for `cholesky`.

    Returns:
        `(..., r, c)`.

    Raises:
        TypeError: on another dtype.
        ValueError: on shapes or devices that do not match, or a matrix that is not positive definite or holds NaN or
            infinite entries; the message has its index.
        RuntimeError: if the backend asked for cannot take the call.
    """
    drivers.check_square("matrices", matrices)
    shape = (*matrices.shape[:-1], None)
    check_tensor("rhs", rhs, shape=shape, dtypes=(matrices.dtype,), device=matrices.device)
    out = rhs.new_empty(rhs.shape)
    solution(backend, out, matrices, rhs)
    return out


def _residual(product: torch.Tensor, rhs: torch.Tensor, size: torch.Tensor, x: torch.Tensor) -> float:
    """Backward error of solutions, which does not depend on the condition."""
    return float(torch.linalg.norm(product - rhs) / (size * torch.linalg.norm(x)))


@solution.self_test(terms=12 * 12, dtype=torch.float64)
def _solve_example(device: torch.device) -> Example:
    p, _, rhs = definite(device)
    size = torch.linalg.matrix_norm(p, 2).max()
    return {"matrices": p, "rhs": rhs}, lambda x: _residual(p @ x, rhs, size, x)


def _sylvester_torch(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> None:
    drivers.raise_first(drivers.not_finite(p.tril(), q.tril(), rhs))
    out.copy_(reference.sylvester(p, q, rhs))


def _sylvester_compiled(out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> None:
    if rhs.device.type == "cpu":
        drivers.run("sylvester", (p, q, rhs, out), rhs.shape)
        return
    tensors, statuses = [], []
    for flat in (p, q):
        values, vectors = flat.new_empty(flat.shape[:-1]), torch.empty_like(flat)
        statuses.append(drivers.run("eigh", (flat, values, vectors), flat.shape[:2]))
        tensors += [values, vectors]
    statuses.append(drivers.run("sylvester_rotate", (*tensors, rhs, out), rhs.shape))
    drivers.raise_first(*statuses)


def _sylvester(backend: Backend, out: torch.Tensor, p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> None:
    if rhs.numel() > 0:
        backend(drivers.room(out), drivers.dense(p), drivers.dense(q), drivers.dense(rhs))


equation = Op(
    "sylvester",
    _sylvester,
    writes=("out",),
    backends=(
        on_compiled(
            _sylvester_compiled, lambda _, p, q, rhs: (p, max(rhs.shape[-2:])), "eigh", "sylvester", op="sylvester"
        ),
        on_torch(_sylvester_torch),
    ),
)


def sylvester(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Solutions of `P X + X Q = R` with symmetric P and Q, for a batch of problems.

    With `P = U_p diag(p) U_p^T` and `Q = U_q diag(q) U_q^T`,
    `X = U_p [ (U_p^T R U_q)_ij / (p_i + q_j) ] U_q^T` (docs/methods/lora_pro.md). Where
    `|p_i + q_j| <= eps * max(r, k) * (max |p| + max |q|)`, eps that of the dtype, the equation does not determine the
    coefficient, and it is zero: of all X with the least residual, this is the one of least Frobenius norm. A zero P or
    Q is therefore fine, and P = Q = 0 gives X = 0. Not differentiable.

    Args:
        p: `(..., r, r)` float32 or float64, positive semidefinite in the intended use; the lower triangle is read.
        q: `(..., k, k)`, likewise; same batch shape, dtype and device.
        rhs: `(..., r, k)`.
        backend: `auto`, `cpp` (C++ on the CPU up to r, k = 128, CUDA as far as shared memory goes) or `torch`.

    Returns:
        X, `(..., r, k)`.

    Raises:
        TypeError: on another dtype.
        ValueError: on shapes or devices that do not match, or a problem with NaN or infinite entries; the message has
            its index.
        RuntimeError: if the eigenproblems do not converge, or the backend asked for cannot take the call.
    """
    drivers.check_square("p", p)
    drivers.check_square("q", q)
    batch, k = p.shape[:-2], q.shape[-1]
    check_tensor("q", q, shape=(*batch, k, k), dtypes=(p.dtype,), device=p.device)
    check_tensor("rhs", rhs, shape=(*batch, p.shape[-1], k), dtypes=(p.dtype,), device=p.device)
    out = rhs.new_empty(rhs.shape)
    equation(backend, out, p, q, rhs)
    return out


@equation.self_test(terms=12 * 12, dtype=torch.float64)
def _sylvester_example(device: torch.device) -> Example:
    p, q, rhs = definite(device)
    size = torch.linalg.matrix_norm(p, 2).max() + torch.linalg.matrix_norm(q, 2).max()
    return {"p": p, "q": q, "rhs": rhs}, lambda x: _residual(p @ x + x @ q, rhs, size, x)
