"""A linear layer with a LoRA adapter, forward and backward."""

from lora_kernels.ops.lora_linear.forms import use_form
from lora_kernels.ops.lora_linear.op import LoraMember, lora_delta, lora_linear, lora_linear_group

__all__ = ["LoraMember", "lora_delta", "lora_linear", "lora_linear_group", "use_form"]
