"""Batched algebra on small dense matrices."""

from lora_kernels.ops.small_linalg.op import eigh, fix_signs

__all__ = ["eigh", "fix_signs"]
