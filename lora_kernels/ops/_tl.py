"""Device helpers shared by the Triton kernels; the only file that knows about the interpreter's limits."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`acc + a @ b` in float32.

    UPCAST is set in the interpreter only, whose dot multiplies the bit patterns of bfloat16 (triton #11584).
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_lower(out_ptr, rows, columns, size, stride, tile):
    """Add a tile to the lower triangle of a matrix in memory."""
    mask = (rows[:, None] < size) & (columns[None, :] <= rows[:, None])
    pointers = out_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + tile, mask=mask)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of a tile, without a trip through memory."""
    parts = tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    return tl.split(parts)
