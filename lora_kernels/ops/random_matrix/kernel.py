"""Triton kernels of the random matrix.

out[i, j] = 1 - 2 * bit (j % 32) of word (j % 128) // 32 of philox(j // 128, i, stream, step)        signs_kernel
out[i, j] = normal draw j % 4 of philox(j // 4, i, stream, step)                                     normal_kernel
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._tiles import signed32
from lora_kernels.ops._tl import gaussian_pair, philox

# Rows per program, the same for every chip until a measurement says otherwise.
_SIGN_ROWS = 32
_NORMAL_ROWS, _NORMAL_GROUPS = 16, 16  # 32 rows take twice the registers, and spill on sm_120 where nothing is aligned


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step"])
def signs_kernel(
    out_ptr,  # (size, columns)
    size, columns, seed_low, seed_high, stream, step,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and 128 columns; both sizes may need more than a grid's second axis holds."""
    wide = (columns - 1) // 128 + 1
    tall = tl.program_id(0) // wide
    row = tall * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) - tall * wide
    zero = tl.zeros((ROWS,), dtype=tl.uint32)
    words = philox(
        zero + group.to(tl.uint32),
        row.to(tl.uint32),
        zero + tl.cast(stream, tl.uint32),
        zero + tl.cast(step, tl.uint32),
        tl.cast(seed_low, tl.uint32),
        tl.cast(seed_high, tl.uint32),
    )
    bit = tl.arange(0, 32)
    pointers = out_ptr + row[:, None].to(tl.int64) * columns
    for number in tl.static_range(4):
        column = group * 128 + number * 32 + bit
        minus = (words[number][:, None] >> bit[None, :].to(tl.uint32)) & 1
        sign = tl.where(minus != 0, -1.0, 1.0).to(out_ptr.dtype.element_ty)
        tl.store(pointers + column[None, :], sign, mask=(row[:, None] < size) & (column[None, :] < columns))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step"])
def normal_kernel(
    out_ptr,  # (size, columns), or (2, size, columns) if PAIR
    size, columns, seed_low, seed_high, stream, step,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and 4 * GROUPS columns; if PAIR, what rounding to the dtype took away comes second."""
    wide = (columns - 1) // (4 * GROUPS) + 1
    tall = tl.program_id(0) // wide
    place = tl.program_id(0) - tall * wide
    row = tall * ROWS + tl.arange(0, ROWS)
    group = place * GROUPS + tl.arange(0, GROUPS)
    zero = tl.zeros((ROWS, GROUPS), dtype=tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + group[None, :].to(tl.uint32),
        zero + row[:, None].to(tl.uint32),
        zero + tl.cast(stream, tl.uint32),
        zero + tl.cast(step, tl.uint32),
        tl.cast(seed_low, tl.uint32),
        tl.cast(seed_high, tl.uint32),
    )
    z0, z1 = gaussian_pair(w0, w1)
    z2, z3 = gaussian_pair(w2, w3)
    # The last index of a join is its second operand's: (0, 0), (0, 1), (1, 0), (1, 1) are z0, z1, z2, z3.
    draws = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (ROWS, 4 * GROUPS))
    column = place * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    pointers = out_ptr + row[:, None].to(tl.int64) * columns + column[None, :]
    mask = (row[:, None] < size) & (column[None, :] < columns)
    high = draws.to(out_ptr.dtype.element_ty)
    tl.store(pointers, high, mask=mask)
    if PAIR:
        low = (draws - high.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(pointers + tl.cast(size, tl.int64) * columns, low, mask=mask)


def random_matrix(out: torch.Tensor, kind: str, seed: int, stream: int, step: int) -> None:
    """Fill `out`, contiguous; `(2, rows, columns)` takes gaussian draws as a rounded part and the rest."""
    rows, columns = out.shape[-2:]
    if out.numel() == 0:
        return
    signs = kind == "rademacher"
    kernel, tall, wide = (signs_kernel, _SIGN_ROWS, 128) if signs else (normal_kernel, _NORMAL_ROWS, 4 * _NORMAL_GROUPS)
    numbers = (rows, columns, signed32(seed), signed32(seed >> 32), signed32(stream), signed32(step))
    constants = (
        constants_of(ROWS=tall) if signs else constants_of(ROWS=tall, GROUPS=_NORMAL_GROUPS, PAIR=out.dim() == 3)
    )
    launch(kernel, (-(-rows // tall) * -(-columns // wide), 1, 1), (out,), numbers, constants)
