"""The arithmetic of the low-rank part of many experts, forward and backward.

    t  = s drop(x) A_e^T                    (rows, r)
    y += t B_e^T                            (rows, m)
    u  = s g B_e                            (rows, r)
    dx = mask(u A_e),  dA_e = u^T drop(x),  dB_e = g^T t        (sums over the rows of e)

e is the expert of a row: rows `offsets[e]` to `offsets[e + 1] - 1` are its own. Rows from the last offset on belong to
none: their y stays, and their gradients are zero.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._dropout import Mask, mask_of
from lora_kernels.ops.skinny._launch import cast

_WORD = 2**64 - 1


class Scalars(NamedTuple):
    """What a call is besides its tensors."""

    scaling: float  # s
    threshold: int  # of dropout; 0 for none
    stream: int  # of dropout
    backend: str  # `triton`, `cpp` or `torch`


def bounds_of(offsets: torch.Tensor, rows: int) -> list[int]:
    """Offsets as numbers, which waits for the device; refused unless they lead from 0 on to at most `rows`."""
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] > rows or any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
        raise ValueError(f"offsets must begin with 0, not decrease, and end at the number of rows ({rows}) or before")
    return bounds


def forward(
    y: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    scalars: Scalars,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum `(rows, m)`, contiguous, and t `(rows, r)`; `in_place`, in the memory of y, which is contiguous.

    y `(rows, m)` and x `(rows, n)` are of one dtype with contiguous rows, A `(experts, r, n)` and B `(experts, m, r)`
    of any dtype, `offsets` is `(experts + 1,)`.
    """
    scaling, threshold, stream, backend = scalars
    mask, rank = mask_of(threshold, seed, stream), a.shape[1]
    if backend == "cpp":
        t = x.new_empty((x.shape[0], rank), dtype=torch.float32)
        out = y if in_place else torch.clone(y, memory_format=torch.contiguous_format)
        kept, numbers = _cpp_layer(x.dtype, x.shape[0], offsets, a, b, scaling, mask)
        _ext.extension().grouped_lora_forward(*numbers, x.data_ptr(), x.stride(0), t.data_ptr(), out.data_ptr())
        del kept
        return out, t
    t = x.new_empty((x.shape[0], rank))
    out = y if in_place else x.new_empty(y.shape)
    if 0 in (x.shape[1], *b.shape):
        bounds_of(offsets, x.shape[0])
        return out.copy_(y), t.zero_()
    products, groups = _products(backend, offsets, x.shape[0])
    products.shrink(t, x, groups, cast(a, x.dtype), scaling, mask)
    products.expand(out, t, groups, cast(b, x.dtype).mT, y, None)
    return out, t


def backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    offsets: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    seed: torch.Tensor | None,
    scalars: Scalars,
    need_x: bool,
    *,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Dx `(rows, n)` of g's dtype, dA and dB of their factors' dtypes, rounded from float32 sums.

    g is `(rows, m)` with contiguous rows, t as `forward` returned it. x is `None` where dA is not needed, t where dB is
    not. Where dx is needed, it can be added `into` the memory of another part of it.
    """
    scaling, threshold, stream, backend = scalars
    mask, rows = mask_of(threshold, seed, stream), g.shape[0]
    dx = None if not need_x else g.new_empty((rows, a.shape[2])) if into is None else into
    if backend == "cpp":
        da = None if x is None else torch.empty(a.shape, dtype=torch.float32)
        db = None if t is None else torch.empty(b.shape, dtype=torch.float32)
        kept, numbers = _cpp_layer(g.dtype, rows, offsets, a, b, scaling, mask)
        _ext.extension().grouped_lora_backward(
            *numbers, g.data_ptr(), g.stride(0), 0 if x is None else x.data_ptr(), 0 if x is None else x.stride(0),
            *(0 if tensor is None else tensor.data_ptr() for tensor in (t, dx)), into is not None,
            *(0 if tensor is None else tensor.data_ptr() for tensor in (da, db)),
        )  # fmt: skip
        del kept
        return dx, None if da is None else cast(da, a.dtype), None if db is None else cast(db, b.dtype)
    da = None if x is None else torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = None if t is None else torch.empty(b.shape, dtype=b.dtype, device=b.device)
    if 0 in (rows, a.shape[2], *b.shape):
        bounds_of(offsets, rows)
        for gradient in (dx if into is None else None, da, db):
            if gradient is not None:
                gradient.zero_()
        return dx, da, db
    products, groups = _products(backend, offsets, rows)
    if dx is not None or da is not None:
        u = g.new_empty((rows, a.shape[1]))
        products.shrink(u, g, groups, cast(b, g.dtype).mT, scaling, None)
        if da is not None:
            mask = products.reduce(da, u, x, groups, mask)  # with the bits that `expand` reads
        if dx is not None:
            products.expand(dx, u, groups, cast(a, g.dtype), into, mask)
    if db is not None:
        products.reduce(db.mT, t, g, groups, None)
    return dx, da, db


def _products(backend: str, offsets: torch.Tensor, rows: int) -> tuple[Any, Any]:
    """The products of a backend, and the offsets as it reads them."""
    if backend == "triton":
        # Imported here: Triton may be missing.
        return importlib.import_module("lora_kernels.ops.grouped_lora.kernel"), offsets
    return importlib.import_module("lora_kernels.ops.grouped_lora._torch"), bounds_of(offsets, rows)


def _cpp_layer(
    dtype: torch.dtype, rows: int, offsets: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float,
    mask: Mask | None,
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:  # fmt: skip
    """Tensors that must live until the call is over, and the numbers that C++ is told of them."""
    offsets = offsets.to(torch.int64).contiguous()
    bounds_of(offsets, rows)
    a, b = cast(a, torch.float32).contiguous(), cast(b, torch.float32).contiguous()
    drop = (0, 0, 0) if mask is None else (mask.threshold, int(mask.seed) & _WORD, mask.stream)
    experts, rank, inputs = a.shape
    return (offsets, a, b), (
        dtype == torch.bfloat16, offsets.data_ptr(), experts, rows, inputs, b.shape[1], rank, a.data_ptr(),
        b.data_ptr(), scaling, *drop, torch.get_num_threads(),
    )  # fmt: skip
