"""Rows that count: their selection by weights, and the C++ pass over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from lora_kernels.ops import _ext

# Code of a dtype in csrc; the dtypes that the C++ kernels read.
CPP_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Rows handled at a time on the CPU: the float32 copy of a chunk stays in the last-level cache.
CHUNK = 2048


def flat_rows(x: torch.Tensor) -> torch.Tensor:
    """`(..., n)` as `(rows, n)` with unit column stride: a view where possible."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # not -1: there may be no features
    return rows if rows.stride(-1) == 1 else rows.contiguous()


# Weights and their selections, of the block that shares them; see `shared_selections`.
Selections = dict[tuple[object, ...], tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]]
_shared: ContextVar[Selections | None] = ContextVar("selections", default=None)
_MOST_SHARED = 8  # a batch has a mask or two, seen in a few shapes


@contextlib.contextmanager
def shared_selections(kept: Selections) -> Iterator[None]:
    """Keep in `kept` the rows that count of weights that do not change: to find them waits for a GPU."""
    token = _shared.set(kept)
    try:
        yield
    finally:
        _shared.reset(token)


def selection(weight: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The `(rows,)` int64 that count (`None`: all), and their `(rows,)` real weights (`None`: ones), by `(...)`."""
    if weight is None:
        return None, None
    kept = _shared.get()
    if kept is None or weight.is_inference():
        return _selection(weight)
    # A view of the same numbers; the tensor that is kept beside them keeps their memory.
    key = (weight.device, weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), weight._version)
    if key not in kept:
        if len(kept) >= _MOST_SHARED:
            del kept[next(iter(kept))]
        kept[key] = weight, _selection(weight)
    return kept[key][1]


def _selection(weight: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    flat = weight.reshape(-1)
    index = flat.nonzero().squeeze(-1)
    if index.numel() == flat.numel():  # nothing is masked: no rows need to be gathered
        return None, None if flat.dtype == torch.bool else flat
    return index, None if flat.dtype == torch.bool else flat[index]


def single(weight: torch.Tensor | None) -> torch.Tensor | None:
    """Weights as kernels read them: contiguous float32."""
    return None if weight is None else weight.to(torch.float32).contiguous()


def _address(tensor: torch.Tensor | None, low: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + low * tensor.element_size()


def pack_rows(
    rows: torch.Tensor,
    index: torch.Tensor | None,
    low: int,
    count: int,
    *,
    weight: torch.Tensor | None = None,
    panel: torch.Tensor | None = None,
    weighted: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    square_weight: torch.Tensor | None = None,
    square_sum: torch.Tensor | None = None,
) -> None:
    """One C++ pass over the rows that count at places `low` to `low + count`: widen, weigh, sum, square.

    `panel`, `(>= count, n)` float32, becomes x, `weighted` likewise `w x`; `column_sum += sum w x` and
    `square_sum += sum v x^2`, both `(n,)` float32. w (`weight`) and v (`square_weight`) are `(places,)` float32, or
    `None` for ones; rows where v is zero are not read for the squares.
    """
    source = rows[low : low + count] if index is None else rows
    _ext.extension().pack_rows(
        source.data_ptr(),
        CPP_DTYPES[rows.dtype],
        rows.stride(0),
        _address(index, low),
        count,
        rows.shape[1],
        _address(weight, low),
        _address(panel),
        _address(weighted),
        _address(column_sum),
        _address(square_weight, low),
        _address(square_sum),
        torch.get_num_threads(),
    )
