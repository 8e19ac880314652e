"""Rows that count: their selection by weights, and the C++ pass over them."""

from __future__ import annotations

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


def selection(weight: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The `(rows,)` int64 that count (`None`: all) and their `(rows,)` real weights (`None`: ones), by `(...)` weights.

    Rows of weight zero are never read.
    """
    if weight is None:
        return None, None
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
