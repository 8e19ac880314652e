"""Tile sizes and launch shapes of the sketch kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_kernels.ops._tiles import build_platform, precision


class Omega(NamedTuple):
    """Which random matrix."""

    kind: str
    seed: int
    stream: int


@dataclass(frozen=True)
class SketchConfig:
    """Tile sizes and launch shape of one of the two products."""

    tokens: int  # per tile (`shrink_kernel`) or per step (`tall_kernel`)
    features: int  # per step (`shrink_kernel`) or per tile (`tall_kernel`)
    warps: int
    stages: int  # depth of the load pipeline

    def constants(self, rank: int, dtype: torch.dtype, platform: str) -> dict[str, Any]:
        """Those of a kernel on these tiles, `rank` columns of Omega wide."""
        sizes = {"TOKENS": self.tokens, "FEATURES": self.features, "RANK": rank}
        return {**sizes, "PRECISION": precision(dtype, platform)}


SHRINK = SketchConfig(64, 64, 4, 4)
SHRINK_SINGLE = SketchConfig(64, 16, 8, 2)  # float32: longer steps, more of them, or fewer warps, spill registers
SHRINK_RAGGED = SketchConfig(64, 32, 4, 3)  # not aligned: every element's address takes registers
SHRINK_AMD = SketchConfig(64, 32, 8, 2)
TALL = SketchConfig(64, 128, 8, 4)
TALL_SINGLE = SketchConfig(32, 128, 8, 3)  # float16 and float32; with 4 warps sm_100 spills registers
TALL_RAGGED = SketchConfig(32, 64, 4, 3)
TALL_AMD = SketchConfig(32, 64, 4, 2)

ROWS = 16  # of the elementwise kernels


def config_for(product: str, dtype: torch.dtype, *, aligned: bool = True, platform: str | None = None) -> SketchConfig:
    """The configuration of `shrink` or `tall`; `aligned` if loads can be vectorised."""
    shrink = product == "shrink"
    if (platform or build_platform()) == "hip":
        return SHRINK_AMD if shrink else TALL_AMD
    if shrink and dtype == torch.float32:
        return SHRINK_SINGLE
    if not aligned:
        return SHRINK_RAGGED if shrink else TALL_RAGGED
    if shrink:
        return SHRINK
    return TALL if dtype == torch.bfloat16 else TALL_SINGLE


def token_chunk(tokens: int, row_bytes: int, cache: int) -> int:
    """How many tokens, in whole tiles, go through both kernels at a time: half the cache holds their rows."""
    parts = -(-tokens * row_bytes // max(cache // 2, 2**24))
    return max(-(-tokens // (max(parts, 1) * 64)) * 64, 64)
