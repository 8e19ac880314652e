"""Adam on the full gradient that LoRA factors stand for, without that gradient ever being stored."""

from lora_kernels.ops.lora_pro_adam.op import lora_pro_adam_

__all__ = ["lora_pro_adam_"]
