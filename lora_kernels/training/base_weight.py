"""The weight under a LoRA layer, and the name of what is frozen beside its adapter."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.statistics.modes import is_sharded


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter, without its graph; gathered from all processes (which must all ask) if it is sharded."""
    value: Any = parameter.detach()
    gathered: torch.Tensor = value.full_tensor() if is_sharded(value) else value
    return gathered


def dense_weight(module: Any) -> torch.Tensor:
    """The weight under a LoRA layer as the matrix that its output is made with.

    Args:
        module: a PEFT LoRA layer.

    Returns:
        W, `(m, n)`, float32 (float64 where the base is), a copy where it is quantized, sharded or of another dtype.
    """
    from peft.utils.integrations import dequantize_module_weight  # noqa: PLC0415  (peft is an optional dependency)

    layer = module.get_base_layer()
    weight = whole(dequantize_module_weight(layer))
    shape = (module.out_features, module.in_features)
    if type(layer).__name__ == "Conv1D" or (weight.shape != shape and weight.shape == shape[::-1]):
        weight = weight.mT
    return weight if weight.dtype == torch.float64 else weight.to(torch.float32)


def offset_name(adapter: str) -> str:
    """The name of the frozen adapter that goes with an adapter."""
    return f"{adapter}_offset"
