"""Triton kernels of the skinny products.

    t[k, c]   = factor * sum_i  m[k, i] x[k, i] * a[c, i]           shrink_kernel
    out[c, j] = factor * sum_k  t[k, c] * m[k, j] z[k, j]           reduce_kernel
    y[k, j]   = base[k, j] + factor * m[k, j] sum_c t[k, c] b[c, j]   expand_kernel

All read their wide operand once and are bound by memory. m is the dropout mask of `_philox.keep_mask`, 8 columns per
counter; the factor holds the scale and one over the share kept. Drawing a mask takes many instructions, so the sums
draw it where they need it, and `expand_kernel` reads it as bits, which a layer's `pair_kernel` has written before, or
`keep_kernel`. Where a product has few tiles its sum is cut into parts, which `sum_parts_kernel` adds in fixed order:
same input, same bits. A layer's two sums over tokens are one launch, `pair_kernel`, and so is the addition of their
parts. Factors may be float32 beside 16-bit operands.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._launching import Constants, constants_of, launch
from lora_kernels.ops._tiles import build_platform, parts_for, precision, rank_for, signed32
from lora_kernels.ops._tl import INTERPRETED, dot, keep_bits, keep_factors, kept, load_key, place_bits
from lora_kernels.ops.skinny.config import FLAT, SkinnyConfig, config_for, is_aligned, shrink_config, step_for, tall_for

_PART = 1024  # elements per program of `sum_parts_kernel`
_TOKENS, _GROUPS = 64, 16  # per program of `keep_kernel`


@triton.jit
def factor_offsets(ranks, columns, rank, size, TRANSPOSED: tl.constexpr):
    """Where the elements of a factor are: row-major `(rank, size)`, or the transposed view of such a `(size, rank)`."""
    if TRANSPOSED:
        return ranks.to(tl.int64) + columns.to(tl.int64) * rank
    return ranks.to(tl.int64) * size + columns


@triton.jit
def known(number, ALIGNED: tl.constexpr):
    """A number of which the compiler shall know that it is a multiple of 8: Triton itself only looks for 16."""
    return number // 8 * 8 if ALIGNED else number


@triton.jit(do_not_specialize=["n_tokens", "rank", "steps", "threshold", "stream"])
def shrink_kernel(
    out_ptr,  # (splits, n_tokens, rank)
    x_ptr,  # (n_tokens, size)
    factor_ptr,  # (rank, size)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size,
    n_tokens,
    rank,
    steps,
    x_stride,
    factor,
    threshold,
    stream,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of `factor * drop(x) a^T` over one part of the columns. Programs that share rows of x are neighbours."""
    rank = known(rank, ALIGNED)
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64) * x_stride
    # Whole steps, so that the compiler knows what every address is a multiple of: else no load is vectorised.
    first = tl.program_id(2) * (steps * COLUMNS)
    last = tl.minimum(first + steps * COLUMNS, size)
    if HAS_DROPOUT:
        key0, key1 = load_key(seed_ptr)
    acc = tl.zeros((TOKENS, RANK), dtype=tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(
            x_ptr + row[:, None] + column[None, :],
            mask=(token[:, None] < n_tokens) & (column[None, :] < size),
            other=0.0,
        )
        if HAS_DROPOUT:
            group = start // 8 + tl.arange(0, COLUMNS // 8)
            bits = keep_bits(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
            x = tl.where(kept(bits, TOKENS, COLUMNS // 8), x, tl.zeros_like(x))
        place = factor_offsets(lane[None, :], column[:, None], rank, size, TRANSPOSED)
        a = tl.load(factor_ptr + place, mask=(lane[None, :] < rank) & (column[:, None] < size), other=0.0)
        acc = dot(x, a if UPCAST else a.to(x.dtype), acc, PRECISION, UPCAST)
    at = (tl.program_id(2).to(tl.int64) * n_tokens + token)[:, None] * rank + lane[None, :]
    mask = (token[:, None] < n_tokens) & (lane[None, :] < rank)
    tl.store(out_ptr + at, (acc * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_tile(
    out_ptr, bits_ptr, x_ptr, t_ptr, seed_ptr, block, size, n_tokens, rank, chunk, x_stride, t_stride,
    factor, threshold, stream,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, STORE_BITS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of `factor * t^T drop(z)`, `(rank, size)` or transposed, over one part of the tokens."""
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, n_tokens)
    if HAS_DROPOUT:
        key0, key1 = load_key(seed_ptr)
    acc = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        wide = token.to(tl.int64)
        t = tl.load(
            t_ptr + wide[None, :] * t_stride + lane[:, None],
            mask=(token[None, :] < last) & (lane[:, None] < rank),
            other=0.0,
        )
        z = tl.load(
            x_ptr + wide[:, None] * x_stride + column[None, :],
            mask=(token[:, None] < last) & (column[None, :] < size),
            other=0.0,
        )
        if HAS_DROPOUT:
            group = block * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            bits = keep_bits(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
            if STORE_BITS:
                at, inside = place_bits(bits_ptr, token, group, last, size)
                tl.store(at, bits.to(tl.uint8), mask=inside & (tl.program_id(0) == 0))
            z = tl.where(kept(bits, TOKENS, COLUMNS // 8), z, tl.zeros_like(z))
        acc = dot(t, z, acc, PRECISION, UPCAST)
    at = factor_offsets(lane[:, None], column[None, :], rank, size, TRANSPOSED)
    result = (acc * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=(lane[:, None] < rank) & (column[None, :] < size))


@triton.jit(do_not_specialize=["n_tokens", "rank", "t_stride", "chunk", "threshold", "stream"])
def reduce_kernel(
    out_ptr,  # (splits, rank, size), or (splits, size, rank) if TRANSPOSED
    x_ptr,  # z: (n_tokens, size)
    t_ptr,  # (n_tokens, rank)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size,
    n_tokens,
    rank,
    chunk,
    x_stride,
    t_stride,
    factor,
    threshold,
    stream,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of `factor * t^T drop(z)` over one part of the tokens. Programs that share columns are neighbours."""
    rank, t_stride = known(rank, ALIGNED), known(t_stride, ALIGNED)
    out_ptr += tl.program_id(2).to(tl.int64) * rank * size
    reduce_tile(
        out_ptr, out_ptr, x_ptr, t_ptr, seed_ptr, tl.program_id(1), size, n_tokens, rank, chunk, x_stride, t_stride,
        factor, threshold, stream, TOKENS, COLUMNS, RANK, TRANSPOSED, HAS_DROPOUT, False, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "rank", "u_stride", "t_stride", "chunk", "threshold", "stream"])
def pair_kernel(
    out_ptr,  # dA: (splits, rank, size)
    second_ptr,  # dB: (splits, second_size, rank); a part of both is rank * (size + second_size) long if there are many
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8, to be written if HAS_DROPOUT
    x_ptr,  # (n_tokens, size)
    u_ptr,  # (n_tokens, rank)
    g_ptr,  # (n_tokens, second_size)
    t_ptr,  # (n_tokens, rank)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size,
    second_size,
    n_tokens,
    rank,
    chunk,
    x_stride,
    u_stride,
    g_stride,
    t_stride,
    factor,
    threshold,
    stream,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of `factor * u^T drop(x)` or, in the later programs, of `g^T t`, over one part of the tokens."""
    rank, u_stride, t_stride = known(rank, ALIGNED), known(u_stride, ALIGNED), known(t_stride, ALIGNED)
    part = tl.program_id(2).to(tl.int64) * rank * (size + second_size)
    blocks = tl.cdiv(size, COLUMNS)
    if tl.program_id(1) < blocks:
        reduce_tile(
            out_ptr + part, bits_ptr, x_ptr, u_ptr, seed_ptr, tl.program_id(1), size, n_tokens, rank, chunk,
            x_stride, u_stride, factor, threshold, stream, TOKENS, COLUMNS, RANK, False, HAS_DROPOUT, True,
            PRECISION, UPCAST,
        )  # fmt: skip
    else:
        reduce_tile(
            second_ptr + part, bits_ptr, g_ptr, t_ptr, seed_ptr, tl.program_id(1) - blocks, second_size, n_tokens,
            rank, chunk, g_stride, t_stride, 1.0, 0, 0, TOKENS, COLUMNS, RANK, True, False, False, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "threshold", "stream"])
def keep_kernel(
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8
    seed_ptr,  # (1,) int64
    size,
    n_tokens,
    threshold,
    stream,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The bits of a tile of the mask."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    key0, key1 = load_key(seed_ptr)
    bits = keep_bits(token, group, key0, key1, stream, threshold, TOKENS, GROUPS)
    at, inside = place_bits(bits_ptr, token, group, n_tokens, size)
    tl.store(at, bits.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "rank", "t_stride"])
def expand_kernel(
    out_ptr,  # (n_tokens, size)
    x_ptr,  # base: (n_tokens, size), if ADD; it may be out
    bias_ptr,  # (size,), if HAS_BIAS
    t_ptr,  # (n_tokens, rank)
    factor_ptr,  # b: (rank, size)
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8, if HAS_DROPOUT
    size,
    n_tokens,
    rank,
    out_stride,
    x_stride,
    t_stride,
    factor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of `base + factor * mask * (t b)`, rounded once."""
    rank, t_stride = known(rank, ALIGNED), known(t_stride, ALIGNED)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    wide = token.to(tl.int64)[:, None]
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(0, rank, RANK):
        lane = start + tl.arange(0, RANK)
        t = tl.load(
            t_ptr + wide * t_stride + lane[None, :],
            mask=(token[:, None] < n_tokens) & (lane[None, :] < rank),
            other=0.0,
        )
        place = factor_offsets(lane[:, None], column[None, :], rank, size, TRANSPOSED)
        b = tl.load(factor_ptr + place, mask=(lane[:, None] < rank) & (column[None, :] < size), other=0.0)
        acc = dot(t, b if UPCAST else b.to(t.dtype), acc, PRECISION, UPCAST)
    mask = (token[:, None] < n_tokens) & (column[None, :] < size)
    if HAS_DROPOUT:
        group = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        acc *= keep_factors(bits_ptr, token, group, n_tokens, size, factor, TOKENS, COLUMNS // 8)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(x_ptr + wide * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + wide * out_stride + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def sum_parts_kernel(
    out_ptr,  # (size,)
    second_ptr,  # (second_size,), if PAIR
    partial_ptr,  # (splits, size + second_size) float32
    size,
    second_size,
    splits,
    PART: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Add the parts, in order, of one result or of two."""
    place = tl.program_id(0) * PART + tl.arange(0, PART)
    total = size + second_size if PAIR else size
    acc = tl.zeros((PART,), dtype=tl.float32)
    for split in range(0, splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * total + place, mask=place < total, other=0.0)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=place < size)
    if PAIR:
        mask = (place >= size) & (place < total)
        tl.store(second_ptr + (place - size), acc.to(second_ptr.dtype.element_ty), mask=mask)


def _oriented(factor: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, bool]:
    # A dense factor, and whether it is the transposed view of a row-major matrix. There is no kernel for such a view
    # and a mask: a layer has them never together.
    if factor.is_contiguous():
        return factor, False
    if mask is None and factor.stride() == (1, factor.shape[0]):
        return factor, True
    return factor.contiguous(), False


def drop_args(mask: Mask | None, stand_in: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, float, int, int]:
    """The seed (a pointer that a flag switches off must still be one), factor, threshold and stream of a launch."""
    if mask is None:
        return stand_in, float(scale), 0, 0
    return mask.on(stand_in.device).seed, scale * mask.factor, mask.threshold, signed32(mask.stream)


def empty_bits(wide: torch.Tensor) -> torch.Tensor:
    """For the bits of a mask of a matrix."""
    return wide.new_empty(wide.shape[0], -(-wide.shape[1] // 8), dtype=torch.uint8)


def bits_of(mask: Mask | None, wide: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The bits of a mask of a matrix, drawn if no kernel has written them, and its factor; without one, stand-ins."""
    if mask is None:
        return wide, 1.0
    bits = mask.bits
    if bits is None:
        bits = empty_bits(wide)
        grid = (-(-bits.shape[1] // _GROUPS), -(-bits.shape[0] // _TOKENS), 1)
        numbers = (wide.shape[1], bits.shape[0], mask.threshold, signed32(mask.stream))
        launch(keep_kernel, grid, (bits, mask.on(wide.device).seed), numbers, _KEEP)
    return bits, mask.factor


class _Plan(NamedTuple):
    """What a launch is besides its tensors."""

    grid: tuple[int, int, int]
    chunk: int  # steps or tokens of a part of the sum
    constants: Constants


@functools.lru_cache(maxsize=4096)
def _plan(
    product: str,
    sizes: tuple[int, ...],
    tokens: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    config: SkinnyConfig | None,
    least: int,
    drops: bool,
    aligned: bool,
    mixed: bool,
    **flags: bool,
) -> _Plan:
    """Of `shrink`, `reduce` or `expand`, over matrices of some sizes."""
    if config is None and product == "shrink":
        config = shrink_config(tokens, dtype, aligned, device, mixed)
    config = config or config_for(product, dtype, aligned, drops=drops, rank=rank)
    (width, blocks), chunk = rank_for(rank), 0
    if product == "shrink":
        tall = tall_for(tokens, config)
        tiles = blocks * tall * (2 if config == FLAT else 1)  # of which one per multiprocessor is enough
        splits, chunk = parts_for(tiles, sizes[0], config.columns, device, least)
        grid, chunk = (blocks, tall, splits), chunk // config.columns
    elif product == "reduce":
        wide = sum(-(-size // config.columns) for size in sizes)
        splits, chunk = parts_for(blocks * wide, tokens, config.tokens, device, least)
        grid = blocks, wide, splits
    else:
        grid, width = (-(-sizes[0] // config.columns), tall_for(tokens, config), 1), step_for(rank, dtype)
    constants = constants_of(
        config.warps, config.stages, TOKENS=config.tokens, COLUMNS=config.columns, RANK=width, **flags,
        HAS_DROPOUT=drops, PRECISION=precision(dtype, build_platform()), UPCAST=INTERPRETED,
    )  # fmt: skip
    return _Plan(grid, chunk, constants)


_SUM, _SUM_PAIR = constants_of(PART=_PART, PAIR=False), constants_of(PART=_PART, PAIR=True)
_KEEP = constants_of(TOKENS=_TOKENS, GROUPS=_GROUPS)


def _sum_parts(partial: torch.Tensor, out: torch.Tensor, second: torch.Tensor | None = None) -> None:
    size, second_size = out.numel(), 0 if second is None else second.numel()
    launch(
        sum_parts_kernel, (-(-(size + second_size) // _PART), 1, 1),
        (out, out if second is None else second, partial), (size, second_size, partial.shape[0]),
        _SUM if second is None else _SUM_PAIR,
    )  # fmt: skip


def shrink(
    out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
    least: int = 512,
) -> None:
    """Launch `shrink_kernel`; x has unit column stride, no size is zero, a part has `least` columns or more."""
    (tokens, size), rank, stride = x.shape, a.shape[0], x.stride(0)
    aligned = is_aligned(rank, rank, x)
    a, transposed = _oriented(a, mask)
    seed, factor, threshold, stream = drop_args(mask, x, scale)
    grid, steps, constants = _plan(
        "shrink", (size,), tokens, rank, x.dtype, x.device, config, least, mask is not None, aligned,
        a.dtype != x.dtype, TRANSPOSED=transposed, ALIGNED=aligned,
    )  # fmt: skip
    splits = grid[2]
    target = out if splits == 1 else torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    numbers = (size, tokens, rank, steps, stride, factor, threshold, stream)
    launch(shrink_kernel, grid, (target, x, a, seed), numbers, constants)
    if splits > 1:
        _sum_parts(target, out)


def tsreduce(
    out: torch.Tensor,
    t: torch.Tensor,
    z: torch.Tensor,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
    least: int = 256,
) -> None:
    """Launch `reduce_kernel`; t and z have unit column stride, `out` or `out.mT` is contiguous, no size is zero.

    A part has `least` tokens or more.
    """
    (tokens, size), rank = z.shape, t.shape[1]
    aligned, transposed = is_aligned(rank, t.stride(0), z), not out.is_contiguous()
    seed, factor, threshold, stream = drop_args(mask, z)
    grid, chunk, constants = _plan(
        "reduce", (size,), tokens, rank, z.dtype, z.device, config, least, mask is not None, aligned,
        False, TRANSPOSED=transposed, ALIGNED=aligned,
    )  # fmt: skip
    splits = grid[2]
    target = out if splits == 1 else torch.empty(splits, rank, size, dtype=torch.float32, device=z.device)
    numbers = (size, tokens, rank, chunk, z.stride(0), t.stride(0), factor, threshold, stream)
    launch(reduce_kernel, grid, (target, z, t, seed), numbers, constants)
    if splits > 1:
        _sum_parts(target, out)


def tsreduce_pair(
    outs: tuple[torch.Tensor, torch.Tensor],
    u: torch.Tensor,
    x: torch.Tensor,
    mask: Mask | None,
    t: torch.Tensor,
    g: torch.Tensor,
    config: SkinnyConfig | None = None,
    least: int = 256,
) -> Mask | None:
    """Launch `pair_kernel`: `u^T drop(x)` `(r, n)` and `g^T t` `(m, r)`, contiguous; otherwise as `tsreduce`.

    Returns:
        The mask with its bits.
    """
    (tokens, size), rank, second_size = x.shape, u.shape[1], g.shape[1]
    u_stride, t_stride = u.stride(0), t.stride(0)
    aligned = is_aligned(rank, u_stride | t_stride, x, g)
    seed, factor, threshold, stream = drop_args(mask, x)
    grid, chunk, constants = _plan(
        "reduce", (size, second_size), tokens, rank, x.dtype, x.device, config, least, mask is not None, aligned,
        False, ALIGNED=aligned,
    )  # fmt: skip
    splits, (first, second) = grid[2], outs
    if splits > 1:
        partial = torch.empty(splits, rank * (size + second_size), dtype=torch.float32, device=x.device)
        first, second = partial, partial[0, rank * size :]
    numbers = (
        size, second_size, tokens, rank, chunk, x.stride(0), u_stride, g.stride(0), t_stride,
        factor, threshold, stream,
    )  # fmt: skip
    bits = x if mask is None else empty_bits(x)
    launch(pair_kernel, grid, (first, second, bits, x, u, g, t, seed), numbers, constants)
    if splits > 1:
        _sum_parts(partial, *outs)
    return None if mask is None else mask._replace(bits=bits)


def expand(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    base: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
) -> None:
    """Launch `expand_kernel`; `out`, t and base (which may be `out`) have unit column stride, no size is zero."""
    (tokens, size), rank, t_stride, source = out.shape, t.shape[1], t.stride(0), out if base is None else base
    aligned = is_aligned(rank, t_stride, out) if source is out else is_aligned(rank, t_stride, out, source)
    b, transposed = _oriented(b, mask)
    bits, factor = bits_of(mask, out)
    grid, _, constants = _plan(
        "expand", (size,), tokens, rank, out.dtype, out.device, config, 0, mask is not None, aligned,
        False, TRANSPOSED=transposed, ALIGNED=aligned, ADD=base is not None, HAS_BIAS=bias is not None,
    )  # fmt: skip
    numbers = (size, tokens, rank, out.stride(0), source.stride(0), t_stride, factor)
    launch(expand_kernel, grid, (out, source, out if bias is None else bias, t, b, bits), numbers, constants)
