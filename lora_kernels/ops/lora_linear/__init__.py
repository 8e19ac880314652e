"""A linear layer with a LoRA adapter, forward and backward."""

from lora_kernels.ops.lora_linear.group import LoraMember, lora_linear_group
from lora_kernels.ops.lora_linear.op import lora_delta, lora_linear

__all__ = ["LoraMember", "lora_delta", "lora_linear", "lora_linear_group"]
