"""Triton kernels of the low-rank part of many experts: one launch for all experts per product.

    t[k, c]      = factor * sum_i  m[k, i] x[k, i] * a[e, c, i]                   grouped_shrink_kernel
    out[e, c, j] = factor * sum_k  t[k, c] * m[k, j] z[k, j]    (k in rows of e)  grouped_reduce_kernel
    y[k, j]      = base[k, j] + factor * m[k, j] sum_c t[k, c] b[e, c, j]         grouped_expand_kernel

e is the expert of row k, see `find_tile`; m is the dropout mask of `_philox.keep_mask`. Every sum is of one program, in
fixed order: same input, same bits. Offsets are read on the device, and held within the rows whatever they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._launching import Constants, constants_of, launch
from lora_kernels.ops._tiles import MOST_PROGRAMS, MOST_RANK, build_platform, precision, rank_for
from lora_kernels.ops._tl import INTERPRETED, dot, keep_bits, keep_factors, kept, load_key, load_tile, place_bits
from lora_kernels.ops.skinny.config import SkinnyConfig, config_for, is_aligned, step_for
from lora_kernels.ops.skinny.kernel import bits_of, drop_args, empty_bits, factor_offsets, known

_LANES = 128  # offsets that are looked at in one go
_WIDE_REDUCE = SkinnyConfig(64, 128, 8, 4)  # with 4 warps it spills registers
# Of float32 results without dropout: Triton 3.6 makes wider tiles wait for each of sm_90's matrix instructions.
_SINGLE_REDUCE = SkinnyConfig(64, 64, 4, 4)


@triton.jit
def find_tile(offsets_ptr, slot, experts, n_rows, TOKENS: tl.constexpr, LANES: tl.constexpr):
    """The expert of a tile of rows, its first row and the end of the expert's rows.

    The tiles of expert e have the slots from `offsets[e] // TOKENS + e` on, which is room enough; the rows after the
    last offset count as those of one expert more. A slot that is left over begins at the end.
    """
    before = tl.zeros((LANES,), dtype=tl.int32)
    for start in range(0, experts, LANES):
        expert = start + 1 + tl.arange(0, LANES)
        begin = tl.load(offsets_ptr + expert, mask=expert <= experts, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), n_rows)
        before += ((expert <= experts) & (begin // TOKENS + expert <= slot)).to(tl.int32)
    expert = tl.sum(before, axis=0)
    begin = tl.load(offsets_ptr + expert).to(tl.int64)
    begin = tl.where(expert == 0, 0, tl.minimum(tl.maximum(begin, 0), n_rows))
    end = tl.load(offsets_ptr + tl.minimum(expert + 1, experts)).to(tl.int64)
    end = tl.where(expert == experts, n_rows, tl.minimum(tl.maximum(end, 0), n_rows))
    return expert, begin + (slot - begin // TOKENS - expert) * TOKENS, end


@triton.jit(do_not_specialize=["n_tokens", "experts", "rank", "threshold", "stream"])
def grouped_shrink_kernel(
    out_ptr,  # (n_tokens, rank)
    x_ptr,  # (n_tokens, size)
    factor_ptr,  # (experts, rank, size); if TRANSPOSED the transposed view of (experts, size, rank)
    offsets_ptr,  # (experts + 1,)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size, n_tokens, experts, rank, x_stride, factor, threshold, stream,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of `factor * drop(x) a^T`; zeros in rows of no expert."""
    rank = known(rank, ALIGNED)
    expert, first, end = find_tile(offsets_ptr, tl.program_id(1), experts, n_tokens, TOKENS, LANES)
    if first < end:
        lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
        token = first + tl.arange(0, TOKENS)
        row = token * x_stride
        factor_ptr += expert.to(tl.int64) * rank * size
        # Rows of no expert have no factor.
        last = tl.where(expert == experts, 0, size)
        if HAS_DROPOUT:
            key0, key1 = load_key(seed_ptr)
        acc = tl.zeros((TOKENS, RANK), dtype=tl.float32)
        for start in range(0, last, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            x = load_tile(x_ptr + row[:, None] + column[None, :], token[:, None] < end, column[None, :] < size)
            if HAS_DROPOUT:
                group = start // 8 + tl.arange(0, COLUMNS // 8)
                bits = keep_bits(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
                x = tl.where(kept(bits, TOKENS, COLUMNS // 8), x, tl.zeros_like(x))
            place = factor_offsets(lane[None, :], column[:, None], rank, size, TRANSPOSED)
            a = load_tile(factor_ptr + place, lane[None, :] < rank, column[:, None] < size)
            acc = dot(x, a, acc, PRECISION, UPCAST)
        mask = (token[:, None] < end) & (lane[None, :] < rank)
        result = (acc * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[:, None] * rank + lane[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "experts", "rank", "t_stride", "threshold", "stream"])
def grouped_reduce_kernel(
    out_ptr,  # (experts, rank, size); if TRANSPOSED the transposed view of (experts, size, rank)
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8, to be written if HAS_DROPOUT
    x_ptr,  # z: (n_tokens, size)
    t_ptr,  # (n_tokens, rank)
    offsets_ptr,  # (experts + 1,)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size, n_tokens, experts, rank, x_stride, t_stride, factor, threshold, stream,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of `factor * t^T drop(z)` over the rows of one expert."""
    rank, t_stride = known(rank, ALIGNED), known(t_stride, ALIGNED)
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.program_id(2)
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert).to(tl.int64), 0), n_tokens).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert + 1).to(tl.int64), 0), n_tokens).to(tl.int32)
    if HAS_DROPOUT:
        key0, key1 = load_key(seed_ptr)
    acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        wide = token.to(tl.int64)
        t = load_tile(t_ptr + wide[None, :] * t_stride + lane[:, None], token[None, :] < last, lane[:, None] < rank)
        z = load_tile(x_ptr + wide[:, None] * x_stride + column[None, :], token[:, None] < last, column[None, :] < size)
        if HAS_DROPOUT:
            group = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            bits = keep_bits(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
            at, inside = place_bits(bits_ptr, token, group, last, size)
            tl.store(at, bits.to(tl.uint8), mask=inside & (tl.program_id(0) == 0))
            z = tl.where(kept(bits, TOKENS, COLUMNS // 8), z, tl.zeros_like(z))
        acc = dot(t, z, acc, PRECISION, UPCAST)
    place = factor_offsets(lane[:, None], column[None, :], rank, size, TRANSPOSED)
    mask = (lane[:, None] < rank) & (column[None, :] < size)
    result = (acc * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert.to(tl.int64) * rank * size + place, result, mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "experts", "rank", "t_stride"])
def grouped_expand_kernel(
    out_ptr,  # (n_tokens, size)
    x_ptr,  # base: (n_tokens, size), if ADD
    t_ptr,  # (n_tokens, rank)
    factor_ptr,  # b: (experts, rank, size); if TRANSPOSED the transposed view of (experts, size, rank)
    offsets_ptr,  # (experts + 1,)
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8, if HAS_DROPOUT
    size, n_tokens, experts, rank, out_stride, x_stride, t_stride, factor,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, LANES: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, ADD: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of `base + factor * mask * (t b)`, rounded once; the base in rows of no expert."""
    rank, t_stride = known(rank, ALIGNED), known(t_stride, ALIGNED)
    expert, first, end = find_tile(offsets_ptr, tl.program_id(1), experts, n_tokens, TOKENS, LANES)
    if first < end:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        token = first + tl.arange(0, TOKENS)
        factor_ptr += expert.to(tl.int64) * rank * size
        # Rows of no expert have no factor.
        ranks = tl.where(expert == experts, 0, rank)
        acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for start in range(0, ranks, RANK):
            lane = start + tl.arange(0, RANK)
            t = load_tile(t_ptr + token[:, None] * t_stride + lane[None, :], token[:, None] < end, lane[None, :] < rank)
            place = factor_offsets(lane[:, None], column[None, :], rank, size, TRANSPOSED)
            b = load_tile(factor_ptr + place, lane[:, None] < rank, column[None, :] < size)
            acc = dot(t, b, acc, PRECISION, UPCAST)
        mask = (token[:, None] < end) & (column[None, :] < size)
        if HAS_DROPOUT:
            group = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            acc *= keep_factors(bits_ptr, token, group, end, size, factor, TOKENS, COLUMNS // 8)
        if ADD:
            acc += tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        result = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[:, None] * out_stride + column[None, :], result, mask=mask)


def product_config(
    product: str, rank: int, dtype: torch.dtype, aligned: bool, platform: str | None = None, single: bool = False
) -> SkinnyConfig:
    """The configuration of `shrink`, `reduce` or `expand`: that of the products of one layer, unless it spills.

    `single` if the result of `reduce` is float32 and there is no dropout.
    """
    wide = product == "reduce" and rank_for(rank)[0] == MOST_RANK and aligned and dtype != torch.float32
    if wide and (platform or build_platform()) == "cuda":
        return _SINGLE_REDUCE if single else _WIDE_REDUCE
    return config_for(product, dtype, aligned, platform)


def slots_for(rows: int, experts: int, config: SkinnyConfig) -> int:
    """The slots of tiles of rows, see `find_tile`: the second axis of a grid, which the hardware limits."""
    slots = rows // config.tokens + experts + 1
    if slots > MOST_PROGRAMS:
        raise ValueError(f"{rows} rows of {experts} experts are too many for one launch")
    return slots


def _oriented(factor: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, bool]:
    # A dense factor, and whether it is the transposed view of one. A mask never comes with such a view.
    if mask is None and not factor.is_contiguous() and factor.mT.is_contiguous():
        return factor, True
    return factor.contiguous(), False


def _constants(config: SkinnyConfig, dtype: torch.dtype, mask: Mask | None, **values: Any) -> Constants:
    # `values` are between the sizes of tiles and `HAS_DROPOUT`.
    return constants_of(
        config.warps, config.stages, TOKENS=config.tokens, COLUMNS=config.columns, **values,
        HAS_DROPOUT=mask is not None, PRECISION=precision(dtype, build_platform()), UPCAST=INTERPRETED,
    )  # fmt: skip


def shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    factor: torch.Tensor,
    scale: float,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
) -> None:
    """Launch `grouped_shrink_kernel`; x has unit column stride, `out` is dense, no size is zero."""
    (rows, size), (experts, rank, _) = x.shape, factor.shape
    aligned = is_aligned(rank, rank, x)
    config = config or product_config("shrink", rank, x.dtype, aligned)
    factor, transposed = _oriented(factor, mask)
    seed, scale, threshold, stream = drop_args(mask, x, scale)
    width, blocks = rank_for(rank)
    launch(
        grouped_shrink_kernel, (blocks, slots_for(rows, experts, config), 1), (out, x, factor, offsets, seed),
        (size, rows, experts, rank, x.stride(0), scale, threshold, stream),
        _constants(config, x.dtype, mask, RANK=width, LANES=_LANES, TRANSPOSED=transposed, ALIGNED=aligned),
    )  # fmt: skip


def reduce(
    out: torch.Tensor,
    t: torch.Tensor,
    z: torch.Tensor,
    offsets: torch.Tensor,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
) -> Mask | None:
    """Launch `grouped_reduce_kernel`; t and z have unit column stride, `out` or `out.mT` is dense, no size is zero.

    Returns:
        The mask with its bits.
    """
    (rows, size), (experts, rank, _) = z.shape, out.shape
    aligned = is_aligned(rank, t.stride(0), z)
    single = out.dtype == torch.float32 and mask is None
    config = config or product_config("reduce", rank, z.dtype, aligned, single=single)
    seed, scale, threshold, stream = drop_args(mask, z)
    width, blocks = rank_for(rank)
    bits = z if mask is None else empty_bits(z)
    launch(
        grouped_reduce_kernel, (blocks, -(-size // config.columns), experts), (out, bits, z, t, offsets, seed),
        (size, rows, experts, rank, z.stride(0), t.stride(0), scale, threshold, stream),
        _constants(config, z.dtype, mask, RANK=width, TRANSPOSED=not out.is_contiguous(), ALIGNED=aligned),
    )  # fmt: skip
    return None if mask is None else mask._replace(bits=bits)


def expand(
    out: torch.Tensor,
    t: torch.Tensor,
    offsets: torch.Tensor,
    factor: torch.Tensor,
    base: torch.Tensor | None,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
) -> None:
    """Launch `grouped_expand_kernel`; `out`, t and base have unit column stride, no size is zero."""
    (rows, size), (experts, rank, _) = out.shape, factor.shape
    source = out if base is None else base
    aligned = is_aligned(rank, t.stride(0), out, source)
    config = config or product_config("expand", rank, out.dtype, aligned)
    factor, transposed = _oriented(factor, mask)
    bits, scale = bits_of(mask, out)
    launch(
        grouped_expand_kernel, (-(-size // config.columns), slots_for(rows, experts, config), 1),
        (out, source, t, factor, offsets, bits),
        (size, rows, experts, rank, out.stride(0), source.stride(0), t.stride(0), scale),
        _constants(
            config, out.dtype, mask, RANK=step_for(rank, out.dtype), LANES=_LANES, TRANSPOSED=transposed,
            ALIGNED=aligned, ADD=base is not None,
        ),
    )  # fmt: skip
