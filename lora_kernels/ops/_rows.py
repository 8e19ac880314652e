"""Rows that count: their selection by weights, and the C++ pass over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

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


class Selection(NamedTuple):
    """The rows of a matrix that count, and how much each."""

    rows: torch.Tensor | None = None  # `(count,)` int64; `None`: all
    weight: torch.Tensor | None = None  # `(count,)`, real; `None`: ones

    def count(self, x: torch.Tensor) -> int:
        """How many rows of a matrix count."""
        return x.shape[0] if self.rows is None else self.rows.shape[0]

    def to(self, dtype: torch.dtype) -> Selection:
        """With contiguous weights of a dtype."""
        return Selection(self.rows, None if self.weight is None else self.weight.to(dtype).contiguous())

    def part(self, x: torch.Tensor, places: slice) -> tuple[torch.Tensor, Selection]:
        """Matrix and selection of some of the rows that count."""
        rows, weight = (None if values is None else values[places] for values in self)
        return x if rows is not None else x[places], Selection(rows, weight)

    def pointers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Matrix, rows and weights for a launch: a pointer that a flag switches off must still be one."""
        return x, x if self.rows is None else self.rows, x if self.weight is None else self.weight

    def flags(self) -> dict[str, bool]:
        """Which of them a kernel is to read."""
        return {"HAS_INDEX": self.rows is not None, "HAS_WEIGHT": self.weight is not None}


ALL = Selection()
# Weights and their selections, of the block that shares them; see `shared_selections`.
Selections = dict[tuple[object, ...], tuple[torch.Tensor, Selection]]
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


def selection(weight: torch.Tensor | None) -> Selection:
    """The rows that weights `(...)` select."""
    if weight is None:
        return ALL
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


def _selection(weight: torch.Tensor) -> Selection:
    flat = weight.reshape(-1)
    index = flat.nonzero().squeeze(-1)
    if index.numel() == flat.numel():  # nothing is masked: no rows need to be gathered
        return Selection(None, None if flat.dtype == torch.bool else flat)
    return Selection(index, None if flat.dtype == torch.bool else flat[index])


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


def packed(
    x: torch.Tensor,
    selected: Selection,
    dtype: torch.dtype,
    *,
    cpp: bool,
    step: int = CHUNK,
    plain: bool = True,
    weighted: bool = False,
    column_sum: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The selected rows of x in a dtype, part by part; with `cpp` (float32) one C++ pass converts and weighs a part.

    Yields:
        The part's slice of the selection, its rows `(count, n)` (only with `plain`, if it is weighted), and, if
        `weighted`, the rows times their weights. `column_sum` `(n,)` receives the sum of the weighted rows in any case.
    """
    index, weight = selected.to(dtype)
    parts = row_parts(x, index, step)
    if not cpp:
        for part in parts:
            rows = products = (x[part] if index is None else x[index[part]]).to(dtype)
            if weight is not None and (weighted or column_sum is not None):
                products = rows * weight[part].unsqueeze(-1)
            if column_sum is not None:
                column_sum += products.sum(0)
            yield part, rows, products
        return
    most = parts[0].stop if parts else 0
    room = torch.empty(most, x.shape[1]) if weighted and weight is not None else None
    direct = (index is None and x.dtype == torch.float32) or not (plain or room is None)  # read as they are, or not
    panel = None if direct else torch.empty(most, x.shape[1])
    for part in parts:
        if panel is not None or room is not None or column_sum is not None:
            pack_rows(x, index, part, weight=weight, panel=panel, weighted=room, column_sum=column_sum)
        count = part.stop - part.start
        rows = x[part] if panel is None else panel[:count]
        yield part, rows, rows if room is None else room[:count]
