"""Operators: pure functions of tensors, with a reference, and backends for CPU and GPU."""

from lora_kernels.ops._backend import BACKENDS, use_backend
from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.covariance import covariance_, symmetrize_
from lora_kernels.ops.gradient_statistics import fisher_scaled, gradient_statistics_
from lora_kernels.ops.grouped_lora import grouped_lora
from lora_kernels.ops.lora_linear import lora_delta, lora_linear, use_form
from lora_kernels.ops.lora_pro_adam import lora_pro_adam_
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.random_matrix import random_matrix
from lora_kernels.ops.sketch import project, sketch_
from lora_kernels.ops.skinny import expand, shrink, tsreduce
from lora_kernels.ops.small_linalg import cholesky, cholesky_solve, eigh, factor_spectrum, sylvester

__all__ = [
    "BACKENDS",
    "Dropout",
    "cholesky",
    "cholesky_solve",
    "covariance_",
    "eigh",
    "expand",
    "factor_spectrum",
    "fisher_scaled",
    "gradient_statistics_",
    "grouped_lora",
    "lora_delta",
    "lora_linear",
    "lora_pro_adam_",
    "orthonormalize",
    "project",
    "random_matrix",
    "shrink",
    "sketch_",
    "sylvester",
    "symmetrize_",
    "tsreduce",
    "use_backend",
    "use_form",
]
