"""The Triton kernel of the random matrix.

out[i, j] = 1 - 2 * bit (j % 32) of word (j % 128) // 32 of philox(j // 128, i, stream, step)        signs
out[i, j] = normal draw j % 4 of philox(j // 4, i, stream, step)                                     normal draws
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._tiles import signed32
from lora_kernels.ops._tl import gaussian_pair, philox

# Rows and counters of a program, the same for every chip until a measurement says otherwise. 32 rows of normal draws
# take twice the registers, and spill on sm_120 where nothing is aligned.
_SIGNS, _NORMAL = (32, 1), (16, 16)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "stream", "step"])
def draw_kernel(
    out_ptr,  # (size, columns), or (2, size, columns) if PAIR
    size, columns, seed_low, seed_high, stream, step,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SIGNS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows and 128 (SIGNS) or 4 columns per counter; if PAIR, what rounding took away comes second."""
    # Both sizes may need more programs than a grid's second axis holds.
    WIDTH: tl.constexpr = GROUPS * (128 if SIGNS else 4)
    wide = (columns - 1) // WIDTH + 1
    tall = tl.program_id(0) // wide
    place = tl.program_id(0) - tall * wide
    row = tall * ROWS + tl.arange(0, ROWS)
    group = place * GROUPS + tl.arange(0, GROUPS)
    zero = tl.zeros((ROWS, GROUPS), dtype=tl.uint32)
    words = philox(
        zero + group[None, :].to(tl.uint32),
        zero + row[:, None].to(tl.uint32),
        zero + tl.cast(stream, tl.uint32),
        zero + tl.cast(step, tl.uint32),
        tl.cast(seed_low, tl.uint32),
        tl.cast(seed_high, tl.uint32),
    )
    pointers = out_ptr + row[:, None].to(tl.int64) * columns
    if SIGNS:
        bit = tl.arange(0, 32)
        for number in tl.static_range(4):
            column = place * WIDTH + number * 32 + bit
            minus = (words[number] >> bit[None, :].to(tl.uint32)) & 1
            sign = tl.where(minus != 0, -1.0, 1.0).to(out_ptr.dtype.element_ty)
            tl.store(pointers + column[None, :], sign, mask=(row[:, None] < size) & (column[None, :] < columns))
    else:
        z0, z1 = gaussian_pair(words[0], words[1])
        z2, z3 = gaussian_pair(words[2], words[3])
        # The last index of a join is its second operand's: (0, 0), (0, 1), (1, 0), (1, 1) are z0, z1, z2, z3.
        draws = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (ROWS, WIDTH))
        column = place * WIDTH + tl.arange(0, WIDTH)
        pointers += column[None, :]
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
    tall, groups = _SIGNS if signs else _NORMAL
    wide = groups * (128 if signs else 4)
    launch(
        draw_kernel, (-(-rows // tall) * -(-columns // wide), 1, 1), (out,),
        (rows, columns, signed32(seed), signed32(seed >> 32), signed32(stream), signed32(step)),
        constants_of(ROWS=tall, GROUPS=groups, SIGNS=signs, PAIR=out.dim() == 3),
    )  # fmt: skip
