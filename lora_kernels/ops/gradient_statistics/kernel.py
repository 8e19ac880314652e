"""The launches of the gradient statistics, and the kernel of the scaling.

    G[i, j] += sum_t  g[t, i] * w[t] * x[t, j]                     `_reduce.product_kernel`
    f[i]    += sum_t  v[t] * g[t, i]^2                             `_reduce.column_sums`
    S[i, j]  = scale * G[i, j] / (f[i] + damping)^power            scale_rows_kernel

The sum of squares is a pass of its own: reduced in the loop of the product it serialises the tensor-core pipeline
(ptxas C7515).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._library import add_product, adds
from lora_kernels.ops._reduce import add_weighted_product, column_sums
from lora_kernels.ops._rows import Selection, selection, single
from lora_kernels.ops._tiles import TileConfig, capability_of, is_aligned

WIDE = TileConfig(128, 256, 64, 8, 3)
SQUARE = TileConfig(128, 128, 64, 8, 3)  # also with weights: the wide tile then spills registers
# Hopper: Triton 3.6 serialises the matrix instructions of the square tile without weights (ptxas C7515).
HOPPER_HALF = TileConfig(64, 128, 64, 4, 4)
SMALL = TileConfig(64, 64, 64, 4, 4)
SINGLE = TileConfig(64, 64, 32, 4, 3)  # float32
RAGGED = TileConfig(64, 64, 32, 8, 3)  # not aligned: every element's address takes registers
# AMD: 64 KB of local memory hold two stages; shorter steps where weights or addresses would take the last registers.
AMD_SQUARE = TileConfig(128, 128, 64, 8, 2)
AMD_WEIGHTED = TileConfig(128, 128, 32, 8, 2)
AMD_SMALL = TileConfig(64, 64, 32, 4, 2)
AMD_RAGGED_SINGLE = TileConfig(64, 64, 16, 4, 2)

# The side and the number of elements from which a matrix has enough tiles of a size.
_SQUARE_FROM = (512, 1 << 20)
_WIDE_FROM = (1024, 1 << 23)
# Elements from which the library's product is expected to win (a model; `benchmarks.gpu` times both).
_LIBRARY_FROM = 1 << 24
_SCALE_ROWS, _SCALE_COLUMNS, _SCALE_STEPS = 8, 512, 16


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
        small = AMD_SMALL if aligned or dtype != torch.float32 else AMD_RAGGED_SINGLE
        return small if not large else AMD_WEIGHTED if weighted else AMD_SQUARE
    if dtype == torch.float32:
        return SINGLE
    if not aligned:
        return RAGGED
    if not large:
        return SMALL
    if reaches(_WIDE_FROM) and not weighted:
        return WIDE
    return HOPPER_HALF if capability == (9, 0) and not weighted else SQUARE


@triton.jit
def scale_rows_kernel(
    out_ptr,  # (m, n) float32
    gradient_ptr,  # (m, n) float32; may be `out`
    fisher_ptr,  # (m,) float32
    height,
    width,
    out_stride,
    gradient_stride,
    scale,
    damping,
    power,
    power_rest,  # what float32 leaves of the power
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Divide a block of rows, `STEPS` tiles of it, by a power of their damped Fisher: KIND 1, 2 (square root), 0."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    fisher = tl.load(fisher_ptr + rows, mask=rows < height, other=1.0) + damping
    if KIND == 1:
        factor = scale / fisher
    elif KIND == 2:
        factor = scale / tl.sqrt_rn(fisher)
    else:
        # In float64: an error in the exponent is multiplied by the logarithm.
        exponent = tl.cast(power, tl.float64) + tl.cast(power_rest, tl.float64)
        factor = (scale * tl.exp2(-exponent * tl.log2(fisher.to(tl.float64)))).to(tl.float32)
    first = tl.program_id(1) * (STEPS * COLUMNS)
    for start in range(first, tl.minimum(first + STEPS * COLUMNS, width), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = (rows[:, None] < height) & (columns[None, :] < width)
        place = rows[:, None].to(tl.int64)
        values = tl.load(gradient_ptr + place * gradient_stride + columns[None, :], mask=mask, other=0.0)
        tl.store(out_ptr + place * out_stride + columns[None, :], values * factor[:, None], mask=mask)


def _needs_scale(dtype: torch.dtype) -> bool:
    """Whether `w x` may leave the range of the dtype: weights then enter as fractions of their largest."""
    return dtype == torch.float16


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
    if weight is not None and _needs_scale(x.dtype):
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


def scale_rows(
    out: torch.Tensor, gradient: torch.Tensor, fisher: torch.Tensor, scale: float, damping: float, power: float
) -> None:
    """Launch the kernel of the Fisher scaling; `out` has unit column stride, and may be the gradient."""
    height, width = out.shape
    if height == 0 or width == 0:
        return
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    rounded = float(torch.tensor(power, dtype=torch.float32))
    strides, exponent = (out.stride(0), gradient.stride(0)), (rounded, float(power) - rounded)
    kind = {1.0: 1, 0.5: 2}.get(float(power), 0)
    launch(
        scale_rows_kernel, (-(-height // _SCALE_ROWS), -(-width // (_SCALE_COLUMNS * _SCALE_STEPS)), 1),
        (out, gradient, fisher.contiguous()), (height, width, *strides, float(scale), float(damping), *exponent),
        constants_of(ROWS=_SCALE_ROWS, COLUMNS=_SCALE_COLUMNS, STEPS=_SCALE_STEPS, KIND=kind),
    )  # fmt: skip
