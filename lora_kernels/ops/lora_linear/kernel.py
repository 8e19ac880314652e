"""The layer's large product and its low-rank term in one Triton kernel.

    y[k, j]  = bias[j] + sum_i x[k, i] W[j, i] + sum_c t[k, c] B[j, c]              forward
    dx[k, j] = sum_i g[k, i] W[i, j] + factor * m[k, j] sum_c u[k, c] A[c, j]       backward

The low-rank term comes after the loop over the inner size: one product per step of a loop (two into one accumulator
are miscompiled on Blackwell, triton #10821), and what it needs of registers the loop does not. Under a mask it has an
accumulator of its own, which a wide tile has room for in quarters only. All sums are float32 and rounded once. m is the
dropout mask of `_philox.keep_mask`, as bits that another kernel has written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._tiles import build_platform, capability_of, precision
from lora_kernels.ops._tl import INTERPRETED, dot, halves, keep_factors, load_tile
from lora_kernels.ops.lora_linear.config import GemmConfig, candidates, config_for, is_aligned
from lora_kernels.ops.skinny.kernel import bits_of

_GROUP = 8  # tile rows that are gone through column by column: neighbours share operands in the second-level cache


@triton.jit
def finish(
    acc, token, first, pointers, numbers,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the low-rank term and the bias to a tile whose columns start at `first`, and store it."""
    out_ptr, bias_ptr, t_ptr, factor_ptr, bits_ptr = pointers
    size, n_tokens, rank, out_stride, t_stride, factor = numbers
    column = first + tl.arange(0, COLUMNS)
    row = token.to(tl.int64)
    # A mask is not for what came before it: then the term has an accumulator of its own.
    low = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32) if HAS_DROPOUT else acc
    for start in tl.range(0, rank, RANK, num_stages=1):
        lane = start + tl.arange(0, RANK)
        t = load_tile(t_ptr + row[:, None] * t_stride + lane[None, :], token[:, None] < n_tokens, lane[None, :] < rank)
        if TRANSPOSED:
            place = lane[:, None] + column.to(tl.int64)[None, :] * rank
        else:
            place = lane.to(tl.int64)[:, None] * size + column[None, :]
        b = load_tile(factor_ptr + place, lane[:, None] < rank, column[None, :] < size)
        low = dot(t, b, low, PRECISION, UPCAST)
    if HAS_DROPOUT:
        octet = first // 8 + tl.arange(0, COLUMNS // 8)
        low = acc + low * keep_factors(bits_ptr, token, octet, n_tokens, size, factor, TOKENS, COLUMNS // 8)
    if HAS_BIAS:
        low += tl.load(bias_ptr + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    mask = (token[:, None] < n_tokens) & (column[None, :] < size)
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], low.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_halves(
    acc, token, first, pointers, numbers,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`finish`, half by half."""
    low, high = halves(acc, TOKENS, COLUMNS)
    HALF: tl.constexpr = COLUMNS // 2
    finish(
        low, token, first, pointers, numbers, TOKENS, HALF, RANK, TRANSPOSED, HAS_BIAS, HAS_DROPOUT, PRECISION, UPCAST
    )
    finish(
        high, token, first + HALF, pointers, numbers,
        TOKENS, HALF, RANK, TRANSPOSED, HAS_BIAS, HAS_DROPOUT, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "rank", "t_stride"])
def linear_kernel(
    out_ptr,  # (n_tokens, size)
    x_ptr,  # (n_tokens, inner)
    right_ptr,  # (inner, size); if RIGHT_TRANSPOSED the transposed view of a row-major (size, inner)
    bias_ptr,  # (size,), if HAS_BIAS
    t_ptr,  # (n_tokens, rank)
    factor_ptr,  # (rank, size); if TRANSPOSED the transposed view of a row-major (size, rank)
    bits_ptr,  # (n_tokens, ceil(size / 8)) uint8, if HAS_DROPOUT
    size, inner, n_tokens, rank, out_stride, x_stride, right_stride, t_stride, factor,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    QUARTERS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of `bias + factor * mask * (t b) + x right`, rounded once."""
    # The launcher pads: both are multiples of 8, which Triton itself does not look for.
    rank, t_stride = rank // 8 * 8, t_stride // 8 * 8
    wide = tl.cdiv(size, COLUMNS)
    group = tl.program_id(0) // (GROUP * wide)
    inside = tl.program_id(0) % (GROUP * wide)
    height = tl.minimum(tl.cdiv(n_tokens, TOKENS) - group * GROUP, GROUP)
    first = inside // height * COLUMNS
    token = (group * GROUP + inside % height) * TOKENS + tl.arange(0, TOKENS)
    column = first + tl.arange(0, COLUMNS)
    row = token.to(tl.int64)

    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner, STEP):
        place = start + tl.arange(0, STEP)
        x = load_tile(
            x_ptr + row[:, None] * x_stride + place[None, :], token[:, None] < n_tokens, place[None, :] < inner
        )
        # The axis that is contiguous in memory is loaded as such: no tile is transposed.
        if RIGHT_TRANSPOSED:
            at = place[:, None] + column.to(tl.int64)[None, :] * right_stride
        else:
            at = place.to(tl.int64)[:, None] * right_stride + column[None, :]
        right = load_tile(right_ptr + at, place[:, None] < inner, column[None, :] < size)
        acc = dot(x, right, acc, PRECISION, UPCAST)

    pointers = (out_ptr, bias_ptr, t_ptr, factor_ptr, bits_ptr)
    numbers = (size, n_tokens, rank, out_stride, t_stride, factor)
    if QUARTERS:
        low, high = halves(acc, TOKENS, COLUMNS)
        HALF: tl.constexpr = COLUMNS // 2
        finish_halves(
            low, token, first, pointers, numbers,
            TOKENS, HALF, RANK, TRANSPOSED, HAS_BIAS, HAS_DROPOUT, PRECISION, UPCAST,
        )  # fmt: skip
        finish_halves(
            high, token, first + HALF, pointers, numbers,
            TOKENS, HALF, RANK, TRANSPOSED, HAS_BIAS, HAS_DROPOUT, PRECISION, UPCAST,
        )  # fmt: skip
    else:
        finish(
            acc, token, first, pointers, numbers,
            TOKENS, COLUMNS, RANK, TRANSPOSED, HAS_BIAS, HAS_DROPOUT, PRECISION, UPCAST,
        )  # fmt: skip


def fitting(wanted: GemmConfig | None, out: torch.Tensor, x: torch.Tensor, right: torch.Tensor) -> GemmConfig:
    """A configuration for these very tensors: the one wanted, unless it was for another chip, dtype or alignment."""
    kind: dict[str, Any] = {"aligned": is_aligned(out, x, right), "capability": capability_of(out.device)}
    if wanted is not None and wanted in candidates(out.dtype, **kind):
        return wanted
    return config_for((out.shape[0], x.shape[1], out.shape[1]), out.dtype, **kind)


def _padded(t: torch.Tensor, b: torch.Tensor, mask: Mask | None) -> tuple[torch.Tensor, torch.Tensor, bool]:
    # Ranks come in eights; there is no kernel for a transposed factor and a mask, which a layer never has together.
    short = -t.shape[1] % 8
    if short:
        t, b = torch.nn.functional.pad(t, (0, short)), torch.nn.functional.pad(b, (0, 0, 0, short))
    if t.stride(1) != 1 or t.stride(0) % 8:
        t = t.contiguous()
    transposed = mask is None and not b.is_contiguous() and b.mT.is_contiguous()
    return t, b if transposed else b.contiguous(), transposed


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    right: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    mask: Mask | None = None,
    config: GemmConfig | None = None,
) -> None:
    """`out = bias + x right + drop(t b)`, of one dtype; `out` and x have unit column stride, the others any strides."""
    (tokens, size), inner = out.shape, x.shape[1]
    if out.numel() == 0:
        return
    right_transposed = right.stride(1) != 1 and right.stride(0) == 1
    right = right if right_transposed or right.stride(1) == 1 else right.contiguous()
    t, b, transposed = _padded(t, b, mask)
    config = config or fitting(None, out, x, right)
    bits, factor = bits_of(mask, out)
    constants = constants_of(
        config.warps, config.stages,
        TOKENS=config.tokens, COLUMNS=config.columns, STEP=config.step, RANK=config.rank, GROUP=_GROUP,
        RIGHT_TRANSPOSED=right_transposed, TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        HAS_DROPOUT=mask is not None, QUARTERS=config.quarters(mask is not None),
        PRECISION=precision(out.dtype, build_platform()), UPCAST=INTERPRETED,
    )  # fmt: skip
    strides = out.stride(0), x.stride(0), right.stride(1 if right_transposed else 0), t.stride(0)
    launch(
        linear_kernel, (-(-tokens // config.tokens) * -(-size // config.columns), 1, 1),
        (out, x, right, out if bias is None else bias, t, b, bits),
        (size, inner, tokens, t.shape[1], *strides, factor), constants,
    )  # fmt: skip
