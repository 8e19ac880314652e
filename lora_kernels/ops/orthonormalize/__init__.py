"""Orthonormal bases of tall matrices."""

from lora_kernels.ops.orthonormalize.op import orthonormalize

__all__ = ["orthonormalize"]
