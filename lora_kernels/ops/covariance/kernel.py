"""Triton kernels of the covariance op.

    C[i, j] += sum_t  x[t, i] * w[t] * x[t, j]          for i >= j           syrk_kernel (+ add_tiles)
    s[j]    += sum_t  w[t] * x[t, j]                                          column_sums

One program per tile of the lower triangle loops over tokens; both operands are loads of the same rows, the left one
directly transposed (its contiguous axis is the tile's row axis). Where the matrix has few tiles the tokens are split
over programs, whose partial tiles a second kernel adds in fixed order: same input, same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._library import add_product, adds
from lora_kernels.ops._reduce import AOT_DTYPES, add_tiles, aot_case, aot_configs, column_sums
from lora_kernels.ops._rows import ALL, Selection
from lora_kernels.ops._tiles import (
    TileConfig,
    build_platform,
    capability_of,
    is_aligned,
    lower_tiles,
    parts_for,
    tile_map,
)
from lora_kernels.ops._tl import INTERPRETED, dot, finish_tile, token_rows

WIDE = TileConfig(128, 256, 64, 8, 3)
SQUARE = TileConfig(128, 128, 64, 8, 3)
# Hopper: Triton 3.6 serialises the matrix instructions of the square tile (ptxas C7515), of these it does not: of the
# first only where tokens are not split, which takes few tiles.
HOPPER_SQUARE = TileConfig(128, 128, 128, 8, 2)
HOPPER_HALF = TileConfig(64, 128, 64, 4, 4)
SMALL = TileConfig(64, 64, 64, 4, 4)
SINGLE = TileConfig(64, 64, 32, 4, 3)  # float32
RAGGED = TileConfig(64, 64, 32, 8, 3)  # not aligned: every element's address takes registers
# AMD: 64 KB of local memory hold two stages, and the wide tile spills registers where rows carry weights.
AMD_SQUARE = TileConfig(128, 128, 64, 8, 2)
AMD_SMALL = TileConfig(64, 64, 32, 4, 2)

_SQUARE_FROM, _HOPPER_SQUARE_FROM, _WIDE_FROM = 1024, 3072, 8192
# Features from which the library's product by blocks of rows is expected to win (a model; `benchmarks.gpu` times both).
_LIBRARY_FROM, _LIBRARY_ROWS = 4096, 1024


def config_for(
    features: int, dtype: torch.dtype, *, aligned: bool = True, capability: tuple[int, int] | None = (8, 0)
) -> TileConfig:
    """The configuration for x `(rows, features)`; `aligned` if loads can be vectorised, no `capability` on AMD."""
    large = aligned and dtype != torch.float32 and features >= _SQUARE_FROM
    if capability is None:
        return AMD_SQUARE if large else AMD_SMALL
    if not aligned:
        return RAGGED
    if dtype == torch.float32:
        return SINGLE
    if not large:
        return SMALL
    if features >= _WIDE_FROM:
        return WIDE
    if capability != (9, 0):
        return SQUARE
    return HOPPER_SQUARE if features >= _HOPPER_SQUARE_FROM else HOPPER_HALF


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def syrk_kernel(
    out_ptr,  # (n, n) float32, lower triangle
    partial_ptr,  # (splits, tiles, ROWS, COLUMNS) float32, if SPLIT
    x_ptr,  # (rows of x, n)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    weight_ptr,  # (n_tokens,) float32, if HAS_WEIGHT
    tiles_ptr,  # (tiles,) int32, tile row << 16 | tile column
    size,
    n_tokens,
    chunk,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    TWO_SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the sum, over one part of the tokens: added to `out`, or stored in `partial` if SPLIT."""
    packed = tl.load(tiles_ptr + tl.program_id(0))
    rows = (packed >> 16) * ROWS + tl.arange(0, ROWS)
    columns = (packed & 0xFFFF) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = token_rows(index_ptr, token, last, HAS_INDEX) * x_stride
        left = tl.load(
            x_ptr + row[None, :] + rows[:, None], mask=(token[None, :] < last) & (rows[:, None] < size), other=0.0
        )
        right = tl.load(
            x_ptr + row[:, None] + columns[None, :],
            mask=(token[:, None] < last) & (columns[None, :] < size),
            other=0.0,
        )
        if HAS_WEIGHT:
            # On the right operand only: weighting the left one serialises the tensor-core pipeline (ptxas C7515).
            weight = tl.load(weight_ptr + token, mask=token < last, other=0.0)
            right = (right.to(tl.float32) * weight[:, None]).to(right.dtype)
        acc = dot(left, right, acc, PRECISION, UPCAST)
    finish_tile(out_ptr, partial_ptr, packed, acc, size, size, out_stride, ROWS, COLUMNS, SPLIT, TWO_SLICES, True)


def covariance(
    out: torch.Tensor,
    x: torch.Tensor,
    selected: Selection = ALL,
    column_sum: torch.Tensor | None = None,
    config: TileConfig | None = None,
    least_chunk: int = 1024,
) -> None:
    """Launch the kernels on matrices of unit column stride; without `config`, large sums of rows are the library's."""
    features, tokens = x.shape[1], selected.count(x)
    if tokens == 0 or features == 0:
        return
    selected = selected.to(torch.float32)
    if column_sum is not None:
        column_sums(column_sum, x, *selected)
    plain = config is None and selected.rows is None and selected.weight is None
    if plain and features >= _LIBRARY_FROM and adds(x.device, x.dtype):
        for low in range(0, features, _LIBRARY_ROWS):
            high = min(low + _LIBRARY_ROWS, features)
            add_product(out[low:high, :high], x[:, low:high].mT, x[:, :high])
        return
    config = config or config_for(features, x.dtype, aligned=is_aligned(out, x), capability=capability_of(x.device))
    tiles = tile_map(lower_tiles, (features, config.rows, config.columns), x.device)
    splits, chunk = parts_for(tiles.numel(), tokens, config.tokens, x.device, least_chunk)
    area = tiles.numel() * config.rows * config.columns
    partial = torch.empty(splits * area, dtype=torch.float32, device=x.device) if splits > 1 else out
    constants = constants_of(
        config.warps, config.stages, **selected.flags(), SPLIT=splits > 1, UPCAST=INTERPRETED,
        **config.constants(x.dtype, build_platform()),
    )  # fmt: skip
    launch(
        syrk_kernel, (tiles.numel(), splits, 1), (out, partial, *selected.pointers(x), tiles),
        (features, tokens, chunk, x.stride(0), out.stride(0)), constants,
    )  # fmt: skip
    if splits > 1:
        add_tiles(out, partial, tiles, splits, config, lower=True)


def aot_cases() -> Iterator[dict[str, Any]]:
    """Yield every form of `syrk_kernel` that `covariance` launches; see `_reduce.aot_cases`."""
    for aligned, (dtype, x) in itertools.product((True, False), AOT_DTYPES.items()):
        configs = aot_configs(
            lambda capability: (
                config_for(features, dtype, aligned=aligned, capability=capability)  # noqa: B023
                for features in (64, _SQUARE_FROM, _HOPPER_SQUARE_FROM, _WIDE_FROM)
            )
        )
        for (config, where), flags in itertools.product(configs, itertools.product((False, True), repeat=3)):
            index, weight, split = flags
            if split and config == HOPPER_SQUARE:
                continue
            constexprs = {**config.constants(dtype, where["platform"]), "HAS_INDEX": index}
            constexprs |= {"HAS_WEIGHT": weight, "SPLIT": split, "UPCAST": False}
            label = f"{x} {config.rows}x{config.columns}x{config.tokens}"
            yield aot_case(syrk_kernel, label, constexprs, {"x_ptr": f"*{x}"}, config, aligned=aligned, **where)
