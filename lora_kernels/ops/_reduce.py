"""Reductions over tokens shared by the Triton ops, all in fixed order: same input, same bits.

out[i, j] += sum_t  left[t, i] * w[t] * right[t, j]        product_kernel, then add_tiles_kernel
out[j]    += sum_t  w[t] * x[t, j]    (or x[t, j]^2)       column_sum_kernel, then add_rows_kernel

One program per tile of the product loops over tokens; the left operand is loaded directly transposed (its contiguous
axis is the tile's row axis). Where the result has few tiles the tokens are split over programs, whose partial tiles the
second kernel adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._rows import Selection
from lora_kernels.ops._tiles import (
    MOST_PROGRAMS,
    TileConfig,
    build_platform,
    grouped_tiles,
    lower_tiles,
    parts_for,
    processors,
    tile_map,
    token_splits,
)
from lora_kernels.ops._tl import INTERPRETED, add_tile, dot, finish_tile, load_tile, token_rows

_SUM_COLUMNS, _SUM_TOKENS = 128, 16
# A part's tokens are added one after the other in float32, 16 at a time: at most this many keep rounding errors apart.
_SUM_CHUNK = 4096
_STRIP = 16


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def product_kernel(
    out_ptr,  # (m, n) float32; the lower triangle of (n, n) if LOWER
    partial_ptr,  # (splits, tiles, ROWS, COLUMNS) float32, if SPLIT
    left_ptr,  # (rows of left, m); not read if LOWER, where the right operand is both
    x_ptr,  # the right operand: (rows of x, n)
    index_ptr,  # (n_tokens,) int64 rows of both, if HAS_INDEX
    weight_ptr,  # (n_tokens,) float32, if HAS_WEIGHT
    scale_ptr,  # (1,) float32, if HAS_SCALE: multiplies the sum
    tiles_ptr,  # (tiles,) int32, tile row << 16 | tile column
    height, width, n_tokens, chunk, left_stride, x_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr, SPLIT: tl.constexpr, LOWER: tl.constexpr,
    TWO_SLICES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the sum, over one part of the tokens: added to `out`, or stored in `partial` if SPLIT."""
    if LOWER:
        left_ptr, left_stride, height = x_ptr, x_stride, width
    packed = tl.load(tiles_ptr + tl.program_id(0))
    rows = (packed >> 16) * ROWS + tl.arange(0, ROWS)
    columns = (packed & 0xFFFF) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = token_rows(index_ptr, token, last, HAS_INDEX)
        left = load_tile(
            left_ptr + (row * left_stride)[None, :] + rows[:, None], token[None, :] < last, rows[:, None] < height
        )
        right = load_tile(
            x_ptr + (row * x_stride)[:, None] + columns[None, :], token[:, None] < last, columns[None, :] < width
        )
        if HAS_WEIGHT:
            # On the right operand only: weighting the left one serialises the tensor-core pipeline (ptxas C7515).
            weight = tl.load(weight_ptr + token, mask=token < last, other=0.0)
            right = (right.to(tl.float32) * weight[:, None]).to(right.dtype)
        acc = dot(left, right, acc, PRECISION, UPCAST)
    if HAS_SCALE:
        acc *= tl.load(scale_ptr)
    finish_tile(out_ptr, partial_ptr, packed, acc, height, width, out_stride, ROWS, COLUMNS, SPLIT, TWO_SLICES, LOWER)


@triton.jit(do_not_specialize=["splits"])
def add_tiles_kernel(
    out_ptr,  # (height, width) float32; (height, height), lower triangle, if LOWER
    partial_ptr,  # (splits, tiles, ROWS, COLUMNS) float32
    tiles_ptr,  # (tiles,) int32, tile row << 16 | tile column
    height, width, splits, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIP: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Add the partial tiles, in order, to `out`; a program per strip of a tile."""
    tile = tl.program_id(0)
    packed = tl.load(tiles_ptr + tile)
    strip = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    inner = strip[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    acc = tl.zeros((STRIP, COLUMNS), dtype=tl.float32)
    for split in range(0, splits):
        slot = tl.cast(split, tl.int64) * tl.num_programs(0) + tile
        acc += tl.load(partial_ptr + slot * (ROWS * COLUMNS) + inner)
    rows = (packed >> 16) * ROWS + strip
    columns = (packed & 0xFFFF) * COLUMNS + tl.arange(0, COLUMNS)
    add_tile(out_ptr, rows, columns, height, width, out_stride, acc, LOWER)


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def column_sum_kernel(
    partial_ptr,  # (splits, n) float32
    x_ptr,  # (rows of x, n)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    weight_ptr,  # (n_tokens,) float32, if HAS_WEIGHT
    size, n_tokens, chunk, x_stride,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    SQUARE: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a block of columns, or of their squares, over one part of the tokens."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = token_rows(index_ptr, token, last, HAS_INDEX) * x_stride
        mask = (token[:, None] < last) & (columns[None, :] < size)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + token, mask=token < last, other=0.0)[:, None]
            mask = mask & (weight != 0.0)  # such a row is not read: it may hold anything
        values = tl.load(x_ptr + row[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if SQUARE:
            values *= values
        if HAS_WEIGHT:
            values *= weight
        acc += values
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * size + columns, tl.sum(acc, axis=0), mask=columns < size)


@triton.jit(do_not_specialize=["splits"])
def add_rows_kernel(
    out_ptr,  # (n,) float32
    partial_ptr,  # (splits, n) float32
    size, splits,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the partial sums, in order, to `out`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    for split in range(0, splits):
        offset = tl.cast(split, tl.int64) * size
        acc += tl.load(partial_ptr + offset + columns, mask=columns < size, other=0.0)
    acc += tl.load(out_ptr + columns, mask=columns < size, other=0.0)
    tl.store(out_ptr + columns, acc, mask=columns < size)


def add_weighted_product(
    out: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor,
    selected: Selection,
    config: TileConfig,
    least_chunk: int,
    scale: torch.Tensor | None = None,
) -> None:
    """`out += scale * left^T diag(w) right` over the selected rows of matrices with unit column stride.

    Without `left`, which is then `right`, only the lower triangle of `out` `(n, n)`.
    """
    lower, tokens, device = left is None, selected.count(right), right.device
    left = right if left is None else left
    order, size = (lower_tiles, out.shape[1:]) if lower else (grouped_tiles, out.shape)
    tiles = tile_map(order, (*size, config.rows, config.columns), device)
    splits, chunk = parts_for(tiles.numel(), tokens, config.tokens, device, least_chunk)
    area = tiles.numel() * config.rows * config.columns
    partial = torch.empty(splits * area, dtype=torch.float32, device=device) if splits > 1 else out
    launch(
        product_kernel, (tiles.numel(), splits, 1),
        # A pointer that a flag switches off must still be one.
        (out, partial, left, *selected.pointers(right), right if scale is None else scale, tiles),
        (*out.shape, tokens, chunk, left.stride(0), right.stride(0), out.stride(0)),
        constants_of(
            config.warps, config.stages, **selected.flags(), HAS_SCALE=scale is not None, SPLIT=splits > 1, LOWER=lower,
            UPCAST=INTERPRETED, **config.constants(right.dtype, build_platform()),
        ),
    )  # fmt: skip
    if splits > 1:
        launch(
            add_tiles_kernel, (tiles.numel(), config.rows // _STRIP, 1), (out, partial, tiles),
            (*out.shape, splits, out.stride(0)),
            constants_of(ROWS=config.rows, COLUMNS=config.columns, STRIP=_STRIP, LOWER=lower),
        )  # fmt: skip


def column_sums(
    total: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    square: bool = False,
    least_chunk: int = 256,
) -> None:
    """`total += sum_t w_t x_t`, or `sum_t w_t x_t^2`; x has unit column stride, and the sums are contiguous."""
    features, selected = x.shape[1], Selection(index, weight)
    tokens = selected.count(x)
    if tokens == 0 or features == 0:
        return
    blocks = -(-features // _SUM_COLUMNS)
    splits = token_splits(blocks, tokens, processors(x.device), least=least_chunk)
    chunk = -(-tokens // min(max(splits, -(-tokens // _SUM_CHUNK)), MOST_PROGRAMS))
    splits = -(-tokens // chunk)
    sums = torch.empty(splits * features, dtype=torch.float32, device=x.device)
    constants = constants_of(COLUMNS=_SUM_COLUMNS, TOKENS=_SUM_TOKENS, **selected.flags(), SQUARE=square)
    tensors, numbers = (sums, *selected.pointers(x)), (features, tokens, chunk, x.stride(0))
    launch(column_sum_kernel, (blocks, splits, 1), tensors, numbers, constants)
    constants = constants_of(COLUMNS=_SUM_COLUMNS)
    launch(add_rows_kernel, (blocks, 1, 1), (total, sums), (features, splits), constants)
