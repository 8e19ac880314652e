"""A kernel whose work vanishes: what a miscompiled one looks like."""

import triton
import triton.language as tl


@triton.jit
def kernel(out_ptr, width, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    tl.load(out_ptr + row, mask=row < width)
