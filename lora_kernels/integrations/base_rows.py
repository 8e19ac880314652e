"""The rows of the weight under a LoRA layer, in float32, a few at a time: a quantized one is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_kernels.adapters.base_weight import base_weight, is_quantized
from lora_kernels.landscape.weights import RowBlocks
from lora_kernels.statistics.modes import is_sharded

# Entries that are dequantized or widened at a time (32 MB in float32).
_CHUNK = 2**23
# bitsandbytes' int8 rows are integers times their largest entry over this.
_INT8_LARGEST = 127.0


def row_blocks(module: Any) -> RowBlocks:
    """The rows of W under a LoRA layer.

    Plain weights are cut, bitsandbytes' 4-bit (NF4, FP4) and int8 weights dequantized block by block. Of any other kind
    (sharded, or quantized by another library) the whole weight is made once and held.

    Args:
        module: a PEFT LoRA layer.

    Returns:
        A function that gives blocks of rows `(rows, n)`, in order, each time it is called.
    """
    layer = module.get_base_layer()
    weight = layer.weight
    m, n = module.out_features, module.in_features
    kind = type(weight).__name__
    if kind == "Params4bit" and _sliceable(weight, m, n):
        return lambda: _rows_4bit(weight, m, n)
    if kind == "Int8Params":
        scale = getattr(layer.state, "SCB", None)
        scale = weight.SCB if scale is None else scale
        if scale is not None and weight.shape == (m, n) and weight.dtype == torch.int8:
            return lambda: (
                rows.to(torch.float32) * (largest.to(torch.float32) / _INT8_LARGEST).unsqueeze(-1)
                for rows, largest in zip(_cut(weight.data, n), _cut(scale, n), strict=True)
            )
    if is_quantized(module) or is_sharded(weight):
        whole = base_weight(module)
        return lambda: _cut(whole, n)
    dense = weight.detach()
    # transformers' Conv1D, and others by the same convention, keep W^T.
    if type(layer).__name__ == "Conv1D" or (dense.shape != (m, n) and dense.shape == (n, m)):
        dense = dense.mT
    return lambda: (rows.to(torch.float32) for rows in _cut(dense, n))


def _cut(x: torch.Tensor, columns: int) -> Iterator[torch.Tensor]:
    step = max(1, _CHUNK // max(1, columns))
    return (x[low : low + step] for low in range(0, x.shape[0], step))


def _sliceable(weight: Any, m: int, n: int) -> bool:
    """Whether a 4-bit weight is packed in its own order, two entries to a byte, with every row in blocks of its own.

    (Where a block runs over two rows, bitsandbytes' own kernels for CPUs give other numbers for a part of the rows than
    for all; the weight of the model is what they make of all.)
    """
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False) or n % state.blocksize:
        return False
    return tuple(state.shape) == (m, n) and weight.data.numel() * weight.data.element_size() * 2 == m * n


def _rows_4bit(weight: Any, m: int, n: int) -> Iterator[torch.Tensor]:
    from bitsandbytes import functional  # noqa: PLC0415  (an optional dependency)

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    absmax = absmax.to(torch.float32)
    packed = weight.data.reshape(-1).view(torch.uint8)
    blocks = n // state.blocksize
    step = max(1, _CHUNK // n)
    for low in range(0, m, step):
        high = min(m, low + step)
        part = functional.QuantState(  # type: ignore[no-untyped-call]
            absmax=absmax[low * blocks : high * blocks],
            shape=torch.Size((high - low, n)),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        codes = packed[low * n // 2 : high * n // 2].unsqueeze(-1)
        yield functional.dequantize_4bit(codes, quant_state=part).reshape(high - low, n).to(torch.float32)
