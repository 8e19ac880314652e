"""Triton kernels of the LoRA-Pro Adam op.

    E = s (B dA + dB A) = [s B | s dB] [dA ; A]          one product: left (m, 2 R), right (2 R, n)
    M <- beta1 M + (1 - beta1) E                         V <- beta2 V + (1 - beta2) E^2
    H = avg_factor M / (root_factor sqrt(V) + eps)
    s B^T H, s H A^T                                     join_kernel, adam_kernel, then sum_slabs_kernel

A launch is for a batch of layers, whose moments it finds by a table of addresses. A program walks over a block of rows,
tile by tile, and over the next one. A tile of E is formed, the moments are updated, and the tile of H is contracted at
once: into H A^T in registers, and into the program's own slab of B^T H, which stays in the second-level cache. Slabs
are added in fixed order: same input, same bits. Ranks are padded with zeros.

Where tensor cores multiply tf32, float32's accuracy takes three products of numbers split in two, `high + low`. Factors
are split once, before the launch: by Triton, for every tile, it would be half of all instructions.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lora_kernels.ops._launching import constants_of, launch
from lora_kernels.ops._tiles import MOST_PROGRAMS, build_platform, int64_on, processors, signed32
from lora_kernels.ops._tl import INTERPRETED, dot, half_tile, load_key
from lora_kernels.ops.lora_pro_adam.config import Adam, ProConfig, config_for, parts_for, precision_for, rank_for

_PART = 1024  # elements per program of `join_kernel` and `sum_slabs_kernel`
_MOST_BYTES = 2**29  # of the temporaries of one launch, which is for as many layers as that allows


@triton.jit
def find_moment(table_ptr, layer, layers, STOCHASTIC: tl.constexpr):
    """A layer's moment and the stride of its rows, from two rows of the table."""
    address, stride = tl.load(table_ptr + layer), tl.load(table_ptr + layers + layer)
    return address.to(tl.pointer_type(tl.int16 if STOCHASTIC else tl.float32)), stride.to(tl.int32)


@triton.jit
def load_moment(pointers, mask, STOCHASTIC: tl.constexpr):
    """A tile of a moment in float32; bfloat16 comes as its bits."""
    values = tl.load(pointers, mask=mask, other=0)
    if STOCHASTIC:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def round_moment(values, random):
    """The bits of bfloat16, rounded up with the probability of what is cut off; a NaN stays one."""
    bits = values.to(tl.uint32, bitcast=True) + random
    bits = tl.where(values == values, bits >> 16, 0x7FC0)
    return bits.to(tl.int16)


@triton.jit
def split(values):
    """Float32 as the nearest number of tf32 and what that leaves. A NaN stays one, in the second."""
    high = ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, values - high


@triton.jit(do_not_specialize=["rows", "rank", "height"])
def join_kernel(
    left_ptr,  # (layers, height, parts, 2 * RANK) float32: [sB | s dB]
    right_ptr,  # (layers, parts, 2 * RANK, width) float32: [dA ; A]
    a_ptr,  # (layers, rank, columns) float32, as its gradient
    grad_a_ptr,
    b_ptr,  # (layers, rows, rank) float32, as its gradient
    grad_b_ptr,
    rows,
    columns,
    height,
    width,
    rank,
    scaling,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
):
    """Factors side by side, in parts, and padded with zeros, so that no load of them needs a mask."""
    layer = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * PART + tl.arange(0, PART)
    PITCH: tl.constexpr = 4 * RANK if SPLIT else 2 * RANK
    if tl.program_id(2) == 0:
        row, inner = place // (2 * RANK), place % (2 * RANK)
        at, mask = (layer * rows + row) * rank + inner % RANK, (row < rows) & (inner % RANK < rank)
        values = tl.load(b_ptr + at, mask=mask & (inner < RANK), other=0.0)
        values += tl.load(grad_b_ptr + at, mask=mask & (inner >= RANK), other=0.0)
        values *= scaling
        to, apart, inside = left_ptr + (layer * height + row) * PITCH + inner, 2 * RANK, row < height
    else:
        inner, column = place // width, place % width
        at, mask = (layer * rank + inner % RANK) * columns + column, (inner % RANK < rank) & (column < columns)
        values = tl.load(grad_a_ptr + at, mask=mask & (inner < RANK), other=0.0)
        values += tl.load(a_ptr + at, mask=mask & (inner >= RANK) & (inner < 2 * RANK), other=0.0)
        to, apart, inside = right_ptr + layer * width * PITCH + place, 2 * RANK * width, inner < 2 * RANK
    if SPLIT:
        values, low = split(values)
        tl.store(to + apart, low, mask=inside)
    tl.store(to, values, mask=inside)


@triton.jit
def load_parts(pointers, apart, SPLIT: tl.constexpr):
    """Both parts of a tile of a factor; without SPLIT, itself and a stand-in."""
    high = tl.load(pointers)
    return high, tl.load(pointers + apart) if SPLIT else high


@triton.jit
def product(a, a_low, b, b_low, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`a @ b` of matrices in parts, small terms first."""
    acc = tl.zeros((a.shape[0], b.shape[1]), dtype=tl.float32)
    if PRECISION == "tf32x3":
        acc = dot(a, b_low, dot(a_low, b, acc, "tf32", UPCAST), "tf32", UPCAST)
        return dot(a, b, acc, "tf32", UPCAST)
    return dot(a, b, acc, PRECISION, UPCAST)


@triton.jit(do_not_specialize=["rows", "blocks", "steps", "layers", "seed_step", "step"])
def adam_kernel(
    table_ptr,  # (5, layers) int64: addresses and strides of first moments, of second ones, and numbers of first rows
    left_ptr,  # as of `join_kernel`; the height is that of whole blocks, the width that of whole steps
    right_ptr,
    bt_ptr,  # (layers, row parts, RANK, width) float32
    ha_ptr,  # (layers, column parts, height, RANK) float32
    seed_ptr,  # (1,) or (layers,) int64, if STOCHASTIC
    rows,
    columns,
    blocks,
    steps,
    layers,
    seed_step,
    scaling,
    beta1,
    rest1,
    beta2,
    rest2,
    avg_factor,
    root_factor,
    eps,
    step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tiles of `blocks` blocks of rows and `steps` steps of columns of a layer, whose moments lie anywhere.

    They are float32, or bfloat16 if STOCHASTIC, with contiguous rows.
    """
    lane, inner = tl.arange(0, RANK), tl.arange(0, 2 * STEP)
    SPLIT: tl.constexpr = PRECISION == "tf32x3"
    PITCH: tl.constexpr = 4 * RANK if SPLIT else 2 * RANK  # of a row of the left factors
    height, width = tl.cdiv(rows, ROWS) * ROWS, tl.cdiv(columns, COLUMNS) * COLUMNS
    layer = tl.program_id(2).to(tl.int64)
    avg_ptr, avg_stride = find_moment(table_ptr, layer, layers, STOCHASTIC)
    square_ptr, square_stride = find_moment(table_ptr + 2 * layers, layer, layers, STOCHASTIC)
    left_ptr += layer * height * PITCH
    right_ptr += layer * width * PITCH
    first = tl.program_id(0) * (steps * COLUMNS)
    last = tl.minimum(first + steps * COLUMNS, columns)
    top = tl.program_id(1) * blocks
    bottom = tl.minimum(top + blocks, tl.cdiv(rows, ROWS))
    ha_slab = ha_ptr + (layer * tl.num_programs(0) + tl.program_id(0)) * height * RANK
    bt_slab = bt_ptr + (layer * tl.num_programs(1) + tl.program_id(1)) * (RANK * width)
    if STOCHASTIC:
        key0, key1 = load_key(seed_ptr + layer * seed_step)
        first_row = tl.load(table_ptr + 4 * layers + layer).to(tl.int32)
    for block in range(top, bottom):
        row = block * ROWS + tl.arange(0, ROWS)
        wide = row.to(tl.int64)
        left_at = left_ptr + wide * PITCH
        ha = tl.zeros((ROWS, RANK), dtype=tl.float32)
        if RANK == STEP:  # small enough to stay
            left, left_low = load_parts(left_at[:, None] + inner[None, :], 2 * RANK, SPLIT)
        for start in range(first, last, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            right_at = right_ptr + column
            e = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for rank in range(0, 2 * RANK, 2 * STEP):
                if RANK > STEP:
                    left, left_low = load_parts(left_at[:, None] + (rank + inner)[None, :], 2 * RANK, SPLIT)
                right_tile = right_at[None, :] + (rank + inner)[:, None] * width
                right, right_low = load_parts(right_tile, 2 * RANK * width, SPLIT)
                e += product(left, left_low, right, right_low, PRECISION, UPCAST)
            mask = (row[:, None] < rows) & (column[None, :] < columns)
            avg_at = avg_ptr + wide[:, None] * avg_stride + column[None, :]
            square_at = square_ptr + wide[:, None] * square_stride + column[None, :]
            if ALIGNED:
                avg_at, square_at = tl.multiple_of(avg_at, (1, 16)), tl.multiple_of(square_at, (1, 16))
            m = load_moment(avg_at, mask, STOCHASTIC) * beta1 + e * rest1
            v = load_moment(square_at, mask, STOCHASTIC) * beta2 + e * e * rest2
            if STOCHASTIC:
                group = start // 8 + tl.arange(0, COLUMNS // 8)
                number = row + first_row
                random = half_tile(number, group, key0, key1, 0, step, ROWS, COLUMNS // 8)
                tl.store(avg_at, round_moment(m, random), mask=mask)
                random = half_tile(number, group, key0, key1, 1, step, ROWS, COLUMNS // 8)
                tl.store(square_at, round_moment(v, random), mask=mask)
            else:
                tl.store(avg_at, m, mask=mask)
                tl.store(square_at, v, mask=mask)
            h = m * avg_factor / (tl.sqrt(v) * root_factor + eps)
            h_low = h
            if SPLIT:
                h, h_low = split(h)
            for rank in range(0, RANK, STEP):
                of_b = rank + tl.arange(0, STEP)
                b_t, b_low = load_parts(left_at[None, :] + of_b[:, None], 2 * RANK, SPLIT)
                bt = product(b_t, b_low, h, h_low, PRECISION, UPCAST)
                bt_at = bt_slab + of_b[:, None] * width + column[None, :]
                bt += tl.load(bt_at, mask=(of_b[:, None] >= 0) & (block > top), other=0.0)
                tl.store(bt_at, bt)
            a_t, a_low = load_parts(right_at[:, None] + (RANK + lane)[None, :] * width, 2 * RANK * width, SPLIT)
            ha += product(h, h_low, a_t, a_low, PRECISION, UPCAST)
        tl.store(ha_slab + wide[:, None] * RANK + lane[None, :], ha * scaling)
        # What one thread has added to the slab another may read in the next round.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["width", "slabs"])
def sum_slabs_kernel(
    out_ptr,  # (layers, size / width, width) float32
    slab_ptr,  # (layers, slabs, slab_size): rows of slab_stride
    size,
    width,
    slabs,
    slab_stride,
    slab_size,
    PART: tl.constexpr,
):
    """Add the slabs of a layer, in order, without what pads them."""
    layer = tl.program_id(1).to(tl.int64)
    out_ptr += layer * size
    slab_ptr += layer * slabs * slab_size
    place = tl.program_id(0) * PART + tl.arange(0, PART)
    at = slab_ptr + (place // width).to(tl.int64) * slab_stride + place % width
    acc = tl.zeros((PART,), dtype=tl.float32)
    for slab in range(0, slabs):
        acc += tl.load(at + tl.cast(slab, tl.int64) * slab_size, mask=place < size, other=0.0)
    tl.store(out_ptr + place, acc, mask=place < size)


def _sum_slabs(out: torch.Tensor, slabs: torch.Tensor) -> None:
    (layers, height, width), (_, count, rows, stride) = out.shape, slabs.shape
    size = height * width
    numbers = size, width, count, stride, rows * stride
    launch(sum_slabs_kernel, (-(-size // _PART), layers, 1), (out, slabs), numbers, constants_of(PART=_PART))


def adam_pairs(
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    numbers: Adam,
    seeds: torch.Tensor | None,
    bt_h: torch.Tensor,
    h_at: torch.Tensor,
    config: ProConfig | None = None,
    parts: tuple[int, int] | None = None,
) -> None:
    """Launch the kernels on pairs of moments `(k, m, n)` with unit column stride, L matrices in all, anywhere.

    a, b, grad_a and grad_b are of all L, `seeds` `(1,)` or `(L,)`; no size may be zero. `bt_h` `(L, r, n)` and `h_at`
    `(L, m, r)`, float32 contiguous, are filled. `parts` are the blocks of rows and the steps of columns of a program.
    """
    rows, columns = moments[0][0].shape[1:]
    layers, device, stochastic = len(bt_h), bt_h.device, moments[0][0].dtype == torch.bfloat16
    rank, precision = rank_for(bt_h.shape[1]), precision_for(build_platform())
    table = _table(moments, numbers)
    aligned = functools.reduce(operator.or_, table[: 4 * layers], columns) % 16 == 0
    config = config or config_for(rank, stochastic, aligned)
    tall, wide = -(-rows // config.rows), -(-columns // config.columns)
    blocks, steps = parts or parts_for(tall, wide, -(-processors(device) // layers))
    grid = (-(-wide // steps), -(-tall // blocks))
    height, width = tall * config.rows, wide * config.columns
    pitch = 4 * rank if precision == "tf32x3" else 2 * rank
    layer_bytes = 4 * ((height + width) * pitch + (grid[1] * width + grid[0] * height) * rank)
    calls = -(-layers // min(layers, max(_MOST_BYTES // layer_bytes, 1), MOST_PROGRAMS - 1))
    share = -(-layers // calls)
    constants = constants_of(
        config.warps, config.stages,
        ROWS=config.rows, COLUMNS=config.columns, RANK=rank, STEP=min(rank, config.step), STOCHASTIC=stochastic,
        ALIGNED=aligned, PRECISION=precision, UPCAST=INTERPRETED,
    )  # fmt: skip
    reals = (
        numbers.scaling, numbers.beta1, 1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2,
        numbers.avg_factor, numbers.root_factor, numbers.eps,
    )  # fmt: skip
    free = (*map(float, reals), signed32(numbers.step))
    places = int64_on(device, table).view(5, layers)
    seeds = None if seeds is None else seeds.to(device)
    for first in range(0, layers, share):
        part = slice(first, min(first + share, layers))
        count = part.stop - first
        left, right = bt_h.new_empty(count, height, pitch), bt_h.new_empty(count, width, pitch)
        launch(
            join_kernel, (-(-max(height, width) * 2 * rank // _PART), count, 2),
            (left, right, *(factors[i][part].float().contiguous() for i in (0, 2, 1, 3))),
            (rows, columns, height, width, bt_h.shape[1]),
            constants_of(RANK=rank, SPLIT=precision == "tf32x3", PART=_PART), free[:1],
        )  # fmt: skip
        bt_slabs = bt_h.new_empty(count, grid[1], rank, width)
        ha_slabs = bt_h.new_empty(count, grid[0], height, rank)
        many = seeds is not None and len(seeds) > 1
        # A pointer that a flag switches off must still be one.
        seed = left if seeds is None else seeds[part] if many else seeds
        launch(
            adam_kernel, (*grid, count), (places[:, first:], left, right, bt_slabs, ha_slabs, seed),
            (rows, columns, blocks, steps, layers, int(many)), constants, free,
        )  # fmt: skip
        _sum_slabs(bt_h[part], bt_slabs)
        _sum_slabs(h_at[part], ha_slabs)


def lora_pro_adam(
    moments: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    numbers: Adam,
    seed: torch.Tensor | None,
    bt_h: torch.Tensor,
    h_at: torch.Tensor,
    config: ProConfig | None = None,
    parts: tuple[int, int] | None = None,
) -> None:
    """`adam_pairs` of the layers of one pair of moments."""
    adam_pairs([moments], factors, numbers, seed, bt_h, h_at, config, parts)


def _table(moments: Sequence[tuple[torch.Tensor, torch.Tensor]], numbers: Adam) -> tuple[int, ...]:
    """By row: addresses and strides of all first moments, of all second ones, and the numbers of their first rows."""
    table: list[int] = []
    for states in zip(*moments, strict=True):
        width = states[0].element_size()
        table += [state.data_ptr() + i * state.stride(0) * width for state in states for i in range(len(state))]
        table += [state.stride(1) for state in states for _ in range(len(state))]
    return (*table, *(numbers.row_offset + i * numbers.row_step for state in states for i in range(len(state))))
