"""A linear layer with a LoRA adapter, forward and backward."""

from lora_kernels.ops.lora_linear.forms import use_form
from lora_kernels.ops.lora_linear.op import lora_delta, lora_linear

__all__ = ["lora_delta", "lora_linear", "use_form"]
