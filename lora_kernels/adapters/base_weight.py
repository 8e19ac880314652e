"""The weight under a LoRA layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def base_weight(module: Any) -> torch.Tensor:
    """`dense_weight`, always float32."""
    return dense_weight(module).to(torch.float32)


def is_quantized(module: Any) -> bool:
    """Whether the base weight of a LoRA layer is not a plain floating tensor that can be changed in place."""
    weight = getattr(module.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor) or type(weight) not in (nn.Parameter, torch.Tensor):
        return True
    return not weight.is_floating_point()
