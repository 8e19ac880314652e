"""Small dense algebra: checks, registration and the choice of backend."""

from __future__ import annotations

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Dispatcher, Implementation, cpp_refuses
from lora_kernels.ops._checks import check_tensor
from lora_kernels.ops.small_linalg import reference

fix_signs = reference.fix_signs

# Above this order LAPACK's blocked algorithm beats Jacobi on the CPU (KERNELS section 5).
CPU_ORDER = 16
_STATUS = {1: "holds NaN or infinite entries", 2: "did not converge"}


def _check(matrices: torch.Tensor) -> None:
    check_tensor("matrices", matrices, dtypes=(torch.float32, torch.float64))
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}, but must be (..., n, n)")


def _cuda_limit(matrices: torch.Tensor) -> int:
    module, _ = _ext.load()
    if module is None or not hasattr(module, "eigh_cuda_limit"):
        return 0
    with torch.cuda.device(matrices.device):
        return int(module.eigh_cuda_limit(matrices.element_size()))


def _cpp_refuses(matrices: torch.Tensor) -> str | None:
    order = matrices.shape[-1]
    if matrices.device.type == "cuda":
        limit = _cuda_limit(matrices)
        return None if order <= limit else f"order {order} exceeds the {limit} that fit in shared memory"
    reason = cpp_refuses(matrices.device)
    return reason or (None if order <= 128 else f"order {order} exceeds 128")


def _lapack_wins(matrices: torch.Tensor) -> bool:
    return matrices.device.type == "cpu" and matrices.shape[-1] > CPU_ORDER


dispatcher = Dispatcher(
    "eigh",
    (
        Implementation("cpp", _cpp_refuses, explicit_only=_lapack_wins),
        Implementation("torch", lambda *_: None),
    ),
)


def _name_bad_matrix(matrices: torch.Tensor) -> None:
    finite = torch.isfinite(matrices.tril()).flatten(-2).all(-1).reshape(-1)
    if not bool(finite.all()):
        raise ValueError(f"matrix {int((~finite).nonzero()[0])} holds NaN or infinite entries")


def _run_cpp(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    module, order = _ext.extension(), matrices.shape[-1]
    flat = matrices.reshape(-1, order, order).contiguous()
    values = torch.empty(flat.shape[:-1], dtype=flat.dtype, device=flat.device)
    vectors = torch.empty_like(flat)
    pointers = (flat.data_ptr(), values.data_ptr(), vectors.data_ptr())
    wide = flat.dtype == torch.float64
    if flat.device.type == "cpu":
        module.eigh(*pointers, flat.shape[0], order, wide, torch.get_num_threads())
    else:
        info = torch.empty(flat.shape[0], dtype=torch.int32, device=flat.device)
        with torch.cuda.device(flat.device):
            stream = torch.cuda.current_stream().cuda_stream
            module.eigh_cuda(*pointers, info.data_ptr(), flat.shape[0], order, wide, stream)
        if bool(info.any()):
            index = int(info.nonzero()[0])
            raise ValueError(f"matrix {index} {_STATUS[int(info[index])]}")
    return values.reshape(matrices.shape[:-1]), vectors.reshape(matrices.shape)


@torch.library.custom_op("lora_kernels::eigh", mutates_args=())
def _eigh(matrices: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    if matrices.numel() == 0:
        return matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices)
    if backend == "torch":
        _name_bad_matrix(matrices)
        values, vectors = torch.linalg.eigh(matrices)
    else:
        values, vectors = _run_cpp(matrices)
        if matrices.device.type == "cpu":
            return values, vectors
    return values, fix_signs(vectors).contiguous()


@_eigh.register_fake
def _(matrices: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check(matrices)
    return matrices.new_empty(matrices.shape[:-1]), matrices.new_empty(matrices.shape)


def eigh(matrices: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenpairs of a batch of symmetric matrices.

    Cyclic Jacobi (Golub and Van Loan, section 8.5) for small orders, all matrices of the batch at once; LAPACK or
    cuSOLVER through torch above. Not differentiable.

    Args:
        matrices: `(..., n, n)` float32 or float64; the lower triangle is read.
        backend: `auto`, `cpp` (C++ on the CPU up to n = 128, CUDA as far as shared memory goes) or `torch`.

    Returns:
        Values `(..., n)`, ascending, and vectors `(..., n, n)` as columns; the entry of largest magnitude of each
        vector is positive.

    Raises:
        TypeError: on another dtype.
        ValueError: on a shape that is not square, or a matrix with NaN or infinite entries; the message has its index.
        RuntimeError: if the iteration does not converge, or the backend asked for cannot take the call.
    """
    _check(matrices)
    values, vectors = _eigh(matrices.detach(), dispatcher.choose(backend, matrices))
    return values, vectors
