"""Eigenpairs of small symmetric matrices: checks, registration and the choice of backend."""

from __future__ import annotations

import torch

from lora_kernels.ops._backend import Backend, Dispatcher
from lora_kernels.ops.small_linalg import _launch, reference

fix_signs = reference.fix_signs


def _check(matrices: torch.Tensor) -> None:
    _launch.check_square("matrices", matrices)


def _cpp_refuses(matrices: torch.Tensor) -> str | None:
    return _launch.order_refuses(matrices.device, matrices.shape[-1], ("eigh", matrices.dtype))


def _lapack_wins(matrices: torch.Tensor) -> bool:
    return _launch.lapack_wins("eigh", matrices, matrices.shape[-1])


dispatcher = Dispatcher(
    "eigh",
    (
        Backend("cpp", _cpp_refuses, slower=_lapack_wins),
        Backend("torch", lambda *_: None),
    ),
)


def eigenpairs_cuda(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the CUDA kernel on a dense batch.

    Args:
        flat: `(batch, n, n)`.

    Returns:
        Values, vectors with signs as they come, and the status of each matrix.
    """
    values, vectors, info = flat.new_empty(flat.shape[:-1]), torch.empty_like(flat), _launch.new_info(flat)
    _launch.run_cuda("eigh", flat.dtype, flat, values, vectors, info, flat.shape[0], flat.shape[-1])
    return values, vectors, info


def _run_torch(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _launch.raise_first(_launch.not_finite(flat.tril()))
    values, vectors = reference.eigh(flat)  # where it does not converge, torch's error names the matrix
    return values, vectors.contiguous()


def _run_cpp(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if flat.device.type == "cpu":
        values, vectors = flat.new_empty(flat.shape[:-1]), torch.empty_like(flat)
        _launch.run_cpu("eigh", flat.dtype, flat, values, vectors, flat.shape[0], flat.shape[-1])
    else:
        values, vectors, info = eigenpairs_cuda(flat)
        _launch.raise_first(info)
        vectors = fix_signs(vectors).contiguous()
    return values, vectors


@torch.library.custom_op("lora_kernels::eigh", mutates_args=())
def _eigh(matrices: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)
    values, vectors = (_run_torch if backend == "torch" else _run_cpp)(_launch.dense(matrices))
    return values.reshape(matrices.shape[:-1]), vectors.reshape(matrices.shape)


@_eigh.register_fake
def _(matrices: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check(matrices)
    return matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)


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
    _check(matrices)
    values, vectors = _eigh(matrices.detach(), dispatcher.choose(backend, matrices))
    return values, vectors
