"""Triton kernels of the covariance op.

    C[i, j] += sum_t  x[t, i] * w[t] * x[t, j]          for i >= j           syrk_kernel (+ add_tiles_kernel)
    s[j]    += sum_t  w[t] * x[t, j]                                          column_sum_kernel (+ add_rows_kernel)

One program per tile of the lower triangle loops over tokens; both operands are loads of the same rows, the left one
directly transposed (its contiguous axis is the tile's row axis). Where the matrix has few tiles the tokens are split
over programs, whose partial tiles a second kernel adds in fixed order: same input, same bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops import _tiles
from lora_kernels.ops._backend import interpreting
from lora_kernels.ops._tl import add_lower, dot, halves


@dataclass(frozen=True)
class SyrkConfig:
    """Tile sizes and launch shape of `syrk_kernel`.

    Attributes:
        rows: tile rows.
        columns: tile columns; a tile of 256 is written in two halves, as one would spill registers.
        tokens: tokens per step of the loop.
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int

    @property
    def two_slices(self) -> bool:
        """Whether the epilogue goes by halves."""
        return self.columns > 128


WIDE = SyrkConfig(128, 256, 64, 8, 3)
SQUARE = SyrkConfig(128, 128, 64, 8, 3)
SMALL = SyrkConfig(64, 64, 64, 4, 4)
SINGLE = SyrkConfig(64, 64, 32, 4, 3)  # float32
RAGGED = SyrkConfig(64, 64, 32, 8, 3)  # not aligned: every element's address takes registers
# AMD: 64 KB of local memory hold two stages, and the wide tile spills registers where rows carry weights.
AMD_SQUARE = SyrkConfig(128, 128, 64, 8, 2)
AMD_SMALL = SyrkConfig(64, 64, 32, 4, 2)

_SQUARE_FROM, _WIDE_FROM = 1024, 8192
_SUM_COLUMNS, _SUM_TOKENS = 128, 16
_STRIP = 16


def config_for(features: int, dtype: torch.dtype, *, aligned: bool = True, platform: str | None = None) -> SyrkConfig:
    """The configuration for a shape; one table per platform until a measurement says otherwise.

    Args:
        features: n.
        dtype: of x.
        aligned: whether loads can be vectorised; the larger tiles spill registers where they cannot.
        platform: `cuda` or `hip`; by default what this torch was built for.

    Returns:
        The configuration.
    """
    platform = platform or _platform()
    large = aligned and dtype != torch.float32 and features >= _SQUARE_FROM
    if platform == "hip":
        return AMD_SQUARE if large else AMD_SMALL
    if not aligned:
        return RAGGED
    if dtype == torch.float32:
        return SINGLE
    if not large:
        return SMALL
    return WIDE if features >= _WIDE_FROM else SQUARE


def _platform() -> str:
    return "cuda" if torch.version.hip is None else "hip"


def is_aligned(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether Triton will find every size, stride and address to be a multiple of 16, and so vectorise loads.

    Args:
        out: `(n, n)`.
        x: `(rows, n)`.

    Returns:
        True if all are.
    """
    return all(each % 16 == 0 for each in (x.shape[1], x.stride(0), out.stride(0), x.data_ptr(), out.data_ptr()))


@triton.jit
def _rows(index_ptr, token, last, HAS_INDEX: tl.constexpr):
    if HAS_INDEX:
        return tl.load(index_ptr + token, mask=token < last, other=0)
    return token.to(tl.int64)


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
        row = _rows(index_ptr, token, last, HAS_INDEX) * x_stride
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
    if SPLIT:
        slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(partial_ptr + slot * (ROWS * COLUMNS) + inner, acc)
    elif TWO_SLICES:
        low, high = halves(acc, ROWS, COLUMNS)
        half = (packed & 0xFFFF) * COLUMNS + tl.arange(0, COLUMNS // 2)
        add_lower(out_ptr, rows, half, size, out_stride, low)
        add_lower(out_ptr, rows, half + COLUMNS // 2, size, out_stride, high)
    else:
        add_lower(out_ptr, rows, columns, size, out_stride, acc)


@triton.jit(do_not_specialize=["splits"])
def add_tiles_kernel(
    out_ptr,  # (n, n) float32, lower triangle
    partial_ptr,  # (splits, tiles, ROWS, COLUMNS) float32
    tiles_ptr,  # (tiles,) int32
    size,
    splits,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
):
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
    add_lower(out_ptr, rows, columns, size, out_stride, acc)


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def column_sum_kernel(
    partial_ptr,  # (splits, n) float32
    x_ptr,  # (rows of x, n)
    index_ptr,  # (n_tokens,) int64
    weight_ptr,  # (n_tokens,) float32
    size,
    n_tokens,
    chunk,
    x_stride,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The weighted sum of a block of columns over one part of the tokens."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = _rows(index_ptr, token, last, HAS_INDEX) * x_stride
        mask = (token[:, None] < last) & (columns[None, :] < size)
        values = tl.load(x_ptr + row[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            values *= tl.load(weight_ptr + token, mask=token < last, other=0.0)[:, None]
        acc += values
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * size + columns, tl.sum(acc, axis=0), mask=columns < size)


@triton.jit(do_not_specialize=["splits"])
def add_rows_kernel(
    out_ptr,  # (n,) float32
    partial_ptr,  # (splits, n) float32
    size,
    splits,
    COLUMNS: tl.constexpr,
):
    """Add the partial sums, in order, to `out`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.load(out_ptr + columns, mask=columns < size, other=0.0)
    for split in range(0, splits):
        offset = tl.cast(split, tl.int64) * size
        acc += tl.load(partial_ptr + offset + columns, mask=columns < size, other=0.0)
    tl.store(out_ptr + columns, acc, mask=columns < size)


def _processors(device: torch.device) -> int:
    # In the interpreter any number serves; 4 lets small tests reach the split path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _precision(dtype: torch.dtype, platform: str) -> str:
    # Three tf32 products recover float32 accuracy on CUDA; HIP has no such mode but multiplies float32 natively.
    return "tf32x3" if dtype == torch.float32 and platform == "cuda" else "ieee"


@functools.lru_cache(maxsize=64)
def _tile_map(features: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    # Kept: a model calls with a handful of widths, and the copy to the device would stall every call.
    tiles = _tiles.lower_tiles(features, rows, columns)
    return torch.tensor([i << 16 | j for i, j in tiles], dtype=torch.int32).to(device)


def covariance(
    out: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    column_sum: torch.Tensor | None,
    config: SyrkConfig | None = None,
    least_chunk: int = 1024,
) -> None:
    """Launch the kernels.

    Args:
        out: `(n, n)` float32 with unit column stride.
        x: `(rows, n)` with unit column stride.
        index: `(tokens,)` int64 rows that count, or `None` for all.
        weight: `(tokens,)` float32, or `None`.
        column_sum: `(n,)` float32 contiguous, or `None`.
        config: tile sizes; `config_for` by default.
        least_chunk: tokens that a split has at least.
    """
    features = x.shape[1]
    tokens = x.shape[0] if index is None else index.shape[0]
    if tokens == 0 or features == 0:
        return
    config = config or config_for(features, x.dtype, aligned=is_aligned(out, x))
    tiles = _tile_map(features, config.rows, config.columns, x.device)
    splits = _tiles.token_splits(tiles.numel(), tokens, _processors(x.device), least=least_chunk)
    chunk = -(-tokens // splits)
    if splits > 1:  # whole steps: no part but the last has a ragged end
        chunk = -(-chunk // config.tokens) * config.tokens
    splits = -(-tokens // chunk)
    partial = out
    if splits > 1:
        area = tiles.numel() * config.rows * config.columns
        partial = torch.empty(splits * area, dtype=torch.float32, device=x.device)
    # A pointer that a flag switches off must still be one.
    operands = (x, x if index is None else index, x if weight is None else weight)
    flags = {"HAS_INDEX": index is not None, "HAS_WEIGHT": weight is not None}
    syrk_kernel[(tiles.numel(), splits)](
        out,
        partial,
        *operands,
        tiles,
        features,
        tokens,
        chunk,
        x.stride(0),
        out.stride(0),
        ROWS=config.rows,
        COLUMNS=config.columns,
        TOKENS=config.tokens,
        SPLIT=splits > 1,
        TWO_SLICES=config.two_slices,
        PRECISION=_precision(x.dtype, _platform()),
        UPCAST=interpreting(),
        num_warps=config.warps,
        num_stages=config.stages,
        **flags,
    )
    if splits > 1:
        add_tiles_kernel[(tiles.numel(), config.rows // _STRIP)](
            out, partial, tiles, features, splits, out.stride(0),
            ROWS=config.rows, COLUMNS=config.columns, STRIP=_STRIP,
        )  # fmt: skip
    if column_sum is not None:
        blocks = -(-features // _SUM_COLUMNS)
        splits = _tiles.token_splits(blocks, tokens, _processors(x.device), least=256)
        chunk = -(-tokens // splits)
        splits = -(-tokens // chunk)
        sums = torch.empty(splits * features, dtype=torch.float32, device=x.device)
        column_sum_kernel[(blocks, splits)](
            sums, *operands, features, tokens, chunk, x.stride(0), COLUMNS=_SUM_COLUMNS, TOKENS=_SUM_TOKENS, **flags
        )
        add_rows_kernel[(blocks,)](column_sum, sums, features, splits, COLUMNS=_SUM_COLUMNS)


_AOT_TYPES = {
    "out_ptr": "*fp32", "partial_ptr": "*fp32", "index_ptr": "*i64", "weight_ptr": "*fp32", "tiles_ptr": "*i32",
    "size": "i32", "n_tokens": "i32", "chunk": "i32", "x_stride": "i32", "out_stride": "i32", "splits": "i32",
}  # fmt: skip
_AOT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _aot_case(kernel: Any, label: str, constexprs: dict[str, Any], x: str = "fp32", **rest: Any) -> dict[str, Any]:
    types = {**_AOT_TYPES, "x_ptr": f"*{x}"}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    flags = [key.removeprefix("HAS_").lower() for key in ("HAS_INDEX", "HAS_WEIGHT", "SPLIT") if constexprs.get(key)]
    name = " ".join((kernel.__name__.removesuffix("_kernel"), *label.split(), *flags))
    case = {"name": name, "kernel": kernel, "signature": signature, "constexprs": constexprs}
    return {**case, "warps": 4, "stages": 3, "matrix": False, **rest}


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every combination that `covariance` launches, for the ahead-of-time compile check (`benchmarks/aot.py`).

    Yields:
        Keyword descriptions: `name`, `kernel`, `signature` (argument types), `constexprs`, `warps`, `stages`,
        `matrix` (whether the chip's own tensor-core instruction must be there), `platform` (`cuda` or `hip`),
        `aligned` (whether sizes, strides and addresses are multiples of 16; if not, they may also be 1).
    """
    for platform, aligned in itertools.product(("cuda", "hip"), (True, False)):
        where: dict[str, Any] = {"platform": platform, "aligned": aligned}
        configs = set()
        for dtype, x in _AOT_DTYPES.items():
            for features in (64, _SQUARE_FROM, _WIDE_FROM):
                config = config_for(features, dtype, aligned=aligned, platform=platform)
                if (config, dtype) in configs:
                    continue
                configs.add((config, dtype))
                for index, weight, split in ((0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)):
                    yield _aot_case(
                        syrk_kernel,
                        f"{x} {config.rows}x{config.columns}x{config.tokens}",
                        {
                            "ROWS": config.rows,
                            "COLUMNS": config.columns,
                            "TOKENS": config.tokens,
                            "HAS_INDEX": bool(index),
                            "HAS_WEIGHT": bool(weight),
                            "SPLIT": bool(split),
                            "TWO_SLICES": config.two_slices,
                            "PRECISION": _precision(dtype, platform),
                            "UPCAST": False,
                        },
                        x,
                        **{**where, "warps": config.warps, "stages": config.stages, "matrix": True},
                    )
            for index, weight in ((0, 0), (1, 0), (1, 1)):
                constexprs = {"COLUMNS": _SUM_COLUMNS, "TOKENS": _SUM_TOKENS}
                constexprs |= {"HAS_INDEX": bool(index), "HAS_WEIGHT": bool(weight)}
                yield _aot_case(column_sum_kernel, x, constexprs, x, **where)
        for rows, columns in sorted({(config.rows, config.columns) for config, _ in configs}):
            constexprs = {"ROWS": rows, "COLUMNS": columns, "STRIP": _STRIP}
            yield _aot_case(add_tiles_kernel, f"{rows}x{columns}", constexprs, **where)
        yield _aot_case(add_rows_kernel, "", {"COLUMNS": _SUM_COLUMNS}, **where)
