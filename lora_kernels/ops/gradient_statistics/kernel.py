"""The launches of the gradient statistics: `_reduce.product_kernel`, and `column_sums` of squares.

The sum of squares is a pass of its own: reduced in the loop of the product it serialises the tensor-core pipeline
(ptxas C7515).
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.ops import _tiles
from lora_kernels.ops._library import add_product, adds
from lora_kernels.ops._reduce import add_weighted_product, column_sums
from lora_kernels.ops._rows import Selection, selection, single
from lora_kernels.ops._tiles import TileConfig, capability_of, is_aligned

# AMD: shorter steps where weights or addresses would take the last registers.
AMD_WEIGHTED = TileConfig(128, 128, 32, 8, 2)
AMD_RAGGED_SINGLE = TileConfig(64, 64, 16, 4, 2)

# The side and the number of elements from which a matrix has enough tiles of a size.
_SQUARE_FROM = (512, 1 << 20)
_WIDE_FROM = (1024, 1 << 23)
# Elements from which the library's product is expected to win (a model; `benchmarks.gpu` times both).
_LIBRARY_FROM = 1 << 24


def config_for(
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    weighted: bool = False,
    aligned: bool = True,
    capability: tuple[int, int] | None = (8, 0),
) -> TileConfig:
    """The configuration for G `(height, width)`; `aligned` if loads can be vectorised, no `capability` on AMD."""

    def reaches(least: tuple[int, int]) -> bool:
        return min(height, width) >= least[0] and height * width >= least[1]

    large = aligned and dtype != torch.float32 and reaches(_SQUARE_FROM)
    if capability is None:
        small = _tiles.AMD_SMALL if aligned or dtype != torch.float32 else AMD_RAGGED_SINGLE
        return small if not large else AMD_WEIGHTED if weighted else _tiles.AMD_SQUARE
    if not aligned:
        return _tiles.RAGGED
    if dtype == torch.float32:
        return _tiles.SINGLE
    if not large:
        return _tiles.SMALL
    if reaches(_WIDE_FROM) and not weighted:  # with weights the wide tile spills registers
        return _tiles.WIDE
    return _tiles.HOPPER_HALF if capability == (9, 0) and not weighted else _tiles.SQUARE


def _fractions(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights as fractions of a power of two, and that power: exact, and without a word to the host."""
    exponent = torch.frexp(weight.abs().amax()).exponent.clamp(-100, 100)
    one = torch.ones((), dtype=torch.float32, device=weight.device)
    return weight * torch.ldexp(one, -exponent), torch.ldexp(one, exponent)


def gradient_statistics(
    gradient: torch.Tensor,
    g: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    config: TileConfig | None = None,
    least_chunk: int = 1024,
) -> None:
    """Launch the kernels on matrices of unit column stride; without `config`, large sums of rows are the library's."""
    height, width = gradient.shape
    tokens = x.shape[0] if index is None else index.shape[0]
    if tokens == 0 or height == 0 or width == 0:
        return
    if g.dtype != x.dtype:
        g, x = g.to(torch.float32), x.to(torch.float32)
    plain = config is None and index is None and weight is None
    if plain and height * width >= _LIBRARY_FROM and adds(x.device, x.dtype):
        add_product(gradient, g.mT, x)
        return
    scale = None
    if weight is not None and x.dtype == torch.float16:  # `w x` may leave its range
        weight, scale = _fractions(weight)
    kind: dict[str, Any] = {"aligned": is_aligned(gradient, g, x), "capability": capability_of(x.device)}
    config = config or config_for(height, width, x.dtype, weighted=weight is not None, **kind)
    add_weighted_product(gradient, g, x, Selection(index, weight), config, least_chunk, scale)


def both(
    gradient: torch.Tensor | None,
    fisher: torch.Tensor | None,
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    fisher_weight: torch.Tensor | None,
) -> None:
    """Launch the kernels of the weight gradient, with which x is given, and of the Fisher diagonal `(m,)`."""
    if gradient is not None and x is not None:
        index, factor = selection(weight)
        gradient_statistics(gradient, g, x, index, single(factor))
    if fisher is not None:
        # The kernel skips rows of weight zero by itself: counting them would stall the device.
        flat = None if fisher_weight is None else single(fisher_weight.reshape(-1))
        column_sums(fisher, g, None, flat, square=True)
