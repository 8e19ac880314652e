"""The launches of the covariance op: `_reduce.product_kernel` on the lower triangle, and `column_sums`."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.ops import _tiles
from lora_kernels.ops._library import add_product, adds
from lora_kernels.ops._reduce import add_weighted_product, column_sums
from lora_kernels.ops._rows import ALL, Selection
from lora_kernels.ops._tiles import TileConfig, capability_of, is_aligned

# Hopper, see HOPPER_HALF. This one serialises only where tokens are split, which matrices of its size do not need.
HOPPER_SQUARE = TileConfig(128, 128, 128, 8, 2)

_SQUARE_FROM, _HOPPER_SQUARE_FROM, _WIDE_FROM = 1024, 3072, 8192
# Features from which the library's product by blocks of rows is expected to win (a model; `benchmarks.gpu` times both).
_LIBRARY_FROM, _LIBRARY_ROWS = 4096, 1024


def config_for(
    features: int,
    dtype: torch.dtype,
    *,
    weighted: bool = False,
    aligned: bool = True,
    capability: tuple[int, int] | None = (8, 0),
) -> TileConfig:
    """The configuration for x `(rows, features)`; `aligned` if loads can be vectorised, no `capability` on AMD."""
    large = aligned and dtype != torch.float32 and features >= _SQUARE_FROM
    if capability is None:
        return _tiles.AMD_SQUARE if large else _tiles.AMD_SMALL
    if not aligned:
        return _tiles.RAGGED
    if dtype == torch.float32:
        return _tiles.SINGLE
    if not large:
        return _tiles.SMALL
    if features >= _WIDE_FROM and not weighted:  # with weights the wide tile spills registers under Triton 3.6
        return _tiles.WIDE
    if capability != (9, 0):
        return _tiles.SQUARE
    return HOPPER_SQUARE if features >= _HOPPER_SQUARE_FROM else _tiles.HOPPER_HALF


def covariance(
    out: torch.Tensor,
    x: torch.Tensor,
    selected: Selection = ALL,
    column_sum: torch.Tensor | None = None,
    config: TileConfig | None = None,
    least_chunk: int = 1024,
) -> None:
    """Launch the kernels on matrices of unit column stride; without `config`, large sums of rows are the library's."""
    features, tokens = x.shape[1], selected.count(x)
    if tokens == 0 or features == 0:
        return
    selected = selected.to(torch.float32)
    if column_sum is not None:
        column_sums(column_sum, x, *selected)
    plain = config is None and selected.rows is None and selected.weight is None
    if plain and features >= _LIBRARY_FROM and adds(x.device, x.dtype):
        for low in range(0, features, _LIBRARY_ROWS):
            high = min(low + _LIBRARY_ROWS, features)
            add_product(out[low:high, :high], x[:, low:high].mT, x[:, :high])
        return
    kind: dict[str, Any] = {"aligned": is_aligned(out, x), "capability": capability_of(x.device)}
    config = config or config_for(features, x.dtype, weighted=selected.weight is not None, **kind)
    add_weighted_product(out, None, x, selected, config, least_chunk)
