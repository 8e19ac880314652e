"""Products with a skinny factor, bound by memory: the primitives of a LoRA layer."""

from lora_kernels.ops.skinny.op import expand, shrink, tsreduce

__all__ = ["expand", "shrink", "tsreduce"]
