"""Triton kernels of the sketch ops.

    P[t, c]   = sum_i  x[t, i] * Omega[i, c]            shrink_kernel (+ combine_kernel, which weighs: w[t] * P[t, c])
    out[i, c] += sum_t  x[t, i] * P[t, c]               tall_kernel (+ add_kernel)

Both read their wide operand once and are bound by memory. Tokens go by chunks whose rows stay in the second-level cache
between the two kernels. Signs are made in the loop of `shrink_kernel`; gaussian draws would cost more there than the
product (KERNELS F9), so they are drawn into a scratch of the cache's size. Columns beyond k are computed and dropped:
a larger Omega has the smaller one as its corner.

P keeps float32's accuracy, as reconstructions from sketches need it. Where the rows are bfloat16, P is a pair, rounded
part and rest, side by side in one operand: one product of twice the width on the 16-bit units, exact to 2^-17. The
exponents of float16 are too narrow for that (P may overflow): such rows are widened, as float32 ones are multiplied, in
three tf32 products. A gaussian Omega meets 16-bit rows as a pair as well.

Here are the kernels, their configurations, and what of them is compiled ahead of time. `_launch.py` launches them:

- it draws a gaussian Omega;
- it cuts tokens into chunks that the cache holds, and features or tokens into parts that fill the device;
- it adds the parts, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._reduce import AOT_DTYPES, aot_case
from lora_kernels.ops._tiles import build_platform, precision
from lora_kernels.ops._tl import dot, halves, philox, token_rows


@dataclass(frozen=True)
class SketchConfig:
    """Tile sizes and launch shape of one of the two products.

    Attributes:
        tokens: tokens per tile (`shrink_kernel`) or per step (`tall_kernel`).
        features: features per step (`shrink_kernel`) or per tile (`tall_kernel`).
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    tokens: int
    features: int
    warps: int
    stages: int


SHRINK = SketchConfig(64, 64, 4, 4)
SHRINK_SINGLE = SketchConfig(64, 16, 8, 2)  # float32: longer steps, more of them, or fewer warps, spill registers
SHRINK_RAGGED = SketchConfig(64, 32, 4, 3)  # not aligned: every element's address takes registers
SHRINK_AMD = SketchConfig(64, 32, 8, 2)
SHRINK_AMD_SINGLE = SketchConfig(64, 32, 8, 2)
TALL = SketchConfig(64, 128, 8, 4)
TALL_SINGLE = SketchConfig(32, 128, 8, 3)  # float16 and float32; with 4 warps sm_100 spills registers
TALL_RAGGED = SketchConfig(32, 64, 4, 3)
TALL_AMD = SketchConfig(32, 64, 4, 2)

LEAST_RANK, MOST_RANK = 16, 64
ROWS = 16  # of the elementwise kernels


def config_for(product: str, dtype: torch.dtype, *, aligned: bool = True, platform: str | None = None) -> SketchConfig:
    """The configuration of a product; one table per platform until a measurement says otherwise.

    Args:
        product: `shrink` or `tall`.
        dtype: of the rows.
        aligned: whether loads can be vectorised.
        platform: `cuda` or `hip`; by default what this torch was built for.

    Returns:
        The configuration.
    """
    shrink = product == "shrink"
    single = dtype == torch.float32
    if (platform or build_platform()) == "hip":
        return TALL_AMD if not shrink else SHRINK_AMD_SINGLE if single else SHRINK_AMD
    if shrink and single:
        return SHRINK_SINGLE
    if not aligned:
        return SHRINK_RAGGED if shrink else TALL_RAGGED
    if shrink:
        return SHRINK
    return TALL if dtype == torch.bfloat16 else TALL_SINGLE


def rank_for(columns: int) -> tuple[int, int]:
    """How the columns of Omega are tiled.

    Args:
        columns: k.

    Returns:
        The width of a tile (a power of two from 16 to 64) and the number of tiles.
    """
    rank = min(max(LEAST_RANK, triton.next_power_of_2(columns)), MOST_RANK)
    return rank, -(-columns // rank)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether Triton will find the width, the stride and the address of rows to be multiples of 16.

    Args:
        x: `(rows, n)`.

    Returns:
        True if all are.
    """
    return all(each % 16 == 0 for each in (x.shape[1], x.stride(0), x.data_ptr()))


@triton.jit
def sign_tile(feature, block, stream, key0, key1, FEATURES: tl.constexpr, RANK: tl.constexpr, TYPE: tl.constexpr):
    """Rows `feature` and columns `block * RANK ...` of the Rademacher matrix; RANK at most 64."""
    zero = tl.zeros((FEATURES,), dtype=tl.uint32)
    column = block * RANK
    words = philox(zero + (column // 128).to(tl.uint32), feature.to(tl.uint32), zero + stream, zero, key0, key1)
    place = (column % 128) // 32
    lane = tl.arange(0, RANK)
    low, high = tl.where(place < 2, words[0], words[2]), tl.where(place < 2, words[1], words[3])
    if RANK == 64:  # two words, from an even one on
        word = tl.where(lane[None, :] < 32, low[:, None], high[:, None])
    else:
        word = tl.where(place % 2 == 0, low, high)[:, None]
    shift = (column % 32 + lane) % 32
    minus = (word >> shift[None, :].to(tl.uint32)) & 1
    return tl.where(minus != 0, -1.0, 1.0).to(TYPE)


@triton.jit(do_not_specialize=["n_tokens", "steps", "seed_low", "seed_high", "stream"])
def shrink_kernel(
    out_ptr,  # (splits, n_tokens, out_stride) float32
    x_ptr,  # (rows of x, size)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    omega_ptr,  # (1 or 2 if PAIR, size, blocks * RANK) of x's dtype, if not SIGNS
    size,
    n_tokens,
    columns,
    steps,
    x_stride,
    out_stride,
    seed_low,
    seed_high,
    stream,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SIGNS: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of P over one part of the features. Programs that share rows of x are neighbours."""
    block = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    lane = block * RANK + tl.arange(0, RANK)
    width = tl.num_programs(0) * RANK
    row = token_rows(index_ptr, token, n_tokens, HAS_INDEX) * x_stride
    # Whole steps, so that the compiler knows what every address is a multiple of: else no load is vectorised.
    first = tl.program_id(2) * (steps * FEATURES)
    last = tl.minimum(first + steps * FEATURES, size)
    acc = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    rest = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(first, last, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        x = tl.load(
            x_ptr + row[:, None] + feature[None, :],
            mask=(token[:, None] < n_tokens) & (feature[None, :] < size),
            other=0.0,
        )
        if SIGNS:
            key0, key1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
            omega = sign_tile(feature, block, tl.cast(stream, tl.uint32), key0, key1, FEATURES, RANK, x.dtype)
            acc = dot(x, omega, acc, PRECISION, UPCAST)
        else:
            at = omega_ptr + feature[:, None].to(tl.int64) * width + lane[None, :]
            acc = dot(x, tl.load(at, mask=feature[:, None] < size, other=0.0), acc, PRECISION, UPCAST)
            if PAIR:  # an accumulator of its own: two dots on one are miscompiled on Blackwell
                at += tl.cast(size, tl.int64) * width
                rest = dot(x, tl.load(at, mask=feature[:, None] < size, other=0.0), rest, PRECISION, UPCAST)
    if PAIR:
        acc += rest
    place = (tl.program_id(2).to(tl.int64) * n_tokens + token)[:, None] * out_stride + lane[None, :]
    tl.store(out_ptr + place, acc, mask=(token[:, None] < n_tokens) & (lane[None, :] < columns))


@triton.jit(do_not_specialize=["n_tokens", "splits"])
def combine_kernel(
    out_ptr,  # (n_tokens, out_stride): float32, or blocks of RANK rounded numbers and their RANK rests if PAIR
    partial_ptr,  # (splits, n_tokens, blocks * RANK) float32
    weight_ptr,  # (n_tokens,) float32, if HAS_WEIGHT
    n_tokens,
    splits,
    columns,
    out_stride,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Add the parts of P in order, weigh its rows, and store it as the second product wants it."""
    block = tl.program_id(0)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, RANK)
    width = tl.num_programs(0) * RANK
    mask = (token[:, None] < n_tokens) & (block * RANK + lane[None, :] < columns)
    acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for split in range(0, splits):
        place = (tl.cast(split, tl.int64) * n_tokens + token)[:, None] * width + block * RANK + lane[None, :]
        acc += tl.load(partial_ptr + place, mask=mask, other=0.0)
    if HAS_WEIGHT:
        acc *= tl.load(weight_ptr + token, mask=token < n_tokens, other=0.0)[:, None]
    pointers = out_ptr + token[:, None].to(tl.int64) * out_stride + lane[None, :]
    if PAIR:
        high = acc.to(out_ptr.dtype.element_ty)
        pointers += block * (2 * RANK)
        tl.store(pointers, high, mask=mask)
        tl.store(pointers + RANK, (acc - high.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(pointers + block * RANK, acc, mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def tall_kernel(
    partial_ptr,  # (splits, size, blocks * RANK) float32
    x_ptr,  # (rows of x, size)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    p_ptr,  # (n_tokens, blocks, RANK) float32, or (n_tokens, blocks, 2, RANK) of x's dtype if PAIR
    size,
    n_tokens,
    chunk,
    x_stride,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of `x^T P` over one part of the tokens."""
    WIDTH: tl.constexpr = 2 * RANK if PAIR else RANK
    block = tl.program_id(0)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    wide = tl.arange(0, WIDTH)
    p_stride = tl.num_programs(0) * WIDTH
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    acc = tl.zeros((FEATURES, WIDTH), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = token_rows(index_ptr, token, last, HAS_INDEX) * x_stride
        x = tl.load(
            x_ptr + row[None, :] + feature[:, None],
            mask=(token[None, :] < last) & (feature[:, None] < size),
            other=0.0,
        )
        place = token[:, None].to(tl.int64) * p_stride + block * WIDTH + wide[None, :]
        p = tl.load(p_ptr + place, mask=token[:, None] < last, other=0.0)
        acc = dot(x.to(p.dtype), p, acc, PRECISION, UPCAST)
    if PAIR:
        high, low = halves(acc, FEATURES, WIDTH)
        acc = high + low
    lane = block * RANK + tl.arange(0, RANK)
    place = (tl.program_id(2).to(tl.int64) * size + feature)[:, None] * (tl.num_programs(0) * RANK) + lane[None, :]
    tl.store(partial_ptr + place, acc, mask=feature[:, None] < size)


@triton.jit(do_not_specialize=["splits"])
def add_kernel(
    out_ptr,  # (size, columns) float32
    partial_ptr,  # (splits, size, blocks * RANK) float32
    size,
    columns,
    splits,
    out_stride,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Add the partial sums, in order, to `out`."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    mask = (row[:, None] < size) & (lane[None, :] < columns)
    width = tl.num_programs(0) * RANK
    acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for split in range(0, splits):
        place = (tl.cast(split, tl.int64) * size + row)[:, None] * width + lane[None, :]
        acc += tl.load(partial_ptr + place, mask=mask, other=0.0)
    pointers = out_ptr + row[:, None].to(tl.int64) * out_stride + lane[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + acc, mask=mask)


_RANKS = (16, 32, 64)


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every combination that `sketch` and `project` launch, for the ahead-of-time compile check.

    Yields:
        Descriptions as in `ops/_reduce.py`.
    """
    integers = dict.fromkeys(("columns", "steps", "seed_low", "seed_high", "stream"), "i32")
    for platform, aligned, rank in itertools.product(("cuda", "hip"), (True, False), _RANKS):
        where: dict[str, Any] = {"platform": platform, "aligned": aligned}
        for dtype, x in AOT_DTYPES.items():
            config = config_for("shrink", dtype, aligned=aligned, platform=platform)
            products = {**where, "warps": config.warps, "stages": config.stages, "matrix": True}
            for index, signs in itertools.product((False, True), repeat=2):
                constexprs = {
                    "TOKENS": config.tokens,
                    "FEATURES": config.features,
                    "RANK": rank,
                    "HAS_INDEX": index,
                    "SIGNS": signs,
                    "PAIR": not signs and dtype != torch.float32,
                    "PRECISION": precision(dtype, platform),
                    "UPCAST": False,
                }
                label = f"{x} {config.tokens}x{config.features}x{rank} {'signs' if signs else 'gaussian'}"
                types = {**integers, "x_ptr": f"*{x}", "omega_ptr": f"*{x}"}
                yield aot_case(shrink_kernel, label, constexprs, types, **products)
            config = config_for("tall", dtype, aligned=aligned, platform=platform)
            products = {**where, "warps": config.warps, "stages": config.stages, "matrix": True}
            pair = dtype == torch.bfloat16
            p = dtype if pair else torch.float32
            for index in (False, True):
                constexprs = {
                    "TOKENS": config.tokens,
                    "FEATURES": config.features,
                    "RANK": rank,
                    "HAS_INDEX": index,
                    "PAIR": pair,
                    "PRECISION": precision(p, platform),
                    "UPCAST": False,
                }
                label = f"{x} {config.features}x{config.tokens}x{rank}"
                types = {"x_ptr": f"*{x}", "p_ptr": f"*{AOT_DTYPES[p]}"}
                yield aot_case(tall_kernel, label, constexprs, types, **products)
        for weight, pair in itertools.product((False, True), repeat=2):
            constexprs = {"ROWS": ROWS, "RANK": rank, "HAS_WEIGHT": weight, "PAIR": pair}
            types = {**integers, "out_ptr": "*bf16" if pair else "*fp32"}
            yield aot_case(combine_kernel, f"{rank}" + " pair" * pair, constexprs, types, **where)
        yield aot_case(add_kernel, f"{rank}", {"ROWS": ROWS, "RANK": rank}, integers, **where)
