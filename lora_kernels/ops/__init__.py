"""Operators: pure functions of tensors, each with a reference, and backends for CPU and GPU."""

from lora_kernels.ops._backend import BACKENDS, use_backend
from lora_kernels.ops.covariance import covariance_, symmetrize_
from lora_kernels.ops.gradient_statistics import fisher_scaled, gradient_statistics_
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.random_matrix import random_matrix
from lora_kernels.ops.sketch import project, sketch_
from lora_kernels.ops.small_linalg import cholesky, cholesky_solve, eigh, factor_spectrum, sylvester

__all__ = [
    "BACKENDS",
    "cholesky",
    "cholesky_solve",
    "covariance_",
    "eigh",
    "factor_spectrum",
    "fisher_scaled",
    "gradient_statistics_",
    "orthonormalize",
    "project",
    "random_matrix",
    "sketch_",
    "sylvester",
    "symmetrize_",
    "use_backend",
]
