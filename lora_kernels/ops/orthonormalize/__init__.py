"""Orthonormal bases of tall matrices."""

from lora_kernels.ops.orthonormalize.op import factored, gram, orthonormalize, times

__all__ = ["factored", "gram", "orthonormalize", "times"]
