"""Floor 4: training. The fused forward of PEFT's LoRA layers, and LoRA-Dash."""

from lora_kernels.training.acceleration import AccelerateReport, LayerPath, accelerate, groups, reference_mode, restore
from lora_kernels.training.dash import DashLayer, DashReport, DashRun, LoRADash
from lora_kernels.training.verification import LayerErrors, VerifyReport, verify

__all__ = [
    "AccelerateReport",
    "DashLayer",
    "DashReport",
    "DashRun",
    "LayerErrors",
    "LayerPath",
    "LoRADash",
    "VerifyReport",
    "accelerate",
    "groups",
    "reference_mode",
    "restore",
    "verify",
]
