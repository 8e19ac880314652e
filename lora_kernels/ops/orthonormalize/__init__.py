"""Orthonormal bases of tall matrices."""

from lora_kernels.ops.orthonormalize.op import gram, orthonormalize, times

__all__ = ["gram", "orthonormalize", "times"]
