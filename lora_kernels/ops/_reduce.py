"""Reductions shared by the Triton ops, all in two stages and in fixed order: same input, same bits.

out[i, j] += sum_s  partial[s, i, j]                       add_tiles_kernel
out[j]    += sum_t  w[t] * x[t, j]    (or x[t, j]^2)       column_sum_kernel, then add_rows_kernel
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._rows import Selection
from lora_kernels.ops._tiles import MOST_PROGRAMS, TileConfig, processors, token_splits
from lora_kernels.ops._tl import add_tile, token_rows

_SUM_COLUMNS, _SUM_TOKENS = 128, 16
# A part's tokens are added one after the other in float32, 16 at a time: at most this many keep rounding errors apart.
_SUM_CHUNK = 4096
_STRIP = 16
Config = TypeVar("Config")


@triton.jit(do_not_specialize=["splits"])
def add_tiles_kernel(
    out_ptr,  # (height, width) float32; (height, height), lower triangle, if LOWER
    partial_ptr,  # (splits, tiles, ROWS, COLUMNS) float32
    tiles_ptr,  # (tiles,) int32, tile row << 16 | tile column
    height,
    width,
    splits,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    LOWER: tl.constexpr,
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
    add_tile(out_ptr, rows, columns, height, width, out_stride, acc, LOWER)


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def column_sum_kernel(
    partial_ptr,  # (splits, n) float32
    x_ptr,  # (rows of x, n)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    weight_ptr,  # (n_tokens,) float32, if HAS_WEIGHT
    size,
    n_tokens,
    chunk,
    x_stride,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SQUARE: tl.constexpr,
):
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
    size,
    splits,
    COLUMNS: tl.constexpr,
):
    """Add the partial sums, in order, to `out`."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS,), dtype=tl.float32)
    for split in range(0, splits):
        offset = tl.cast(split, tl.int64) * size
        acc += tl.load(partial_ptr + offset + columns, mask=columns < size, other=0.0)
    acc += tl.load(out_ptr + columns, mask=columns < size, other=0.0)
    tl.store(out_ptr + columns, acc, mask=columns < size)


def add_tiles(
    out: torch.Tensor, partial: torch.Tensor, tiles: torch.Tensor, splits: int, config: TileConfig, *, lower: bool
) -> None:
    """Add partial tiles to a matrix with unit column stride, or to its lower triangle only."""
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


# The compute capabilities of the chips that configurations are compiled for ahead of time; `None` is AMD's.
AOT_CHIPS: dict[str, tuple[int, int] | None] = {
    "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0),
    "sm_100": (10, 0), "sm_120": (12, 0), "gfx942": None,
}  # fmt: skip
AOT_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def aot_case(
    kernel: Any, label: str, constexprs: dict[str, Any], types: Any = None, config: Any = None, **rest: Any
) -> dict[str, Any]:
    """Describe a launch (see `aot_cases`), named by kernel, label and flags; `types` are those that are not usual."""
    known = {"index_ptr": "*i64", "tiles_ptr": "*i32", **(types or {})}
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: known.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    shown = ("HAS_INDEX", "HAS_WEIGHT", "SPLIT", "SQUARE", "LOWER")
    flags = [key.removeprefix("HAS_").lower() for key in shown if constexprs.get(key)]
    name = " ".join((kernel.__name__.removesuffix("_kernel"), *label.split(), *flags))
    case = {"name": name, "kernel": kernel, "signature": signature, "constexprs": constexprs}
    launch = (4, 3) if config is None else (config.warps, config.stages)  # of Triton itself without one
    return {**case, **dict(zip(("warps", "stages"), launch, strict=True)), "matrix": config is not None, **rest}


def aot_configs(choices: Callable[[tuple[int, int] | None], Iterable[Config]]) -> list[tuple[Config, dict[str, Any]]]:
    """The configurations that chips choose by capability, with their `platform` and `chips`."""
    chips_of: dict[tuple[Config, str], list[str]] = {}
    for chip, capability in AOT_CHIPS.items():
        for config in dict.fromkeys(choices(capability)):
            chips_of.setdefault((config, "hip" if capability is None else "cuda"), []).append(chip)
    return [(config, {"platform": where, "chips": tuple(chips)}) for (config, where), chips in chips_of.items()]


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every combination that the functions here launch, for the ahead-of-time compile check (`benchmarks/aot.py`).

    Yields:
        Keyword descriptions: `name`, `kernel`, `signature` (argument types), `constexprs`, `warps`, `stages`,
        `matrix` (whether the chip's own tensor-core instruction must be there), `platform` (`cuda` or `hip`),
        `aligned` (whether sizes, strides and addresses are multiples of 16; if not, they may also be 1), and `chips`
        where not all of the platform's run it.
    """
    for platform, aligned in itertools.product(("cuda", "hip"), (True, False)):
        where: dict[str, Any] = {"platform": platform, "aligned": aligned}
        forms = [form for form in itertools.product((0, 1), repeat=3) if form[0] + form[2] < 2]  # squares: of all rows
        for x, (index, weight, square) in itertools.product(AOT_DTYPES.values(), forms):
            constexprs = {"COLUMNS": _SUM_COLUMNS, "TOKENS": _SUM_TOKENS}
            constexprs |= {"HAS_INDEX": bool(index), "HAS_WEIGHT": bool(weight), "SQUARE": bool(square)}
            yield aot_case(column_sum_kernel, x, constexprs, {"x_ptr": f"*{x}"}, **where)
        for (rows, columns), lower in itertools.product(((64, 64), (64, 128), (128, 128), (128, 256)), (0, 1)):
            constexprs = {"ROWS": rows, "COLUMNS": columns, "STRIP": _STRIP, "LOWER": bool(lower)}
            yield aot_case(add_tiles_kernel, f"{rows}x{columns}", constexprs, **where)
        yield aot_case(add_rows_kernel, "", {"COLUMNS": _SUM_COLUMNS}, **where)
