"""Tile sizes and launch shapes of the skinny products."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops._tiles import build_platform


@dataclass(frozen=True)
class SkinnyConfig:
    """Tile sizes and launch shape.

    Attributes:
        tokens: tokens per tile, or per step (`reduce_kernel`).
        columns: columns of the wide operand per tile, or per step (`shrink_kernel`); a multiple of 8.
        warps: warps per program.
        stages: depth of the load pipeline.
    """

    tokens: int
    columns: int
    warps: int
    stages: int


LEAST_RANK, MOST_RANK = 16, 64

# (product, 32-bit numbers, platform): one table until a measurement says otherwise.
_CONFIGS = {
    ("shrink", False, "cuda"): SkinnyConfig(64, 64, 4, 4),
    ("shrink", True, "cuda"): SkinnyConfig(64, 32, 8, 3),
    ("shrink", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("shrink", True, "hip"): SkinnyConfig(64, 32, 8, 2),
    ("reduce", False, "cuda"): SkinnyConfig(64, 128, 4, 4),
    ("reduce", True, "cuda"): SkinnyConfig(32, 128, 8, 3),
    ("reduce", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("reduce", True, "hip"): SkinnyConfig(32, 64, 4, 2),
    ("expand", False, "cuda"): SkinnyConfig(64, 128, 4, 2),
    ("expand", True, "cuda"): SkinnyConfig(64, 64, 8, 2),
    ("expand", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("expand", True, "hip"): SkinnyConfig(64, 64, 8, 2),
}


def config_for(product: str, dtype: torch.dtype, platform: str | None = None) -> SkinnyConfig:
    """The configuration of a product.

    Args:
        product: `shrink`, `reduce` or `expand`.
        dtype: of the operands.
        platform: `cuda` or `hip`; by default what this torch was built for.

    Returns:
        The configuration.
    """
    return _CONFIGS[product, dtype == torch.float32, platform or build_platform()]


def rank_for(rank: int) -> tuple[int, int]:
    """How a rank is tiled: the width of a tile, a power of two from 16 to 64, and the number of tiles."""
    width = min(max(LEAST_RANK, 1 << (rank - 1).bit_length()), MOST_RANK)
    return width, -(-rank // width)
