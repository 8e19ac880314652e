"""Batched algebra on small dense matrices."""

from lora_kernels.ops.small_linalg.op import cholesky, cholesky_solve, eigh, fix_signs, sylvester
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum

__all__ = ["cholesky", "cholesky_solve", "eigh", "factor_spectrum", "fix_signs", "sylvester"]
