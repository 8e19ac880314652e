"""Tile sizes and launch shapes of the fused product; importable without Triton, since tuned tables name them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops import _tiles


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes and launch shape."""

    tokens: int  # rows of a tile of the result
    columns: int  # its columns; a multiple of 8
    step: int  # how much of the inner size a step of the loop takes
    rank: int  # how much of the rank a step takes
    warps: int
    stages: int  # depth of the load pipeline

    @property
    def name(self) -> str:
        """How tuned tables call it."""
        return f"{self.tokens}x{self.columns}x{self.step}-r{self.rank}-w{self.warps}-s{self.stages}"

    def quarters(self, masked: bool) -> bool:
        """Whether the low-rank term comes by quarters of a tile: masked, a whole one would spill registers."""
        return masked and self.columns > 128


# A step of the rank is padded: 32 costs a tile 16 / inner more than the 16 of most adapters, and serves all of them.
WIDE = GemmConfig(128, 256, 64, 32, 8, 3)
SQUARE = GemmConfig(128, 128, 64, 32, 8, 4)
# 99 KB of shared memory per program (8.6, 8.9, 12.0) hold three stages of it.
SQUARE_SHALLOW = GemmConfig(128, 128, 64, 32, 8, 3)
SMALL = GemmConfig(64, 64, 64, 32, 4, 4)
SINGLE = GemmConfig(64, 64, 32, 16, 4, 3)  # float32
RAGGED = GemmConfig(64, 64, 32, 16, 8, 3)  # not aligned: every element's address takes registers
AMD_SQUARE = GemmConfig(128, 128, 64, 32, 8, 2)  # 64 KB of local memory hold two stages
AMD_SMALL = GemmConfig(64, 64, 32, 16, 4, 2)
CONFIGS = {
    config.name: config for config in (WIDE, SQUARE, SQUARE_SHALLOW, SMALL, SINGLE, RAGGED, AMD_SQUARE, AMD_SMALL)
}

# Fewer tiles than a large chip has multiprocessors (an H100's 132) leave it idle.
_PROCESSORS = 132


def candidates(
    dtype: torch.dtype, *, aligned: bool = True, capability: tuple[int, int] | None = (8, 0)
) -> tuple[GemmConfig, ...]:
    """The configurations worth a measurement, largest tiles first; `aligned` if loads can be vectorised."""
    if capability is None:
        return (AMD_SQUARE, AMD_SMALL) if aligned and dtype != torch.float32 else (AMD_SMALL,)
    if not aligned:
        return (RAGGED,)
    if dtype == torch.float32:
        return (SINGLE,)
    if capability in ((9, 0), (10, 0), (10, 3)):
        return (WIDE, SQUARE, SMALL)
    if capability == (8, 0):  # the wide tile spills registers
        return (SQUARE, SMALL)
    return (SQUARE_SHALLOW, SMALL)


def config_for(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    aligned: bool = True,
    capability: tuple[int, int] | None = (8, 0),
) -> GemmConfig:
    """The largest tile of `candidates` that gives every processor one, for (tokens, inner size, columns)."""
    tokens, _, columns = shape
    configs = candidates(dtype, aligned=aligned, capability=capability)
    for config in configs:
        if -(-tokens // config.tokens) * -(-columns // config.columns) >= _PROCESSORS:
            return config
    return configs[-1]


def is_aligned(*matrices: torch.Tensor) -> bool:
    """Whether Triton vectorises loads of matrices of which one stride is 1; see `_tiles.is_aligned`."""
    return _tiles.is_aligned(*(matrix if matrix.stride(1) == 1 else matrix.mT for matrix in matrices))
