"""Training: the fused forward of PEFT's LoRA layers, LoRA-Dash, and the LoRA-Pro optimizer."""

from lora_kernels.training.acceleration import AccelerateReport, LayerPath, accelerate, reference_mode, restore
from lora_kernels.training.dash import DashLayer, DashReport, DashRun, LoraDash
from lora_kernels.training.lora_pro import LoraPro, create_lora_pro_optimizer, lora_pro_cls_and_kwargs
from lora_kernels.training.verification import LayerErrors, VerifyReport, verify

__all__ = [
    "AccelerateReport",
    "DashLayer",
    "DashReport",
    "DashRun",
    "LayerErrors",
    "LayerPath",
    "LoraDash",
    "LoraPro",
    "VerifyReport",
    "accelerate",
    "create_lora_pro_optimizer",
    "lora_pro_cls_and_kwargs",
    "reference_mode",
    "restore",
    "verify",
]
