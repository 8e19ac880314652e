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


def counted(rows: torch.Tensor, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(..., n)` whose weight `(...)` is not zero, `(count, n)`, and these weights `(count, 1)`, in float64."""
    flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).double()
    if weight is None:
        return flat, flat.new_ones(flat.shape[0], 1)
    keep = weight.reshape(-1) != 0
    return flat[keep], weight.reshape(-1, 1)[keep].double()


def row_parts(rows: torch.Tensor, index: torch.Tensor | None, step: int = CHUNK) -> list[slice]:
    """Places of the rows that count, by `step` on the CPU, all at once on a GPU."""
    count = rows.shape[0] if index is None else index.shape[0]
    step = step if rows.device.type == "cpu" else max(count, 1)
    return [slice(low, min(low + step, count)) for low in range(0, count, step)]


def widened(rows: torch.Tensor, index: torch.Tensor | None, part: slice, dtype: torch.dtype) -> torch.Tensor:
    """The rows that count at some places, in a dtype."""
    return (rows[part] if index is None else rows[index[part]]).to(dtype)


def new_panel(
    rows: torch.Tensor, index: torch.Tensor | None, count: int, weight: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Room for `pack_rows` to widen or weigh `count` rows; `None` where they are float32 and read as they are."""
    direct = index is None and weight is None and rows.dtype == torch.float32
    return None if direct else torch.empty(count, rows.shape[1], dtype=torch.float32)


def _address(tensor: torch.Tensor | None, low: int = 0) -> int:
    return 0 if tensor is None else tensor.data_ptr() + low * tensor.element_size()


def pack_rows(
    rows: torch.Tensor,
    index: torch.Tensor | None,
    part: slice,
    *,
    weight: torch.Tensor | None = None,
    panel: torch.Tensor | None = None,
    weighted: torch.Tensor | None = None,
    column_sum: torch.Tensor | None = None,
    square_weight: torch.Tensor | None = None,
    square_sum: torch.Tensor | None = None,
) -> None:
    """One C++ pass over the rows that count at some places: widen, weigh, sum, square.

    `panel`, `(>= count, n)` float32, becomes x, `weighted` likewise `w x`; `column_sum += sum w x` and
    `square_sum += sum v x^2`, both `(n,)` float32. w (`weight`) and v (`square_weight`) are `(places,)` float32, or
    `None` for ones; rows where v is zero are not read for the squares.
    """
    low, source = part.start, rows[part] if index is None else rows
    _ext.extension().pack_rows(
        source.data_ptr(), CPP_DTYPES[rows.dtype], rows.stride(0), _address(index, low), part.stop - low, rows.shape[1],
        _address(weight, low), _address(panel), _address(weighted), _address(column_sum),
        _address(square_weight, low), _address(square_sum), torch.get_num_threads(),
    )  # fmt: skip
