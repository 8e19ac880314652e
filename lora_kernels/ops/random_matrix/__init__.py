"""Matrices of random numbers that are addressed, never stored."""

from lora_kernels.ops.random_matrix.op import random_matrix

__all__ = ["random_matrix"]
