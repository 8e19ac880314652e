"""The random matrix: checks, registration and the choice of backend."""

from __future__ import annotations

import contextlib

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Backend, Dispatcher, cpp_refuses, triton_refuses
from lora_kernels.ops._checks import FLOATS, as_device, check_choice, check_range, shown
from lora_kernels.ops.random_matrix import reference
from lora_kernels.ops.random_matrix.reference import KINDS

_SINGLE = FLOATS[:3]


def check_key(seed: object, stream: object = 0, step: object = 0) -> int:
    """Check what addresses a matrix of random numbers.

    Args:
        seed: 64-bit key, signed or unsigned.
        stream: 32 bits.
        step: 32 bits.

    Returns:
        The seed as a signed number, which is what an op's argument can hold.

    Raises:
        TypeError: if one is no integer.
        ValueError: if one is out of range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__} {shown(seed)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {shown(seed)}, but must be a 64-bit integer")
    check_range("stream", stream, low=0, high=2**32 - 1, integer=True)
    check_range("step", step, low=0, high=2**32 - 1, integer=True)
    return seed - 2**64 if seed >= 2**63 else seed


def _narrow_only(dtype: torch.dtype) -> str | None:
    return None if dtype in _SINGLE else f"draws no {dtype}"


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return triton_refuses(device) or _narrow_only(dtype)


def _cpp_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return cpp_refuses(device) or _narrow_only(dtype)


def _on_cpu(device: torch.device, _dtype: torch.dtype) -> bool:
    return device.type == "cpu"


dispatcher = Dispatcher(
    "random_matrix",
    (
        Backend("triton", _triton_refuses, slower=_on_cpu),
        Backend("cpp", _cpp_refuses),
        Backend("torch", lambda *_: None),
    ),
)


def draw_cpp(rows: int, columns: int, kind: str, seed: int, stream: int, step: int = 0) -> torch.Tensor:
    """A float32 matrix from the C++ generator.

    Args:
        rows: number of rows.
        columns: number of columns.
        kind: one of `KINDS`.
        seed: 64-bit key, signed.
        stream: which matrix.
        step: which draw of that matrix.

    Returns:
        `(rows, columns)`.
    """
    out = torch.empty(rows, columns, dtype=torch.float32)
    _ext.extension().random_matrix(
        out.data_ptr(), rows, columns, kind == "gaussian", seed, stream, step, torch.get_num_threads()
    )
    return out


@torch.library.custom_op("lora_kernels::random_matrix", mutates_args=())
def _random_matrix(
    rows: int,
    columns: int,
    kind: str,
    seed: int,
    stream: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> torch.Tensor:
    if backend == "torch":
        made = reference.random_matrix(rows, columns, kind, seed=seed, stream=stream, step=step, dtype=dtype)
        return made.to(device)
    if backend == "cpp":
        return draw_cpp(rows, columns, kind, seed, stream, step).to(dtype)
    # Imported here: without Triton the other backends still work.
    from lora_kernels.ops.random_matrix import kernel  # noqa: PLC0415

    out = torch.empty(rows, columns, dtype=dtype, device=device)
    # Triton launches on the current device, which need not be the one asked for.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel.random_matrix(out, kind, seed, stream, step)
    return out


@_random_matrix.register_fake
def _(
    rows: int,
    columns: int,
    kind: str,
    seed: int,
    stream: int,
    step: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device)


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
    """Independent random numbers of mean 0 and variance 1, each a function of the seed and its position alone.

    Philox 4x32 with 10 rounds (Salmon et al., SC 2011), see `_philox.py` for the convention. A smaller matrix of the
    same key is a corner of a larger one. Signs are the same bits on every backend and device; gaussian draws differ by
    at most 1e-6 before they are rounded to `dtype`.

    Args:
        rows: number of rows, below 2^31.
        columns: number of columns, below 2^31.
        kind: `rademacher` (1 or -1, probability 1/2 each) or `gaussian` (standard normal).
        seed: the 64-bit key, signed or unsigned: -1 is the same as 2^64 - 1.
        stream: which matrix (a layer, say), in [0, 2^32).
        step: which draw of that matrix, in [0, 2^32).
        dtype: float16, bfloat16, float32, or float64 (torch backend only).
        device: where the matrix is made.
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
        raise TypeError(f"dtype is {shown(dtype)}, but must be one of float16, bfloat16, float32, float64")
    where = as_device("device", device)
    chosen = dispatcher.choose(backend, where, dtype)
    made: torch.Tensor = _random_matrix(rows, columns, kind, key, stream, step, dtype, where, chosen)
    return made
