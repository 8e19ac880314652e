"""The numbers of a LoRA-Pro Adam step; tile sizes, launch shape and precision of its kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_kernels.ops._tiles import build_platform, precision


@dataclass(frozen=True)
class ProConfig:
    """Tile sizes and launch shape."""

    rows: int  # of a tile; at best 16 per warp, or warps repeat work
    columns: int  # of a tile, a multiple of 16
    warps: int
    stages: int  # depth of the load pipeline
    step: int = 16  # ranks per product: more would take more registers than there are


@dataclass(frozen=True)
class Adam:
    """The numbers of a step."""

    scaling: float  # s
    beta1: float
    beta2: float
    eps: float  # added to the root of the second moment
    step: int  # counted from 1
    row_offset: int  # the number of the first row, for the random bits
    row_step: int  # from one matrix of a batch to the next

    @property
    def avg_factor(self) -> float:
        """One over the bias of the first moment."""
        return 1 / (1 - self.beta1**self.step)

    @property
    def root_factor(self) -> float:
        """One over the bias of the root of the second moment."""
        return 1 / math.sqrt(1 - self.beta2**self.step)


RANKS = (16, 32, 64, 128)  # to which ranks are padded
# Blocks of rows and steps of columns that a program takes where there is work enough for all. With 512 rows and 1024
# columns slabs add 4 R (1 / 512 + 1 / 1024) bytes per parameter to the memory traffic, which is 16 without them.
_MOST_BLOCKS, _MOST_STEPS, _LEAST_STEPS = 8, 32, 4
# Where loads of bfloat16 moments cannot be vectorised: what spills on no NVIDIA chip (rounding takes registers, too).
_RAGGED_BFLOAT16 = {
    16: ProConfig(32, 16, 4, 1),
    32: ProConfig(64, 16, 4, 1),
    64: ProConfig(32, 16, 4, 2),
    128: ProConfig(32, 16, 8, 1),
}


def rank_for(rank: int) -> int:
    """The width that a rank is padded to: a power of two from 16 to 128."""
    return max(RANKS[0], 1 << (rank - 1).bit_length())


def config_for(rank: int, stochastic: bool, aligned: bool = True, platform: str | None = None) -> ProConfig:
    """The configuration for one of `RANKS`; `stochastic`: moments are bfloat16, `aligned`: loads can be vectorised."""
    platform = platform or build_platform()
    if not aligned and platform == "cuda":
        # Every element's address takes registers.
        return _RAGGED_BFLOAT16[rank] if stochastic else ProConfig(32, 16, 4, 2)
    warps = 8 if rank > 64 else 4
    if platform == "hip":  # a second stage takes more scalar registers than there are
        return ProConfig(64, 16, warps, 1 if rank <= 64 or not aligned else 2)
    return ProConfig(64, 32, warps, 2 if rank <= 32 else 1)


def parts_for(tall: int, wide: int, processors: int) -> tuple[int, int]:
    """The blocks of rows and steps of columns of a program that give every multiprocessor one and a half."""
    blocks, steps = min(tall, _MOST_BLOCKS), min(wide, _MOST_STEPS)
    while -(-tall // blocks) * -(-wide // steps) * 2 < 3 * processors and (blocks > 1 or steps > _LEAST_STEPS):
        if blocks > 1 and blocks * _LEAST_STEPS >= steps:
            blocks = -(-blocks // 2)
        else:
            steps = -(-steps // 2)
    return blocks, steps


def precisions(platform: str) -> tuple[str, ...]:
    """What `tl.dot` may be told: float32's accuracy, and where there is such a thing a faster product."""
    return (precision(torch.float32, platform), *(("tf32",) if platform == "cuda" else ()))


def precision_for(platform: str) -> str:
    """What `tl.dot` is told: tf32 only where the user allows it."""
    matmul = torch.backends.cuda.matmul
    # The older name raises where the newer one (torch 2.9) was set.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return precisions(platform)[-1 if allowed else 0]
