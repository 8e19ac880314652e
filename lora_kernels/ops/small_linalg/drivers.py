"""The compiled drivers: when they run, calls into them, and what their outcomes mean in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lora_kernels._checks import check_tensor
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend, cpp_refuses

DTYPES = (torch.float32, torch.float64)
MAX_ORDER = 128

# On the CPU a matrix takes a vector lane, so that few matrices of a high order leave lanes idle, and LAPACK, one matrix
# at a time, wins. C++ is the choice up to max(first, second * batch), measured on 2 cores of 8 lanes, batches of
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
_NOT_FINITE, _NOT_CONVERGED, NOT_POSITIVE = 1, 2, 3


def check_square(name: str, matrices: torch.Tensor) -> None:
    """Check for a float32 or float64 tensor of shape `(..., n, n)`."""
    check_tensor(name, matrices, dtypes=DTYPES)
    if matrices.dim() < 2 or matrices.shape[-1] != matrices.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(matrices.shape)}, but must be (..., n, n)")


def _order_refuses(device: torch.device, order: int, kernels: tuple[str, ...], dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        reason = cpp_refuses(device)
        return reason or (None if order <= MAX_ORDER else f"order {order} exceeds {MAX_ORDER}")
    module, reason = _ext.load()
    if module is None:
        return reason
    if not hasattr(module, "eigh_cuda_limit"):
        return "the compiled extension was built without CUDA"
    with torch.cuda.device(device):
        limit = min(int(getattr(module, f"{kernel}_cuda_limit")(dtype.itemsize)) for kernel in kernels)
        if limit == 0:
            capability, built = torch.cuda.get_device_capability(), module.build_info()["cuda_archs"]
            return (
                "the compiled extension has no code for compute capability {}.{}".format(*capability)
                + f" (only {built})"
            )
    return None if order <= limit else f"order {order} exceeds the {limit} that fit in shared memory"


def on_compiled(
    provider: Callable[..., None],
    problem: Callable[..., tuple[torch.Tensor, int]],
    *kernels: str,
    op: str = "",
    dtype: torch.dtype | None = None,
) -> Backend:
    """The backend `cpp` of an op on small matrices: C++ on CPU tensors, CUDA on those of a GPU.

    `problem` finds a batch `(..., rows, columns)` and its order among the op's arguments. The limits of the CUDA
    `kernels` hold, in `dtype` or the batch's. `op` names a row of the measured orders; without one C++ always wins.
    """

    def refuses(*args: Any) -> str | None:
        batch, order = problem(*args)
        return _order_refuses(batch.device, order, kernels, dtype or batch.dtype)

    def slower(*args: Any) -> bool:
        batch, order = problem(*args)
        if not op or batch.device.type != "cpu":
            return False
        least, per_matrix = _CPU_ORDERS[op, batch.dtype]
        return order > max(least, per_matrix * batch.shape[:-2].numel())

    return Backend("cpp", refuses, slower, provider)


def raise_status(status: int, index: int) -> None:
    """Raise what a driver's status means, 0 being success."""
    if status == _NOT_FINITE:
        raise ValueError(f"matrix {index} holds NaN or infinite entries")
    if status == _NOT_CONVERGED:
        raise RuntimeError(f"the iteration did not converge for matrix {index}")
    if status >= NOT_POSITIVE:
        minor = status - NOT_POSITIVE + 1
        raise ValueError(f"matrix {index} is not positive definite (its leading minor of order {minor} is not)")


def raise_first(*statuses: torch.Tensor | None) -> None:
    """Raise for the first matrix of which a status `(...)` is not 0; `None` has been looked at."""
    known = [status for status in statuses if status is not None]
    if known and bool((status := functools.reduce(torch.maximum, known)).any()):
        index = int(status.reshape(-1).nonzero()[0])
        raise_status(int(status.reshape(-1)[index]), index)


def not_finite(*batches: torch.Tensor) -> torch.Tensor:
    """Status per matrix `(...)` of what the compiled drivers would find: 1 where an entry is not finite."""
    # A sum is finite only if all its terms are, and takes one read; looking at all makes copies. (Finite terms may sum
    # to what is not: then all are looked at.)
    if all(bool(torch.isfinite(batch.sum((-2, -1))).all()) for batch in batches):
        return torch.zeros(batches[0].shape[:-2], dtype=torch.int32, device=batches[0].device)
    return torch.stack([(~torch.isfinite(batch)).flatten(-2).any(-1) for batch in batches]).any(0).int() * _NOT_FINITE


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous `(batch, rows, columns)` form of `(..., rows, columns)`."""
    return tensor.reshape(tensor.shape[:-2].numel(), *tensor.shape[-2:]).contiguous()


def room(out: torch.Tensor) -> torch.Tensor:
    """A view of contiguous `(..., rows, columns)` as `(batch, rows, columns)`, to be filled."""
    return out.view(out.shape[:-2].numel(), *out.shape[-2:])


def _entry(name: str, dtype: torch.dtype) -> Any:
    return getattr(_ext.extension(), f"{name}_{str(dtype).removeprefix('torch.')}")


def run(
    name: str, tensors: Sequence[torch.Tensor], sizes: Sequence[int], *, reports: bool = True
) -> torch.Tensor | None:
    """Run a driver on dense tensors of one dtype: on the CPU it raises, on a GPU the status per matrix is returned."""
    first, arguments = tensors[0], [tensor.data_ptr() for tensor in tensors]
    if first.device.type == "cpu":
        raise_status(*_entry(name, first.dtype)(*arguments, *sizes, torch.get_num_threads()))
        return None
    status = torch.empty(first.shape[0], dtype=torch.int32, device=first.device) if reports else None
    found = [] if status is None else [status.data_ptr()]
    _entry(f"{name}_cuda", first.dtype)(*arguments, *found, *sizes, torch.cuda.current_stream().cuda_stream)
    return status
