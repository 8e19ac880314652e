"""Cholesky factors and solves, and Sylvester equations: checks, registration and the choice of backend."""

from __future__ import annotations

import torch

from lora_kernels.ops._backend import Backend, Dispatcher
from lora_kernels.ops._checks import check_tensor
from lora_kernels.ops.small_linalg import _launch, reference
from lora_kernels.ops.small_linalg.op import eigenpairs_cuda


def _check_pair(matrices: torch.Tensor, rhs: torch.Tensor) -> None:
    _launch.check_square("matrices", matrices)
    shape = (*matrices.shape[:-1], None)
    check_tensor("rhs", rhs, shape=shape, dtypes=(matrices.dtype,), device=matrices.device)


def _check_sylvester(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> None:
    _launch.check_square("p", p)
    _launch.check_square("q", q)
    batch, k = p.shape[:-2], q.shape[-1]
    check_tensor("q", q, shape=(*batch, k, k), dtypes=(p.dtype,), device=p.device)
    check_tensor("rhs", rhs, shape=(*batch, p.shape[-1], k), dtypes=(p.dtype,), device=p.device)


def _cholesky_refuses(matrices: torch.Tensor, *_: object) -> str | None:
    return _launch.order_refuses(matrices.device, matrices.shape[-1], ("cholesky", matrices.dtype))


def _sylvester_refuses(p: torch.Tensor, q: torch.Tensor, *_: object) -> str | None:
    order = max(p.shape[-1], q.shape[-1])
    return _launch.order_refuses(p.device, order, ("eigh", p.dtype), ("sylvester", p.dtype))


def _lapack_wins_sylvester(p: torch.Tensor, q: torch.Tensor, *_: object) -> bool:
    return _launch.lapack_wins("sylvester", p, max(p.shape[-1], q.shape[-1]))


_torch = Backend("torch", lambda *_: None)
cholesky_dispatcher = Dispatcher("cholesky", (Backend("cpp", _cholesky_refuses), _torch))
solve_dispatcher = Dispatcher("cholesky_solve", (Backend("cpp", _cholesky_refuses), _torch))
sylvester_dispatcher = Dispatcher("sylvester", (Backend("cpp", _sylvester_refuses, _lapack_wins_sylvester), _torch))


def _factors_by_torch(matrices: torch.Tensor) -> torch.Tensor:
    factors: torch.Tensor
    factors, info = torch.linalg.cholesky_ex(matrices)
    broken = _launch.not_finite(matrices.tril())
    _launch.raise_first(torch.where(broken > 0, broken, _launch.not_positive(info)))
    return factors


def _factors_by_cuda(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factors, info = torch.empty_like(flat), _launch.new_info(flat)
    _launch.run_cuda("cholesky", flat.dtype, flat, factors, info, flat.shape[0], flat.shape[-1])
    return factors, info


@torch.library.custom_op("lora_kernels::cholesky", mutates_args=())
def _cholesky(matrices: torch.Tensor, backend: str) -> torch.Tensor:
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape)
    flat = _launch.dense(matrices)
    if backend == "torch":
        factors = _factors_by_torch(flat).contiguous()
    elif flat.device.type == "cpu":
        factors = torch.empty_like(flat)
        _launch.run_cpu("cholesky", flat.dtype, flat, factors, flat.shape[0], flat.shape[-1])
    else:
        factors, info = _factors_by_cuda(flat)
        _launch.raise_first(info)
    return factors.reshape(matrices.shape)


@_cholesky.register_fake
def _(matrices: torch.Tensor, backend: str) -> torch.Tensor:
    _launch.check_square("matrices", matrices)
    return matrices.new_empty(matrices.shape)


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
    _launch.check_square("matrices", matrices)
    factors: torch.Tensor = _cholesky(matrices.detach(), cholesky_dispatcher.choose(backend, matrices))
    return factors


@torch.library.custom_op("lora_kernels::cholesky_solve", mutates_args=())
def _cholesky_solve(matrices: torch.Tensor, rhs: torch.Tensor, backend: str) -> torch.Tensor:
    if matrices.numel() == 0:
        return rhs.new_empty(rhs.shape)
    flat, right = _launch.dense(matrices), _launch.dense(rhs)
    sizes = flat.shape[0], flat.shape[-1], rhs.shape[-1]
    if backend == "torch":
        out = torch.cholesky_solve(right, _factors_by_torch(flat)).contiguous()
    elif flat.device.type == "cpu":
        out = torch.empty_like(right)
        _launch.run_cpu("cholesky_solve", flat.dtype, flat, right, out, *sizes)
    else:
        out = torch.empty_like(right)
        factors, info = _factors_by_cuda(flat)
        if rhs.numel() > 0:
            _launch.run_cuda("cholesky_substitute", flat.dtype, factors, right, out, *sizes)
        _launch.raise_first(info)
    return out.reshape(rhs.shape)


@_cholesky_solve.register_fake
def _(matrices: torch.Tensor, rhs: torch.Tensor, backend: str) -> torch.Tensor:
    _check_pair(matrices, rhs)
    return rhs.new_empty(rhs.shape)


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
    _check_pair(matrices, rhs)
    backend = solve_dispatcher.choose(backend, matrices, rhs)
    solution: torch.Tensor = _cholesky_solve(matrices.detach(), rhs.detach(), backend)
    return solution


def _sylvester_cuda(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    left, right, out, info = eigenpairs_cuda(p), eigenpairs_cuda(q), torch.empty_like(rhs), _launch.new_info(rhs)
    tensors = (left[0], left[1], right[0], right[1], rhs, out, info)
    _launch.run_cuda("sylvester_rotate", rhs.dtype, *tensors, *rhs.shape)
    _launch.raise_first(torch.stack([left[2], right[2], info]).amax(0))
    return out


@torch.library.custom_op("lora_kernels::sylvester", mutates_args=())
def _sylvester(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor, backend: str) -> torch.Tensor:
    if rhs.numel() == 0:
        return rhs.new_empty(rhs.shape)
    left, right, flat = _launch.dense(p), _launch.dense(q), _launch.dense(rhs)
    if backend == "torch":
        _launch.raise_first(_launch.not_finite(left.tril(), right.tril(), flat))
        out = reference.sylvester(left, right, flat).contiguous()
    elif flat.device.type == "cpu":
        out = torch.empty_like(flat)
        _launch.run_cpu("sylvester", flat.dtype, left, right, flat, out, *flat.shape)
    else:
        out = _sylvester_cuda(left, right, flat)
    return out.reshape(rhs.shape)


@_sylvester.register_fake
def _(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor, backend: str) -> torch.Tensor:
    _check_sylvester(p, q, rhs)
    return rhs.new_empty(rhs.shape)


def sylvester(p: torch.Tensor, q: torch.Tensor, rhs: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Solutions of `P X + X Q = R` with symmetric P and Q, for a batch of problems.

    With `P = U_p diag(p) U_p^T` and `Q = U_q diag(q) U_q^T`,
    `X = U_p [ (U_p^T R U_q)_ij / (p_i + q_j) ] U_q^T` (METHODS.md, LoRA-Pro). Where
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
    _check_sylvester(p, q, rhs)
    backend = sylvester_dispatcher.choose(backend, p, q, rhs)
    solution: torch.Tensor = _sylvester(p.detach(), q.detach(), rhs.detach(), backend)
    return solution
