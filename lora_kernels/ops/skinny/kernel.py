"""Triton kernels of the skinny products.

    t[k, c]   = factor * sum_i  m[k, i] x[k, i] * a[c, i]           shrink_kernel
    out[c, j] = factor * sum_k  t[k, c] * m[k, j] z[k, j]           reduce_kernel
    y[k, j]   = base[k, j] + factor * m[k, j] sum_c t[k, c] b[c, j]   expand_kernel

All read their wide operand once and are bound by memory. m is the dropout mask of `_philox.keep_mask`, made where it is
needed, 8 columns per counter; the factor holds the scale and one over the share kept. Where a product has few tiles its
sum is cut into parts, which `sum_parts_kernel` adds in fixed order: same input, same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._backend import interpreting
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._reduce import AOT_DTYPES, aot_case
from lora_kernels.ops._tiles import build_platform, precision, rank_for, signed32
from lora_kernels.ops._tl import dot, keep_tile, load_key
from lora_kernels.ops.skinny.config import SkinnyConfig, config_for, is_aligned, parts_for, step_for, tall_for

_PART = 1024  # elements per program of `sum_parts_kernel`


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
            keep = keep_tile(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
            x = tl.where(keep, x, tl.zeros_like(x))
        place = factor_offsets(lane[None, :], column[:, None], rank, size, TRANSPOSED)
        a = tl.load(factor_ptr + place, mask=(lane[None, :] < rank) & (column[:, None] < size), other=0.0)
        acc = dot(x, a, acc, PRECISION, UPCAST)
    at = (tl.program_id(2).to(tl.int64) * n_tokens + token)[:, None] * rank + lane[None, :]
    mask = (token[:, None] < n_tokens) & (lane[None, :] < rank)
    tl.store(out_ptr + at, (acc * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens", "rank", "t_stride", "chunk", "threshold", "stream"])
def reduce_kernel(
    out_ptr,  # (splits, rank, size) float32
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
    ALIGNED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of `factor * t^T drop(z)` over one part of the tokens. Programs that share columns are neighbours."""
    rank, t_stride = known(rank, ALIGNED), known(t_stride, ALIGNED)
    lane = tl.program_id(0) * RANK + tl.arange(0, RANK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
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
            group = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
            keep = keep_tile(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
            z = tl.where(keep, z, tl.zeros_like(z))
        acc = dot(t, z, acc, PRECISION, UPCAST)
    at = (tl.program_id(2).to(tl.int64) * rank + lane)[:, None] * size + column[None, :]
    tl.store(out_ptr + at, acc * factor, mask=(lane[:, None] < rank) & (column[None, :] < size))


@triton.jit(do_not_specialize=["n_tokens", "rank", "t_stride", "threshold", "stream"])
def expand_kernel(
    out_ptr,  # (n_tokens, size)
    x_ptr,  # base: (n_tokens, size), if ADD; it may be out
    bias_ptr,  # (size,), if HAS_BIAS
    t_ptr,  # (n_tokens, rank)
    factor_ptr,  # b: (rank, size)
    seed_ptr,  # (1,) int64, if HAS_DROPOUT
    size,
    n_tokens,
    rank,
    out_stride,
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
        acc = dot(t, b, acc, PRECISION, UPCAST)
    mask = (token[:, None] < n_tokens) & (column[None, :] < size)
    if HAS_DROPOUT:
        group = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        key0, key1 = load_key(seed_ptr)
        keep = keep_tile(token, group, key0, key1, stream, threshold, TOKENS, COLUMNS // 8)
        acc = tl.where(keep, acc * factor, 0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(x_ptr + wide * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + wide * out_stride + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def sum_parts_kernel(
    out_ptr,  # (size,)
    partial_ptr,  # (splits, size) float32
    size,
    splits,
    PART: tl.constexpr,
):
    """Add the parts, in order."""
    place = tl.program_id(0) * PART + tl.arange(0, PART)
    acc = tl.zeros((PART,), dtype=tl.float32)
    for split in range(0, splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=place < size)


def _oriented(factor: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, bool]:
    # A dense factor, and whether it is the transposed view of a row-major matrix. There is no kernel for such a view
    # and a mask: a layer has them never together.
    if mask is None and not factor.is_contiguous() and factor.mT.is_contiguous():
        return factor, True
    return factor.contiguous(), False


def _drop(mask: Mask | None, stand_in: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, float, int, int]:
    # The seed (a pointer that a flag switches off must still be one), factor, threshold and stream.
    if mask is None:
        return stand_in, scale, 0, 0
    return mask.on(stand_in.device).seed, scale * mask.factor, mask.threshold, signed32(mask.stream)


def _sum_parts(out: torch.Tensor, partial: torch.Tensor) -> None:
    sum_parts_kernel[(-(-out.numel() // _PART),)](out, partial, out.numel(), partial.shape[0], PART=_PART)


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
    (tokens, size), rank = x.shape, a.shape[0]
    aligned = is_aligned(rank, rank, x)
    config = config or config_for("shrink", x.dtype, aligned)
    a, transposed = _oriented(a, mask)
    seed, factor, threshold, stream = _drop(mask, x, scale)
    width, blocks = rank_for(rank)
    tall = tall_for(tokens, config)
    splits, chunk = parts_for(blocks * tall, size, config.columns, x.device, least)
    target = out if splits == 1 else torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    shrink_kernel[(blocks, tall, splits)](
        target, x, a, seed, size, tokens, rank, chunk // config.columns, x.stride(0), factor, threshold, stream,
        TOKENS=config.tokens, COLUMNS=config.columns, RANK=width, TRANSPOSED=transposed,
        ALIGNED=aligned, HAS_DROPOUT=mask is not None, PRECISION=precision(x.dtype, build_platform()),
        UPCAST=interpreting(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_parts(out, target)


def tsreduce(
    out: torch.Tensor,
    t: torch.Tensor,
    z: torch.Tensor,
    mask: Mask | None,
    config: SkinnyConfig | None = None,
    least: int = 256,
) -> None:
    """Launch `reduce_kernel`; t and z have unit column stride, no size is zero, a part has `least` tokens or more."""
    (tokens, size), rank = z.shape, t.shape[1]
    aligned = is_aligned(rank, t.stride(0), z)
    config = config or config_for("reduce", z.dtype, aligned)
    seed, factor, threshold, stream = _drop(mask, z)
    width, blocks = rank_for(rank)
    wide = -(-size // config.columns)
    splits, chunk = parts_for(blocks * wide, tokens, config.tokens, z.device, least)
    target = out if splits == 1 else torch.empty(splits, rank, size, dtype=torch.float32, device=z.device)
    reduce_kernel[(blocks, wide, splits)](
        target, z, t, seed, size, tokens, rank, chunk, z.stride(0), t.stride(0), factor, threshold, stream,
        TOKENS=config.tokens, COLUMNS=config.columns, RANK=width,
        ALIGNED=aligned, HAS_DROPOUT=mask is not None, PRECISION=precision(z.dtype, build_platform()),
        UPCAST=interpreting(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        _sum_parts(out, target)


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
    (tokens, size), rank = out.shape, t.shape[1]
    aligned = is_aligned(rank, t.stride(0), out, *(() if base is None else (base,)))
    config = config or config_for("expand", out.dtype, aligned)
    b, transposed = _oriented(b, mask)
    seed, factor, threshold, stream = _drop(mask, out)
    source = out if base is None else base
    expand_kernel[(-(-size // config.columns), tall_for(tokens, config))](
        out, source, out if bias is None else bias, t, b, seed,
        size, tokens, rank, out.stride(0), source.stride(0), t.stride(0), factor, threshold, stream,
        TOKENS=config.tokens, COLUMNS=config.columns, RANK=step_for(rank, out.dtype), TRANSPOSED=transposed,
        ADD=base is not None, HAS_BIAS=bias is not None, ALIGNED=aligned, HAS_DROPOUT=mask is not None,
        PRECISION=precision(out.dtype, build_platform()), UPCAST=interpreting(),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _aot_case(
    kernel: Any, rank: int, drop: bool, dtype: torch.dtype, out: str, label: str, flags: dict[str, bool], **where: Any
) -> dict[str, Any]:
    platform, x = where["platform"], f"*{AOT_DTYPES[dtype]}"
    config = config_for(kernel.__name__.removesuffix("_kernel"), dtype, where["aligned"], platform)
    fixed: dict[str, Any] = {"TOKENS": config.tokens, "COLUMNS": config.columns, "RANK": rank, "HAS_DROPOUT": drop}
    fixed |= {"ALIGNED": where["aligned"]}
    fixed |= {"PRECISION": precision(dtype, platform), "UPCAST": False}
    types = dict.fromkeys(("rank", "steps", "t_stride", "threshold", "stream"), "i32")
    types |= dict.fromkeys(("x_ptr", "factor_ptr", "t_ptr", "bias_ptr"), x)
    types |= {"seed_ptr": "*i64", "factor": "fp32", "out_ptr": f"*{out}"}
    # All are bound by memory. Where a mask meets the left operand in registers, the compiler may serialise products
    # (C7515); fewer than 64 rows go to the older matrix instruction on later chips.
    older = (kernel is shrink_kernel and drop) or (kernel is reduce_kernel and rank < 64)
    launch = {"warps": config.warps, "stages": config.stages, "matrix": platform == "hip" or not older}
    shape = f"{x[1:]} {config.tokens}x{config.columns}x{rank}" + " dropout" * drop + label
    return aot_case(kernel, shape, {**fixed, **flags}, types, **where, **launch)


def aot_cases() -> Iterator[dict[str, Any]]:
    """Every combination that the functions here launch, for the ahead-of-time compile check.

    Yields:
        Descriptions as in `ops/_reduce.py`.
    """
    flags = (False, True)
    for platform, aligned, (dtype, x) in itertools.product(("cuda", "hip"), flags, AOT_DTYPES.items()):
        where = {"platform": platform, "aligned": aligned}
        for rank, drop in itertools.product((16, 32, 64), flags):
            yield _aot_case(reduce_kernel, rank, drop, dtype, "fp32", "", {}, **where)
            for transposed in (False,) if drop else flags:
                label, given = " transposed" * transposed, {"TRANSPOSED": transposed}
                for out in dict.fromkeys((x, "fp32")):
                    form = label + " split" * (out != x)
                    yield _aot_case(shrink_kernel, rank, drop, dtype, out, form, given, **where)
                forms = ((False, False), (False, True), (True, False)) if step_for(rank, dtype) == rank else ()
                for add, bias in forms:
                    form = label + " add" * add + " bias" * bias
                    both = {**given, "ADD": add, "HAS_BIAS": bias}
                    yield _aot_case(expand_kernel, rank, drop, dtype, x, form, both, **where)
        yield aot_case(sum_parts_kernel, x, {"PART": _PART}, {"out_ptr": f"*{x}"}, **where)
