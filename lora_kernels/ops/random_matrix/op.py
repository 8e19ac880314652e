"""The random matrix."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels._checks import FLOATS, as_device, check_choice, check_range, repr_short
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, no_float64, on_cpp, on_torch, on_triton, relative_error
from lora_kernels.ops._philox import signed64
from lora_kernels.ops.random_matrix import reference
from lora_kernels.ops.random_matrix.reference import KINDS


def check_key(seed: object, stream: object = 0, step: object = 0) -> int:
    """Check a 64-bit seed, a 32-bit stream and step; returns the seed signed, as an op's argument can hold it."""
    key = signed64("seed", seed)
    check_range("stream", stream, low=0, high=2**32 - 1, integer=True)
    check_range("step", step, low=0, high=2**32 - 1, integer=True)
    return key


def draw_cpp(out: torch.Tensor, kind: str, seed: int, stream: int, step: int = 0) -> torch.Tensor:
    """Fill `(rows, columns)` on the CPU, in float16, bfloat16 or float32, from the C++ generator, and return it."""
    drawn = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty(out.shape, dtype=torch.float32)
    _ext.extension().random_matrix(
        drawn.data_ptr(), *out.shape, kind == "gaussian", seed, stream, step, torch.get_num_threads()
    )
    return out if drawn is out else out.copy_(drawn)


def _body(backend: Backend, out: torch.Tensor, kind: str, seed: int, stream: int, step: int) -> None:
    backend(out, kind, seed, stream, step)


matrix = Op(
    "random_matrix",
    _body,
    writes=("out",),
    backends=(
        on_triton("random_matrix.kernel:random_matrix", no_float64),
        on_cpp(draw_cpp, no_float64),
        on_torch(lambda out, *key: out.copy_(reference.random_matrix(*out.shape, *key, dtype=out.dtype))),
    ),
)


def random_matrix(
    rows: int,
    columns: int,
    *,
    kind: str = "rademacher",
    seed: int,
    stream: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> torch.Tensor:
    """Independent random numbers of mean 0 and variance 1, functions of the seed and their position alone.

    Philox 4x32 with 10 rounds (Salmon et al., SC 2011), see `_philox.py` for the convention. A smaller matrix of the
    same key is a corner of a larger one. Signs are the same bits on every backend and device; gaussian draws differ by
    at most 1e-6 before they are rounded to `dtype`.

    Args:
        rows: number of rows, below 2^31.
        columns: number of columns, below 2^31.
        kind: `rademacher` (1 or -1, with probability 1/2) or `gaussian` (standard normal).
        seed: the 64-bit key, signed or unsigned: -1 is the same as 2^64 - 1.
        stream: which matrix (a layer, say), in [0, 2^32).
        step: which draw of that matrix, in [0, 2^32).
        dtype: float16, bfloat16, float32, or float64 (torch backend only).
        device: where the matrix is to be.
        backend: `auto`, `triton`, `cpp` or `torch`.

    Returns:
        `(rows, columns)`.

    Raises:
        TypeError: on a wrong type.
        ValueError: on a number out of range or an unknown kind.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    check_range("rows", rows, low=0, high=2**31 - 1, integer=True)
    check_range("columns", columns, low=0, high=2**31 - 1, integer=True)
    check_choice("kind", kind, KINDS)
    key = check_key(seed, stream, step)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"dtype is {repr_short(dtype)}, but must be one of float16, bfloat16, float32, float64")
    out = torch.empty(rows, columns, dtype=dtype, device=as_device("device", device))
    matrix(backend, out, kind, key, stream, step)
    return out


@matrix.self_test(terms=32)
def _example(device: torch.device) -> Example:
    arguments: dict[str, Any] = {"rows": 37, "columns": 20, "kind": "gaussian", "seed": 1, "stream": 2}
    truth = reference.random_matrix(**arguments).to(device)
    return {**arguments, "device": device}, lambda result: relative_error([result], [truth])
