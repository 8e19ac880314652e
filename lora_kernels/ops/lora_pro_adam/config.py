"""Tile sizes, launch shape and precision of the LoRA-Pro Adam kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops._tiles import build_platform, precision


@dataclass(frozen=True)
class ProConfig:
    """Tile sizes and launch shape.

    Attributes:
        rows: rows of a tile; 16 per warp, or warps would repeat each other's work.
        columns: columns of a tile, a multiple of 16.
        warps: warps per program.
        stages: depth of the load pipeline.
        step: ranks per product: more would take more registers than there are.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    step: int = 16


RANKS = (16, 32, 64, 128)  # to which ranks are padded
# Rows and columns that a program takes where there is work enough for all: what it adds to the memory traffic is
# 4 R (1 / rows + 1 / columns) bytes per parameter, of 16.
_ROWS, _COLUMNS = 512, 512


def rank_for(rank: int) -> int:
    """The width that a rank is padded to: a power of two from 16 to 128."""
    return max(RANKS[0], 1 << (rank - 1).bit_length())


def config_for(rank: int, stochastic: bool, aligned: bool = True, platform: str | None = None) -> ProConfig:
    """The configuration of a call.

    Args:
        rank: one of `RANKS`.
        stochastic: whether the moments are bfloat16.
        aligned: whether loads of the moments can be vectorised.
        platform: `cuda` or `hip`; by default what this torch was built for.

    Returns:
        The configuration.
    """
    platform = platform or build_platform()
    return ProConfig(64, 16, 4, 2)


def is_aligned(*moments: torch.Tensor) -> bool:
    """Whether Triton will find every size, stride and address of the moments to be a multiple of 16."""
    numbers = (number for each in moments for number in (each.shape[1], each.stride(0), each.data_ptr()))
    return all(number % 16 == 0 for number in numbers)


def parts_for(tall: int, wide: int, processors: int) -> tuple[int, int]:
    """How many tiles a program takes.

    Args:
        tall: blocks of rows of the matrix.
        wide: steps of columns.
        processors: multiprocessors of the chip, each of which shall have two programs.

    Returns:
        The blocks and the steps of a program, at most as many as fill `_ROWS` and `_COLUMNS`.
    """
    blocks, steps = min(tall, 8), min(wide, 32)
    while -(-tall // blocks) * -(-wide // steps) < 2 * processors and (blocks > 1 or steps > 4):
        if blocks > 1 and blocks * 4 >= steps:
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
