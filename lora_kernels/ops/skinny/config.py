"""Tile sizes and launch shapes of the skinny products."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from lora_kernels.ops import _tiles
from lora_kernels.ops._tiles import LEAST_RANK, MOST_PROGRAMS, MOST_RANK, build_platform, processors, rank_for


@dataclass(frozen=True)
class SkinnyConfig:
    """Tile sizes and launch shape."""

    tokens: int  # per tile, or per step (`reduce_kernel`)
    columns: int  # of the wide operand per tile, or per step (`shrink_kernel`); a multiple of 8
    warps: int
    stages: int  # depth of the load pipeline


# (product, 32-bit numbers, platform): one table until a measurement says otherwise.
_CONFIGS = {
    ("shrink", False, "cuda"): SkinnyConfig(64, 64, 4, 4),
    ("shrink", True, "cuda"): SkinnyConfig(64, 32, 8, 3),
    ("shrink", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("shrink", True, "hip"): SkinnyConfig(64, 32, 8, 2),
    ("reduce", False, "cuda"): SkinnyConfig(64, 128, 4, 4),
    ("reduce", True, "cuda"): SkinnyConfig(32, 64, 8, 3),
    ("reduce", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("reduce", True, "hip"): SkinnyConfig(32, 64, 4, 2),
    ("expand", False, "cuda"): SkinnyConfig(64, 128, 4, 2),
    ("expand", True, "cuda"): SkinnyConfig(64, 64, 8, 2),
    ("expand", False, "hip"): SkinnyConfig(64, 64, 4, 2),
    ("expand", True, "hip"): SkinnyConfig(64, 64, 8, 2),
}
# Not aligned: every element's address takes registers.
_RAGGED = {
    ("shrink", False): SkinnyConfig(64, 32, 8, 2),
    ("shrink", True): SkinnyConfig(64, 16, 4, 3),
    ("reduce", False): SkinnyConfig(32, 64, 8, 2),
    ("reduce", True): SkinnyConfig(32, 64, 8, 2),
    ("expand", False): SkinnyConfig(64, 32, 8, 2),
    ("expand", True): SkinnyConfig(64, 32, 8, 2),
}


# Dropout takes registers: with four warps fewer fit a multiprocessor, and on sm_100 one case spills.
_MASKED_REDUCE = SkinnyConfig(64, 128, 8, 4)
_MASKED_EXPAND = SkinnyConfig(128, 64, 4, 2)  # of 64 ranks: the usual one spills on sm_80


def config_for(
    product: str,
    dtype: torch.dtype,
    aligned: bool = True,
    platform: str | None = None,
    drops: bool = False,
    rank: int = LEAST_RANK,
) -> SkinnyConfig:
    """The configuration of `shrink`, `reduce` or `expand`; `aligned` says whether loads can be vectorised."""
    single, platform = dtype == torch.float32, platform or build_platform()
    if not aligned:
        return _RAGGED[product, single]
    if drops and (product, single, platform) == ("reduce", False, "cuda"):
        return _MASKED_REDUCE
    if drops and (product, single, platform) == ("expand", False, "cuda") and rank_for(rank)[0] == MOST_RANK:
        return _MASKED_EXPAND
    return _CONFIGS[product, single, platform]


# Half the tokens per tile: twice the tiles, where a chip would otherwise be filled by parts of sums, one more launch.
FLAT = SkinnyConfig(32, 64, 4, 4)
# A float32 factor beside a 16-bit operand: with four warps it would spill registers.
_MIXED_SHRINK = SkinnyConfig(64, 64, 8, 4)


@functools.lru_cache(maxsize=1024)
def shrink_config(
    tokens: int, dtype: torch.dtype, aligned: bool, device: torch.device, mixed: bool = False
) -> SkinnyConfig:
    """The configuration of `shrink`: flat tiles where they give every multiprocessor one, without parts of sums.

    `mixed` if the factor alone is float32.
    """
    usual, number = config_for("shrink", dtype, aligned), processors(device)
    if not aligned or dtype == torch.float32 or build_platform() != "cuda":
        return usual
    usual = _MIXED_SHRINK if mixed else usual
    flat = -(-tokens // usual.tokens) < 2 * number and -(-tokens // FLAT.tokens) >= number
    return FLAT if flat else usual


def step_for(rank: int, dtype: torch.dtype) -> int:
    """The ranks that `expand_kernel` takes per step: float32's are split in three, so many would spill registers."""
    return LEAST_RANK if dtype == torch.float32 else rank_for(rank)[0]


def is_aligned(rank: int, t_stride: int, *wide: torch.Tensor) -> bool:
    """Whether loads can be vectorised: ranks and their strides in eights, all else of the wide matrices in sixteens."""
    return rank % 8 == 0 and t_stride % 8 == 0 and _tiles.is_aligned(*wide)


def tall_for(tokens: int, config: SkinnyConfig) -> int:
    """How many tiles of tokens there are: the second axis of a grid, which the hardware limits."""
    tiles = -(-tokens // config.tokens)
    if tiles > MOST_PROGRAMS:
        raise ValueError(f"{tokens} tokens are too many for one launch, at most {MOST_PROGRAMS * config.tokens}")
    return tiles
