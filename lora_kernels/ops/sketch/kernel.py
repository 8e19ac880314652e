"""Triton kernels of the sketch ops.

    P[t, c]   = sum_i  x[t, i] * Omega[i, c]            shrink_kernel (+ combine_kernel, which weighs: w[t] * P[t, c])
    out[i, c] += sum_t  x[t, i] * P[t, c]               tall_kernel (+ combine_kernel)

Both read their wide operand once and are bound by memory. Tokens go by chunks whose rows stay in the second-level cache
between the two kernels. Signs are drawn in the loop of `shrink_kernel`; gaussian draws would cost more there than the
product, so they are drawn into a scratch of the cache's size. Columns beyond k are computed and dropped:
a larger Omega has the smaller one as its corner.

P keeps float32's accuracy, as reconstructions from sketches need it. Where the rows are bfloat16, P is a pair, rounded
part and rest, side by side in one operand: one product of twice the width on the 16-bit units, exact to 2^-17. The
exponents of float16 are too narrow for that (P may overflow): such rows are widened, as float32 ones are multiplied, in
three tf32 products. A gaussian Omega meets 16-bit rows as a pair as well.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._reduce import column_sums
from lora_kernels.ops._rows import ALL, Selection
from lora_kernels.ops._tiles import build_platform, is_aligned, parts_for, precision, rank_for, signed32
from lora_kernels.ops._tl import INTERPRETED, dot, halves, load_tile, philox, token_rows
from lora_kernels.ops.random_matrix.kernel import random_matrix as draw
from lora_kernels.ops.random_matrix.reference import Omega
from lora_kernels.ops.skinny.config import SkinnyConfig

# Columns are features: of a step (`shrink_kernel`) or of a tile (`tall_kernel`).
SHRINK = SkinnyConfig(64, 64, 4, 4)
SHRINK_SINGLE = SkinnyConfig(64, 16, 8, 2)  # float32: longer steps, more of them, or fewer warps, spill registers
SHRINK_RAGGED = SkinnyConfig(64, 32, 4, 3)  # not aligned: every element's address takes registers
SHRINK_AMD = SkinnyConfig(64, 32, 8, 2)
TALL = SkinnyConfig(64, 128, 8, 4)
TALL_SINGLE = SkinnyConfig(32, 128, 8, 3)  # float16 and float32; with 4 warps sm_100 spills registers
TALL_RAGGED = SkinnyConfig(32, 64, 4, 3)
TALL_AMD = SkinnyConfig(32, 64, 4, 2)

ROWS = 16  # of the elementwise kernels


def config_for(product: str, dtype: torch.dtype, *, aligned: bool = True, platform: str | None = None) -> SkinnyConfig:
    """The configuration of `shrink` or `tall`; `aligned` if loads can be vectorised."""
    shrink = product == "shrink"
    if (platform or build_platform()) == "hip":
        return SHRINK_AMD if shrink else TALL_AMD
    if shrink and dtype == torch.float32:
        return SHRINK_SINGLE
    if not aligned:
        return SHRINK_RAGGED if shrink else TALL_RAGGED
    if shrink:
        return SHRINK
    return TALL if dtype == torch.bfloat16 else TALL_SINGLE


def token_chunk(tokens: int, row_bytes: int, cache: int) -> int:
    """How many tokens, in whole tiles, go through both kernels at a time: half the cache holds their rows."""
    parts = -(-tokens * row_bytes // max(cache // 2, 2**24))
    return max(-(-tokens // (max(parts, 1) * 64)) * 64, 64)


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
    size, n_tokens, columns, steps, x_stride, out_stride, seed_low, seed_high, stream,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, HAS_INDEX: tl.constexpr, SIGNS: tl.constexpr,
    PAIR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
        x = load_tile(x_ptr + row[:, None] + feature[None, :], token[:, None] < n_tokens, feature[None, :] < size)
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


@triton.jit(do_not_specialize=["size", "splits"])
def combine_kernel(
    out_ptr,  # (size, out_stride): float32, or blocks of RANK rounded numbers and their RANK rests if PAIR
    partial_ptr,  # (splits, size, blocks * RANK) float32
    weight_ptr,  # (size,) float32, if HAS_WEIGHT
    size, splits, columns, out_stride,
    ROWS: tl.constexpr, RANK: tl.constexpr, HAS_WEIGHT: tl.constexpr, PAIR: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sum of parts in order, its rows weighed: stored as the second product wants it, or added to `out` if ADD."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.program_id(1) * RANK + tl.arange(0, RANK)
    mask = (row[:, None] < size) & (lane[None, :] < columns)
    width = tl.num_programs(1) * RANK
    acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for split in range(0, splits):
        place = (tl.cast(split, tl.int64) * size + row)[:, None] * width + lane[None, :]
        acc += tl.load(partial_ptr + place, mask=mask, other=0.0)
    if HAS_WEIGHT:
        acc *= tl.load(weight_ptr + row, mask=row < size, other=0.0)[:, None]
    pointers = out_ptr + row[:, None].to(tl.int64) * out_stride + lane[None, :]
    if PAIR:
        high = acc.to(out_ptr.dtype.element_ty)
        pointers += tl.program_id(1) * RANK
        tl.store(pointers, high, mask=mask)
        tl.store(pointers + RANK, (acc - high.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)
    elif ADD:
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + acc, mask=mask)
    else:
        tl.store(pointers, acc, mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "chunk"])
def tall_kernel(
    partial_ptr,  # (splits, size, blocks * RANK) float32
    x_ptr,  # (rows of x, size)
    index_ptr,  # (n_tokens,) int64 rows of x, if HAS_INDEX
    p_ptr,  # (n_tokens, blocks, RANK) float32, or (n_tokens, blocks, 2, RANK) of x's dtype if PAIR
    size, n_tokens, chunk, x_stride,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, RANK: tl.constexpr, HAS_INDEX: tl.constexpr, PAIR: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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
        x = load_tile(x_ptr + row[None, :] + feature[:, None], token[None, :] < last, feature[:, None] < size)
        place = token[:, None].to(tl.int64) * p_stride + block * WIDTH + wide[None, :]
        p = tl.load(p_ptr + place, mask=token[:, None] < last, other=0.0)
        acc = dot(x.to(p.dtype), p, acc, PRECISION, UPCAST)
    if PAIR:
        high, low = halves(acc, FEATURES, WIDTH)
        acc = high + low
    lane = block * RANK + tl.arange(0, RANK)
    place = (tl.program_id(2).to(tl.int64) * size + feature)[:, None] * (tl.num_programs(0) * RANK) + lane[None, :]
    tl.store(partial_ptr + place, acc, mask=feature[:, None] < size)


# Second-level cache assumed where the device does not tell; half of it is for the rows of a chunk.
_CACHE = 40 * 2**20
_MOST_TOKENS = 2**19  # of a launch, whose grid has at most MOST_PROGRAMS blocks of ROWS


def _scratch(x: torch.Tensor, columns: int, omega: Omega) -> torch.Tensor | None:
    """Draws that the kernel does not make itself, `(1 or 2, q, padded columns)` in the dtype of rows `(rows, q)`."""
    if omega.kind != "gaussian":
        return None
    rank, blocks = rank_for(columns)
    parts = (2,) if x.dtype != torch.float32 else ()  # 16-bit rows meet a rounded part and the rest
    scratch = torch.empty(*parts, x.shape[1], blocks * rank, dtype=x.dtype, device=x.device)
    draw(scratch, *omega, 0)
    return scratch


def _sizes(config: SkinnyConfig, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    kind = precision(dtype, build_platform())
    return {"TOKENS": config.tokens, "FEATURES": config.columns, "RANK": rank, "PRECISION": kind}


def _combine(
    out: torch.Tensor, partial: torch.Tensor, columns: int, weight: torch.Tensor | None = None, add: bool = False
) -> None:
    (splits, size, _), (rank, blocks) = partial.shape, rank_for(columns)
    constants = constants_of(
        ROWS=ROWS, RANK=rank, HAS_WEIGHT=weight is not None, PAIR=out.dtype != torch.float32, ADD=add
    )
    tensors, numbers = (out, partial, partial if weight is None else weight), (size, splits, columns, out.stride(0))
    launch(combine_kernel, (-(-size // ROWS), blocks, 1), tensors, numbers, constants)


def _shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    selected: Selection,
    columns: int,
    omega: Omega,
    scratch: torch.Tensor | None,
    config: SkinnyConfig | None,
    least: int,
) -> None:
    """Fill `out`: `(tokens, k)` or `(tokens, padded k)` float32, or `(tokens, 2 * padded k)` for a pair."""
    tokens, features = selected.count(x), x.shape[1]
    config = config or config_for("shrink", x.dtype, aligned=is_aligned(x))
    rank, blocks = rank_for(columns)
    pair = out.dtype != torch.float32
    tall = -(-tokens // config.tokens)
    splits, chunk = parts_for(blocks * tall, features, config.columns, x.device, least)
    direct = splits == 1 and selected.weight is None and not pair
    target = out
    if not direct:
        target = torch.empty(splits, tokens, blocks * rank, dtype=torch.float32, device=x.device)
    constants = constants_of(
        config.warps, config.stages, HAS_INDEX=selected.rows is not None, SIGNS=scratch is None,
        PAIR=scratch is not None and scratch.dim() == 3, UPCAST=INTERPRETED,
        **_sizes(config, rank, x.dtype),
    )  # fmt: skip
    key = (signed32(omega.seed), signed32(omega.seed >> 32), signed32(omega.stream))
    launch(
        shrink_kernel, (blocks, tall, splits), (target, *selected.pointers(x)[:2], x if scratch is None else scratch),
        (features, tokens, target.shape[-1], chunk // config.columns, x.stride(0), target.stride(-2), *key), constants,
    )  # fmt: skip
    if not direct:
        _combine(out, target, blocks * rank if pair else out.shape[1], selected.weight)


def _add_tall(
    out: torch.Tensor, x: torch.Tensor, selected: Selection, p: torch.Tensor, config: SkinnyConfig | None, least: int
) -> None:
    """`out += x^T P`, P as `_shrink` left it; a part has at least `least` tokens."""
    tokens, features = p.shape[0], x.shape[1]
    config = config or config_for("tall", x.dtype, aligned=is_aligned(x))
    rank, blocks = rank_for(out.shape[1])
    tiles = -(-features // config.columns)
    splits, chunk = parts_for(blocks * tiles, tokens, config.tokens, x.device, least)
    partial = torch.empty(splits, features, blocks * rank, dtype=torch.float32, device=x.device)
    constants = constants_of(
        config.warps, config.stages, HAS_INDEX=selected.rows is not None, PAIR=p.dtype != torch.float32,
        UPCAST=INTERPRETED, **_sizes(config, rank, p.dtype),
    )  # fmt: skip
    launch(
        tall_kernel, (blocks, tiles, splits), (partial, *selected.pointers(x)[:2], p),
        (features, tokens, chunk, x.stride(0)), constants,
    )  # fmt: skip
    _combine(out, partial, out.shape[1], add=True)


def sketch(
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    selected: Selection,
    column_sum: torch.Tensor | None,
    omega: Omega,
    *,
    configs: tuple[SkinnyConfig | None, SkinnyConfig | None] = (None, None),
    chunk: int | None = None,
    least: int = 256,
) -> None:
    """Launch the kernels on matrices of unit column stride; `left` and `right` are one object for an input sketch."""
    tokens, columns = selected.count(left), out.shape[1]
    if tokens == 0 or left.shape[1] == 0:
        return
    selected = selected.to(torch.float32)
    # Without columns, or rows that hold anything, only the sum is left.
    empty = columns == 0 or right.shape[1] == 0
    scratch = None if empty else _scratch(right, columns, omega)
    if chunk is None:
        chunk = _MOST_TOKENS
        if left is right:  # else nothing is read twice
            properties = torch.cuda.get_device_properties(left.device) if left.is_cuda else None
            cache = int(getattr(properties, "L2_cache_size", 0)) or _CACHE
            chunk = min(chunk, token_chunk(tokens, left.stride(0) * left.element_size(), cache))
    rank, blocks = rank_for(columns)
    width, dtype = (2, torch.bfloat16) if left.dtype == torch.bfloat16 else (1, torch.float32)
    for low in range(0, tokens, chunk):
        part = slice(low, min(low + chunk, tokens))
        one, some = selected.part(left, part)
        if not empty:
            two = one if left is right else selected.part(right, part)[0]
            p = torch.empty(part.stop - low, blocks * rank * width, dtype=dtype, device=left.device)
            _shrink(p, two, some, columns, omega, scratch, configs[0], 2 * least)
            _add_tall(out, one, some, p, configs[1], least)
        if column_sum is not None:
            column_sums(column_sum, one, *some)


def project(
    out: torch.Tensor, a: torch.Tensor, omega: Omega, *, config: SkinnyConfig | None = None, least: int = 512
) -> None:
    """Launch the first product alone, which fills `out` `(rows, k)`; a split has at least `least` features."""
    if out.numel() == 0:
        return
    scratch = _scratch(a, out.shape[1], omega)
    for low in range(0, a.shape[0], _MOST_TOKENS):
        part = slice(low, low + _MOST_TOKENS)
        _shrink(out[part], a[part], ALL, out.shape[1], omega, scratch, config, least)
