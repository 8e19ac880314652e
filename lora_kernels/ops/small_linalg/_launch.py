"""Calls into the compiled drivers, and what their outcomes mean in words."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._backend import cpp_refuses
from lora_kernels.ops._checks import check_tensor

DTYPES = (torch.float32, torch.float64)
MAX_ORDER = 128

# On the CPU a matrix takes a vector lane, so that few matrices of a high order leave lanes idle, and LAPACK, one matrix
# at a time, wins. C++ is the choice up to max(first, second * batch), measured on 2 cores with 8 lanes each, batches of
# 1 to 224 and orders of 4 to 128. The two Cholesky ops, not listed, are faster in C++ throughout. In float64 the QR
# factorisations, which are LAPACK's either way, are most of factor_spectrum.
_CPU_ORDERS = {
    ("eigh", torch.float32): (32, 16),
    ("eigh", torch.float64): (32, 16),
    ("sylvester", torch.float32): (32, 12),
    ("sylvester", torch.float64): (32, 12),
    ("factor_spectrum", torch.float32): (24, 12),
    ("factor_spectrum", torch.float64): (8, 4),
}
# As in csrc/small_linalg.h: from here on, the order of the first leading minor that is not positive, less one.
_NOT_FINITE, _NOT_CONVERGED, _NOT_POSITIVE = 1, 2, 3


def check_square(name: str, matrices: torch.Tensor) -> None:
    """Check for a float32 or float64 tensor of shape `(..., n, n)`.

    Args:
        name: the argument's name, for the message.
        matrices: the argument.

    Raises:
        ValueError: on another shape.
    """
    check_tensor(name, matrices, dtypes=DTYPES)
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(matrices.shape)}, but must be (..., n, n)")


def order_refuses(device: torch.device, order: int, *limits: tuple[str, torch.dtype]) -> str | None:
    """Why the compiled drivers cannot take matrices of this order, or `None` if they can.

    Args:
        device: where the matrices are.
        order: their order.
        limits: for CUDA, the kernels needed and the dtype that each works in.

    Returns:
        The reason.
    """
    if device.type != "cuda":
        reason = cpp_refuses(device)
        return reason or (None if order <= MAX_ORDER else f"order {order} exceeds {MAX_ORDER}")
    module, reason = _ext.load()
    if module is None:
        return reason
    if not hasattr(module, "eigh_cuda_limit"):
        return "the compiled extension was built without CUDA"
    with torch.cuda.device(device):
        limit = min(int(getattr(module, f"{name}_cuda_limit")(dtype.itemsize)) for name, dtype in limits)
    return None if order <= limit else f"order {order} exceeds the {limit} that fit in shared memory"


def lapack_wins(op: str, like: torch.Tensor, order: int) -> bool:
    """Whether torch beats the compiled driver, so that `auto` passes over it.

    Args:
        op: a name in the table above.
        like: a batch, `(..., rows, columns)`.
        order: of the matrices that the driver works on.

    Returns:
        The answer, from measurements.
    """
    least, per_matrix = _CPU_ORDERS[op, like.dtype]
    return like.device.type == "cpu" and order > max(least, per_matrix * like.shape[:-2].numel())


def raise_status(status: int, index: int) -> None:
    """Raise what a driver's status means.

    Args:
        status: of a driver; 0 is success.
        index: of the matrix.

    Raises:
        ValueError: for a matrix that is not finite or not positive definite.
        RuntimeError: for an iteration that did not converge.
    """
    if status == _NOT_FINITE:
        raise ValueError(f"matrix {index} holds NaN or infinite entries")
    if status == _NOT_CONVERGED:
        raise RuntimeError(f"the iteration did not converge for matrix {index}")
    if status >= _NOT_POSITIVE:
        minor = status - _NOT_POSITIVE + 1
        raise ValueError(f"matrix {index} is not positive definite (its leading minor of order {minor} is not)")


def raise_first(status: torch.Tensor) -> None:
    """Raise for the first status that is not 0.

    Args:
        status: one per matrix.
    """
    if bool(status.any()):
        index = int(status.reshape(-1).nonzero()[0])
        raise_status(int(status.reshape(-1)[index]), index)


def not_finite(*batches: torch.Tensor) -> torch.Tensor:
    """Status per matrix of what the compiled drivers would find: 1 where an entry is not finite.

    Args:
        batches: each `(..., rows, columns)`, of one batch shape.

    Returns:
        `(...)`, integers.
    """
    # A sum is finite only if all its terms are, and takes one read; looking at each makes copies. (Finite terms may sum
    # to what is not: then each is looked at.)
    if all(bool(torch.isfinite(each.sum((-2, -1))).all()) for each in batches):
        return torch.zeros(batches[0].shape[:-2], dtype=torch.int32, device=batches[0].device)
    return torch.stack([(~torch.isfinite(each)).flatten(-2).any(-1) for each in batches]).any(0).int() * _NOT_FINITE


def not_positive(info: torch.Tensor) -> torch.Tensor:
    """Status per matrix from LAPACK's `info` of a Cholesky factorisation.

    Args:
        info: 0, or the order of the first leading minor that is not positive.

    Returns:
        Integers of the same shape.
    """
    return torch.where(info > 0, info + (_NOT_POSITIVE - 1), torch.zeros_like(info))


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous `(batch, rows, columns)` form of `(..., rows, columns)`."""
    return tensor.reshape(tensor.shape[:-2].numel(), *tensor.shape[-2:]).contiguous()


def _arguments(arguments: tuple[Any, ...]) -> list[Any]:
    return [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]


def _entry(name: str, dtype: torch.dtype) -> Any:
    return getattr(_ext.extension(), f"{name}_{str(dtype).removeprefix('torch.')}")


def run_cpu(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int) -> None:
    """Run a CPU driver on dense tensors and numbers, and raise what it found.

    Args:
        name: of the driver.
        dtype: its dtype.
        arguments: tensors, which go as addresses, and numbers.
    """
    raise_status(*_entry(name, dtype)(*_arguments(arguments), torch.get_num_threads()))


def run_cuda(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int) -> None:
    """Launch a CUDA driver on the current stream of the first tensor's device.

    Args:
        name: of the driver, without `_cuda`.
        dtype: its dtype.
        arguments: tensors, which go as addresses, and numbers.
    """
    device = next(each.device for each in arguments if isinstance(each, torch.Tensor))
    with torch.cuda.device(device):
        _entry(f"{name}_cuda", dtype)(*_arguments(arguments), torch.cuda.current_stream().cuda_stream)


def new_info(like: torch.Tensor) -> torch.Tensor:
    """Room for one status per matrix of a dense batch."""
    return torch.empty(like.shape[0], dtype=torch.int32, device=like.device)
