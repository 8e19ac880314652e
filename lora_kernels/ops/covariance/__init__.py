"""Accumulation of weighted second moments, `C += X^T diag(w) X`."""

from lora_kernels.ops.covariance.op import covariance_, symmetrize_

__all__ = ["covariance_", "symmetrize_"]
