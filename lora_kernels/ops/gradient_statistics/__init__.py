"""Accumulation of weight gradients and Fisher diagonals, `G += g^T diag(w) x` and `f += sum v g^2`."""

from lora_kernels.ops.gradient_statistics.op import gradient_statistics_
from lora_kernels.ops.gradient_statistics.scaling import fisher_scaled

__all__ = ["fisher_scaled", "gradient_statistics_"]
