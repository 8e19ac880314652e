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


@triton.jit
def token_rows(index_ptr, token, last, HAS_INDEX: tl.constexpr):
    """The int64 rows of a block of tokens: from a list, or the tokens themselves."""
    if HAS_INDEX:
        return tl.load(index_ptr + token, mask=token < last, other=0)
    return token.to(tl.int64)


@triton.jit
def add_tile(out_ptr, rows, columns, height, width, stride, tile, LOWER: tl.constexpr):
    """Add a tile to a matrix in memory, or to the lower triangle of a square one."""
    if LOWER:
        add_lower(out_ptr, rows, columns, height, stride, tile)
    else:
        mask = (rows[:, None] < height) & (columns[None, :] < width)
        pointers = out_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
        tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + tile, mask=mask)
