"""Host and device helpers shared by the Triton kernels."""

import pytest
import torch

from lora_kernels.ops import _tiles
from tests.helpers.accuracy import assert_accurate, rounding


@pytest.mark.parametrize(
    "size, rows, columns",
    [(0, 16, 16), (1, 16, 16), (100, 16, 32), (300, 128, 256), (300, 256, 128), (1500, 64, 64), (129, 128, 128)],
)
def test_tiles_cover_the_lower_triangle_once(size, rows, columns):
    tiles = _tiles.lower_tiles(size, rows, columns)
    covered = torch.zeros(-(-size // rows) * rows, -(-size // columns) * columns, dtype=torch.int32)
    for i, j in tiles:
        block = covered[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        assert block.shape == (rows, columns)
        assert bool(block.new_ones(rows, columns).tril(i * rows - j * columns)[: size - i * rows].any()), "all above"
        block += 1
    lower = covered[:size, :size].tril()
    assert torch.equal(lower, torch.ones(size, size, dtype=torch.int32).tril())
    assert int(covered.max() if size else 0) <= 1


def test_neighbours_in_the_list_share_operands():
    """Panels of x that 64 programs in flight read: 16 in a super-block, and about 64 if the order were row by row."""
    tiles = _tiles.lower_tiles(14336, 128, 128)
    ordered = sorted(tiles)

    def panels(order):
        windows = [order[low : low + 64] for low in range(0, len(order), 64)]
        return sum(len({("row", i) for i, _ in each} | {("column", j) for _, j in each}) for each in windows)

    assert len(tiles) == 112 * 113 // 2
    assert panels(tiles) < 0.5 * panels(ordered)


@pytest.mark.parametrize(
    "tiles, tokens, processors, expected",
    [
        (1000, 8192, 132, 1),  # the chip is full
        (264, 8192, 132, 1),  # exactly two programs each
        (263, 8192, 132, 2),
        (3, 8192, 132, 8),  # held back by 1024 tokens a part
        (3, 100, 132, 1),
        (3, 0, 132, 1),
        (100, 10**6, 132, 3),
        (0, 10**6, 4, 8),
    ],
)
def test_splits_fill_the_chip_only_where_it_pays(tiles, tokens, processors, expected):
    assert _tiles.token_splits(tiles, tokens, processors) == expected


def test_least_tokens_of_a_part():
    for tokens in (1, 63, 64, 1000, 4096):
        splits = _tiles.token_splits(1, tokens, 1000, least=64)
        assert splits == max(1, tokens // 64)


triton = pytest.importorskip("triton")
import triton.language as tl

from lora_kernels.ops._tl import add_tile, dot, halves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _halves_kernel(low_ptr, high_ptr, tile_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    low, high = halves(tl.load(tile_ptr + row * COLUMNS + column), ROWS, COLUMNS)
    half = row * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    tl.store(low_ptr + half, low)
    tl.store(high_ptr + half, high)


@triton.jit
def _add_lower_kernel(out_ptr, tile_ptr, size, stride, first_row, first_column, SIDE: tl.constexpr):
    inner = tl.arange(0, SIDE)
    tile = tl.load(tile_ptr + inner[:, None] * SIDE + inner[None, :])
    add_tile(out_ptr, first_row + inner, first_column + inner, size, size, stride, tile, True)


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, SIDE: tl.constexpr, UPCAST: tl.constexpr):
    inner = tl.arange(0, SIDE)
    place = inner[:, None] * SIDE + inner[None, :]
    acc = tl.full((SIDE, SIDE), 2.0, dtype=tl.float32)
    tl.store(out_ptr + place, dot(tl.load(a_ptr + place), tl.load(b_ptr + place), acc, "ieee", UPCAST))


def test_halves_are_the_left_and_the_right_columns():
    tile = torch.arange(8 * 16, dtype=torch.float32, device=DEVICE).reshape(8, 16)
    low, high = torch.empty(8, 8, device=DEVICE), torch.empty(8, 8, device=DEVICE)
    _halves_kernel[(1,)](low, high, tile, ROWS=8, COLUMNS=16)
    assert torch.equal(low, tile[:, :8]) and torch.equal(high, tile[:, 8:])


@pytest.mark.parametrize("first_row, first_column", [(0, 0), (16, 0), (16, 16), (0, 16)])
def test_add_lower_touches_the_lower_triangle_alone(first_row, first_column):
    size, wide = 27, torch.randn(27, 40, device=DEVICE)
    tile = torch.randn(16, 16, device=DEVICE)
    expected = wide.clone()
    for i in range(16):
        for j in range(16):
            row, column = first_row + i, first_column + j
            if row < size and column <= row:
                expected[row, column] += tile[i, j]
    _add_lower_kernel[(1,)](wide, tile, size, wide.stride(0), first_row, first_column, SIDE=16)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot_accumulates_products_of_every_dtype(dtype):
    a, b = (torch.randn(16, 16, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty(16, 16, device=DEVICE)
    _dot_kernel[(1,)](out, a, b, SIDE=16, UPCAST=DEVICE == "cpu")
    truth = a.double() @ b.double() + 2.0
    assert_accurate(out, truth, rounding(torch.float32, 17))
