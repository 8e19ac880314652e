"""The low-rank part of many experts' linear layers, on rows that are sorted by expert."""

from lora_kernels.ops.grouped_lora.op import grouped_lora

__all__ = ["grouped_lora"]
