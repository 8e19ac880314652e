"""Host side of tiled kernels: which tiles to compute, in which order, and how to split the reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_SUPER = 8
# The width of a tile of ranks (or of columns of a sketch), a power of two.
LEAST_RANK, MOST_RANK = 16, 64
# Programs along the second or third axis of a grid; along the first there may be 2^31 - 1.
MOST_PROGRAMS = 65535


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch shape of a matrix product over tokens."""

    rows: int
    columns: int  # a tile of 256 is written in two halves, as one would spill registers
    tokens: int  # per step of the loop
    warps: int
    stages: int  # depth of the load pipeline

    def constants(self, dtype: torch.dtype, platform: str) -> dict[str, Any]:
        """Those of a kernel on these tiles."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "TOKENS": self.tokens}
        return {**sizes, "TWO_SLICES": self.columns > 128, "PRECISION": precision(dtype, platform)}


WIDE = TileConfig(128, 256, 64, 8, 3)
SQUARE = TileConfig(128, 128, 64, 8, 3)
# The square tile's matrix instructions serialise in Triton 3.6 (ptxas C7515).
HOPPER_HALF = TileConfig(64, 128, 64, 4, 4)
SMALL = TileConfig(64, 64, 64, 4, 4)
SINGLE = TileConfig(64, 64, 32, 4, 3)  # float32
RAGGED = TileConfig(64, 64, 32, 8, 3)  # not aligned: every element's address takes registers
AMD_SQUARE = TileConfig(128, 128, 64, 8, 2)  # 64 KB of local memory hold two stages
AMD_SMALL = TileConfig(64, 64, 32, 4, 2)


def lower_tiles(size: int, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Pairs `(tile row, tile column)` that cover the lower triangle (diagonal included) of a square matrix.

    Neighbours in the list share operands: the order is by super-blocks of 8 x 8 tiles, which keeps both operands of a
    block in the second-level cache (14336 columns read 3.1 instead of 7.7 GB).
    """
    tall, wide = -(-size // rows), -(-size // columns)
    return tuple(
        (i, j)
        for block_row in range(0, tall, _SUPER)
        for block_column in range(0, wide, _SUPER)
        for i in range(block_row, min(block_row + _SUPER, tall))
        for j in range(block_column, min(block_column + _SUPER, wide))
        if j * columns < min((i + 1) * rows, size)
    )


def grouped_tiles(height: int, width: int, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Pairs `(tile row, tile column)` that cover a matrix, in groups of 8 tile rows: neighbours share operands."""
    tall, wide = -(-height // rows), -(-width // columns)
    return tuple(
        (i, j) for group in range(0, tall, _SUPER) for j in range(wide) for i in range(group, min(group + _SUPER, tall))
    )


@functools.lru_cache(maxsize=128)
def tile_map(order: Callable[..., tuple[tuple[int, int], ...]], sizes: tuple[int, ...], device: Any) -> torch.Tensor:
    """`order(*sizes)` as int32 `tile row << 16 | tile column`; kept, as the copy to the device stalls a call."""
    return torch.tensor([i << 16 | j for i, j in order(*sizes)], dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=512)
def int64_on(device: torch.device, values: tuple[int, ...]) -> torch.Tensor:
    """Numbers on a device; kept, as the copy stalls a call, and cannot be captured in a graph."""
    return torch.tensor(values, dtype=torch.int64).to(device)


def token_splits(tiles: int, tokens: int, processors: int, *, least: int = 1024) -> int:
    """In how many parts, of `least` tokens or more, a small matrix fills the chip; an ordered stage adds them up."""
    if tiles >= 2 * processors:
        return 1
    wanted = -(-2 * processors // max(tiles, 1))
    return max(1, min(wanted, tokens // least))


def parts_for(tiles: int, length: int, step: int, device: torch.device, least: int) -> tuple[int, int]:
    """How many parts, of `least` or more, a sum of `tiles` programs is cut into, and their length in whole steps."""
    chunk = -(-length // token_splits(tiles, length, processors(device), least=least))
    chunk = -(-chunk // step) * step
    return -(-length // chunk), chunk


def rank_for(rank: int) -> tuple[int, int]:
    """How a rank is tiled: the width of a tile, a power of two from 16 to 64, and the number of tiles."""
    width = min(max(LEAST_RANK, 1 << (rank - 1).bit_length()), MOST_RANK)
    return width, -(-rank // width)


def is_aligned(*matrices: torch.Tensor) -> bool:
    """Whether Triton will find every width, stride and address to be a multiple of 16, and so vectorise loads."""
    bits = 0
    for matrix in matrices:
        bits |= matrix.shape[1] | matrix.stride(0) | matrix.data_ptr()
    return bits % 16 == 0


def signed32(word: int) -> int:
    """The low 32 bits of an integer as a signed one: Triton's type of an argument must not depend on its value."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def build_platform() -> str:
    """`cuda` or `hip`: what this torch was built for."""
    return "cuda" if torch.version.hip is None else "hip"


@functools.lru_cache(maxsize=64)
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """What configurations depend on: the capability of an NVIDIA chip, `None` on AMD; in the interpreter any serves."""
    if build_platform() == "hip":
        return None
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def processors(device: torch.device) -> int:
    """Multiprocessors of a device. In the interpreter any number serves: 4 lets small tests reach the split path."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def precision(dtype: torch.dtype, platform: str) -> str:
    """What `tl.dot` is told: float32 accuracy takes three tf32 products on CUDA; HIP multiplies float32 natively."""
    return "tf32x3" if dtype == torch.float32 and platform == "cuda" else "ieee"
