"""What a variant of PEFT's LoRA may add to an adapter's product and still run fused."""

from lora_kernels.adapters.extension import Extension, tied

__all__ = ["Extension", "tied"]
