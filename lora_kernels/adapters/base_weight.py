"""Reading the weight under a LoRA layer, whole or a few rows at a time, if it can be read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_kernels.runtime.modes import is_sharded

PLAIN, DEQUANTIZABLE = "plain", "dequantizable"

# Entries that are dequantized or widened at a time (32 MB in float32).
_CHUNK = 2**23
# bitsandbytes' int8 rows are integers times their largest entry over this.
_INT8_LARGEST = 127.0
_FLOAT8 = tuple(dtype for name, dtype in vars(torch).items() if name.startswith("float8_"))
# TransformerEngine's layers, which apply the weight to the normalised input and the adapter to the input itself.
_NORMALISING = ("LayerNormLinear", "LayerNormMLP")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter, detached; a sharded one is gathered (all processes must call)."""
    value: Any = parameter.detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    return gathered


def _source(module: Any) -> tuple[str, Callable[[], torch.Tensor] | None]:
    """The `weight_kind` of a LoRA layer, and a function that makes its weight dense, if it can be read."""
    layer = module.get_base_layer()
    name, weight = type(layer).__name__, getattr(layer, "weight", None)
    if name in _NORMALISING:
        how = "applies its weight to the normalised input, and the adapter is applied to the input itself"
        return f"{name} {how}", None
    if hasattr(layer, "W_q") and callable(getattr(layer, "dequantize", None)):
        return DEQUANTIZABLE, layer.dequantize  # HQQ
    if not isinstance(weight, torch.Tensor):
        return f"{name} keeps no weight matrix", None
    if type(weight).__name__ == "Params4bit":
        if (state := getattr(weight, "quant_state", None)) is None:
            return f"{name} is not quantized yet", None
        from bitsandbytes import functional  # noqa: PLC0415  (an optional dependency)

        return DEQUANTIZABLE, lambda: functional.dequantize_4bit(weight.data, state)
    shape = (module.out_features, module.in_features)
    if tuple(weight.shape) not in (shape, shape[::-1]):
        return f"{name} keeps a weight of shape {tuple(weight.shape)}, but the layer's is {shape}", None
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        if (scale := _int8_scale(layer)) is None:
            return f"{name} keeps integers without their scales", None
        return DEQUANTIZABLE, lambda: _int8_rows(weight, scale, slice(None))
    own = getattr(type(weight), "dequantize", None)
    if own is not None and own is not torch.Tensor.dequantize:  # torchao's and quanto's classes have their own
        return DEQUANTIZABLE, weight.dequantize
    if weight.dtype in _FLOAT8:
        if (blocks := _block_scale(layer)) is not None:
            return DEQUANTIZABLE, lambda: whole(weight).to(torch.float32) * _spread(blocks, layer)
        kept = {*layer._parameters, *layer._buffers}
        kept |= {key for key, value in vars(layer).items() if isinstance(value, torch.Tensor)}
        conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
        if type(layer) in (nn.Linear, conv1d) and kept <= {"weight", "bias"}:
            return DEQUANTIZABLE, lambda: whole(weight)  # no scales: only the storage is 8-bit
        return f"{name} keeps {weight.dtype} numbers, whose scales are of an unknown form", None
    if not weight.is_floating_point():
        return f"{name} keeps {weight.dtype} codes of an unknown quantization", None
    registered = (layer._parameters.get("weight"), layer._buffers.get("weight"))
    plain = type(weight) in (nn.Parameter, torch.Tensor) and any(tensor is weight for tensor in registered)
    # A write would not reach what another weight is computed from.
    return PLAIN if plain else DEQUANTIZABLE, lambda: whole(weight)


def weight_kind(module: Any) -> str:
    """Whether the weight under a LoRA layer can be read as the matrix that the base layer multiplies by."""
    # `PLAIN` (a floating tensor that can also be changed in place), `DEQUANTIZABLE` (only a copy: quantized, sharded,
    # or computed from other tensors), or the reason why it cannot be read: codes of an unknown quantization, or 8-bit
    # floats with scales of an unknown form, are not interpreted.
    return _source(module)[0]


def _int8_scale(layer: Any) -> torch.Tensor | None:
    """Largest entries `(m,)` of the rows of bitsandbytes' int8 weights; in the layer's state after its first run."""
    scale: torch.Tensor | None = getattr(getattr(layer, "state", None), "SCB", None)
    return getattr(layer.weight, "SCB", None) if scale is None else scale


def _block_scale(layer: Any) -> torch.Tensor | None:
    """The scales of transformers' `FP8Linear`, one per block of `block_size` entries, or one for all."""
    scale = getattr(layer, "weight_scale_inv", None)
    if type(layer).__name__ != "FP8Linear" or not isinstance(scale, torch.Tensor):
        return None
    if getattr(layer, "block_size", None) is None:
        return scale if scale.numel() == 1 else None
    blocks = tuple(-(-size // block) for size, block in zip(layer.weight.shape, layer.block_size, strict=True))
    return scale if tuple(scale.shape) == blocks else None


def why_unreadable(module: Any) -> str | None:
    """Why the weight under a LoRA layer cannot be read, or `None`."""
    kind, dense = _source(module)
    return kind if dense is None else None


def check_readable(module: Any, name: str = "") -> None:
    """Raise a ValueError with the reason if the base weight of a LoRA layer, called `name`, cannot be read."""
    if (reason := why_unreadable(module)) is not None:
        raise ValueError(f"the base weight of layer {name or type(module).__name__} cannot be read: {reason}")


def dense_weight(module: Any, name: str = "") -> torch.Tensor:
    """The weight `(m, n)` under a LoRA layer, float32 (float64 if the base is); a ValueError if it cannot be read."""
    # A copy if it is quantized, sharded or of another dtype.
    check_readable(module, name)
    read = _source(module)[1]
    assert read is not None  # it is readable
    dense = _oriented(module, read().detach())
    return dense if dense.dtype == torch.float64 else dense.to(torch.float32)


def row_blocks(module: Any, entries: int = 0) -> Callable[[], Iterator[torch.Tensor]]:
    """A function that yields the rows of the weight under a LoRA layer in blocks `(rows, n)`; a ValueError as above."""
    # Plain weights are sliced, in their dtype; bitsandbytes' 4-bit (NF4, FP4) and int8 weights are dequantized block by
    # block, others whole and once, to float32. A block has at most `entries` entries, or one row.
    check_readable(module)
    layer = module.get_base_layer()
    m, n = module.out_features, module.in_features
    height = max(1, (entries or _CHUNK) // max(1, n))
    cuts = [slice(low, low + height) for low in range(0, m, height)]
    weight = getattr(layer, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit" and _sliceable(weight, m, n):
        return lambda: _rows_4bit(weight, n, cuts)
    if kind == "Int8Params" and weight.dtype == torch.int8:  # type: ignore[union-attr]
        scale = _int8_scale(layer)
        return lambda: (_int8_rows(weight, scale, cut) for cut in cuts)
    plain = weight_kind(module) == PLAIN
    dense = _oriented(module, weight.detach()) if plain else dense_weight(module)  # type: ignore[union-attr]
    return lambda: (dense[cut] for cut in cuts)


def _oriented(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """The weight as `(m, n)`: transformers' Conv1D, and layers that follow it, store W^T."""
    shape = (module.out_features, module.in_features)
    conv1d = any(kind.__name__ == "Conv1D" for kind in type(module.get_base_layer()).__mro__)
    return weight.mT if conv1d or (tuple(weight.shape) != shape and tuple(weight.shape) == shape[::-1]) else weight


def _spread(scale: torch.Tensor, layer: Any) -> torch.Tensor:
    """Scales of blocks, repeated for every entry `(m, n)`, or the one for all."""
    scale = scale.detach().to(torch.float32)
    if layer.block_size is None:
        return scale
    high, wide = layer.block_size
    rows, columns = layer.weight.shape
    return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def _int8_rows(weight: Any, largest: Any, rows: slice) -> torch.Tensor:
    # `dequantize` of PEFT and bitsandbytes moves the parameter, after which the layer cannot run.
    scale = (largest.detach().to(torch.float32) / _INT8_LARGEST)[rows].unsqueeze(-1)
    codes: torch.Tensor = weight.data[rows]
    dense: torch.Tensor = codes.to(torch.float32) * scale.to(codes.device)
    return dense


def _sliceable(weight: Any, m: int, n: int) -> bool:
    """Whether a 4-bit weight is packed in order, two entries to a byte, and no block spans two rows."""
    # (With such a block, bitsandbytes' CPU kernels dequantize some of the rows differently from all of them.)
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False) or n % state.blocksize:
        return False
    return tuple(state.shape) == (m, n) and weight.data.numel() * weight.data.element_size() * 2 == m * n


def _rows_4bit(weight: Any, n: int, cuts: list[slice]) -> Iterator[torch.Tensor]:
    from bitsandbytes import functional  # noqa: PLC0415  (an optional dependency)

    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    absmax = absmax.to(torch.float32)
    packed = weight.data.reshape(-1).view(torch.uint8)
    blocks, m = n // state.blocksize, state.shape[0]
    for cut in cuts:
        low, high = cut.start, min(m, cut.stop)
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
