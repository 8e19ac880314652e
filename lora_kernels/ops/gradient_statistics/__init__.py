"""Accumulation of weight gradients and Fisher diagonals, `G += g^T diag(w) x` and `f += sum v g^2`."""

from lora_kernels.ops.gradient_statistics.op import fisher_scaled, gradient_statistics_

__all__ = ["fisher_scaled", "gradient_statistics_"]
