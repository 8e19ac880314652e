"""Device helpers shared by the Triton kernels; the only file that knows about the interpreter's limits."""

import triton
import triton.language as tl
from triton.runtime import JITFunction


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`acc + a @ b` in float32; UPCAST in the interpreter, whose dot multiplies bits of bfloat16 (triton #11584)."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


# Whether kernels run in the interpreter, which Triton decides when it is imported.
INTERPRETED = not isinstance(dot, JITFunction)


@triton.jit
def load_tile(pointers, rows_inside, columns_inside):
    """A tile of a matrix, zero outside of it."""
    return tl.load(pointers, mask=rows_inside & columns_inside, other=0.0)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and right half of a tile, without a trip through memory."""
    parts = tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
    return tl.split(parts)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1, ROUNDS: tl.constexpr = 10):
    """Four random words per counter, all uint32: Philox 4x32, see `_philox.py`."""
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        c1, c3, low0, low1 = high1 ^ c1 ^ key0, high0 ^ c3 ^ key1, c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = c1, low1, c3, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def load_key(seed_ptr):
    """Both halves of a seed that lies in memory, so that it may be drawn on the device."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def draw_words(rows, groups, key0, key1, stream, step, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The four words of counters, each `(ROWS, GROUPS)` uint32, of two 16-bit numbers, the low half first."""
    zero = tl.zeros((ROWS, GROUPS), dtype=tl.uint32)
    return philox(
        zero + groups[None, :].to(tl.uint32),
        zero + rows[:, None].to(tl.uint32),
        zero + tl.cast(stream, tl.uint32),
        zero + tl.cast(step, tl.uint32),
        key0,
        key1,
        7,
    )


@triton.jit
def half_tile(rows, groups, key0, key1, stream, step, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """`_philox.halves`: `(ROWS, 8 * GROUPS)` uint32, of which column group g holds columns 8 g to 8 g + 7."""
    w0, w1, w2, w3 = draw_words(rows, groups, key0, key1, stream, step, ROWS, GROUPS)
    # The last index of a join is its second operand's: words in order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, 8 * GROUPS))


@triton.jit
def word_bits(word, least, PLACE: tl.constexpr):
    """Whether both halves of words are at least a number, as two bits."""
    return tl.where((word << 16) >= least, 1 << PLACE, 0) | tl.where(word >= least, 2 << PLACE, 0)


@triton.jit
def keep_bits(rows, groups, key0, key1, stream, threshold, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Which elements of a tile dropout keeps: `(ROWS, GROUPS)` int32, whose bit j is for column j of a group of 8.

    The definition is `_philox.keep_mask`.
    """
    w0, w1, w2, w3 = draw_words(rows, groups, key0, key1, stream, 0, ROWS, GROUPS)
    least = tl.cast(threshold, tl.uint32) << 16  # halves are compared in the upper half of a word: none is shifted down
    return word_bits(w0, least, 0) | word_bits(w1, least, 2) | word_bits(w2, least, 4) | word_bits(w3, least, 6)


@triton.jit
def kept(bits, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The elements of `keep_bits`, one by one: `(ROWS, 8 * GROUPS)` bool."""
    return tl.reshape((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (ROWS, 8 * GROUPS)) != 0


@triton.jit
def place_bits(bits_ptr, rows, groups, n_rows, size):
    """Where the bits of a matrix of `size` columns are, a byte per group, and which of them are inside."""
    pitch = tl.cdiv(size, 8)
    inside = (rows[:, None] < n_rows) & (groups[None, :] < pitch)
    return bits_ptr + rows[:, None].to(tl.int64) * pitch + groups[None, :], inside


@triton.jit
def keep_factors(bits_ptr, rows, groups, n_rows, size, factor, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """What dropout multiplies a tile by, from the bits in memory: `factor` or 0."""
    at, inside = place_bits(bits_ptr, rows, groups, n_rows, size)
    return tl.where(kept(tl.load(at, mask=inside, other=0).to(tl.int32), ROWS, GROUPS), factor, 0.0)


@triton.jit
def gaussian_pair(first, second):
    """Two standard normal draws per pair of uint32 words, by Box-Muller in float32, to an absolute 1e-6.

    No `tl.log`, `tl.sin` or `tl.cos`: their range reduction takes local memory, and near u = 1 float32 cannot hold the
    uniform number. csrc/random.cpp has the same polynomials.
    """
    # sqrt(-2 ln u), u = (word + 1/2) / 2^32: the logarithm of 1 + f for f in [sqrt(1/2) - 1, sqrt(2) - 1]. Near u = 1
    # f is -(1 - u), which is known exactly from the complement of the word.
    near_one = first >= 0xB504F334
    bits = (first.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(near_one, ((first ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * -(2.0**-32), mantissa - 1.0)
    e = tl.where(near_one, 0.0, (exponent - 32).to(tl.float32))
    p = f * -0.0785954578 + 0.128816224
    p = p * f - 0.131287677
    p = p * f + 0.141811961
    p = p * f - 0.166245531
    p = p * f + 0.200022861
    p = p * f - 0.250008104
    p = p * f + 0.333333167
    square = f * f
    log1p = f - 0.5 * square + square * f * p
    # ln 2 in two parts, of which the first is short: its product with e is exact.
    radius = tl.sqrt_rn(-2.0 * (e * 0.693359375 + (e * -2.12194440e-4 + log1p)))
    # Cosine and sine of 2 pi (word + 1/2) / 2^32: the nearest quarter turn, and polynomials for the rest.
    quarter = (second + 0x20000000) >> 30
    x = ((second - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * (2.0**-32)
    square = x * x
    s = square * -75.4020678 + 81.5925535
    s = s * square - 41.3416626
    s = x * 6.28125 + x * (0.0019353072 + square * s)
    c = square * 59.2459618 - 85.4437417
    c = c * square + 64.9393265
    c = c * square - 19.7392087
    c = 1.0 + square * c
    odd = (quarter & 1) != 0
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


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
        mask = (rows[:, None] < height) & (columns[None, :] <= rows[:, None])
    else:
        mask = (rows[:, None] < height) & (columns[None, :] < width)
    pointers = out_ptr + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + tile, mask=mask)


@triton.jit
def finish_tile(
    out_ptr, partial_ptr, packed, acc, height, width, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, TWO_SLICES: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Add the sum of a tile `packed` (row << 16 | column) to `out`, or store that of a part in `partial` if SPLIT."""
    rows = (packed >> 16) * ROWS + tl.arange(0, ROWS)
    columns = (packed & 0xFFFF) * COLUMNS
    if SPLIT:
        slot = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(partial_ptr + slot * (ROWS * COLUMNS) + inner, acc)
    elif TWO_SLICES:
        low, high = halves(acc, ROWS, COLUMNS)
        half = columns + tl.arange(0, COLUMNS // 2)
        add_tile(out_ptr, rows, half, height, width, stride, low, LOWER)
        add_tile(out_ptr, rows, half + COLUMNS // 2, height, width, stride, high, LOWER)
    else:
        add_tile(out_ptr, rows, columns + tl.arange(0, COLUMNS), height, width, stride, acc, LOWER)
