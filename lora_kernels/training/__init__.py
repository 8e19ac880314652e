"""Floor 4: training. The fused forward of PEFT's LoRA layers."""

from lora_kernels.training.acceleration import AccelerateReport, LayerPath, accelerate, groups, reference_mode, restore
from lora_kernels.training.verification import LayerErrors, VerifyReport, verify

__all__ = [
    "AccelerateReport",
    "LayerErrors",
    "LayerPath",
    "VerifyReport",
    "accelerate",
    "groups",
    "reference_mode",
    "restore",
    "verify",
]
