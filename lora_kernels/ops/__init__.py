"""Operators: pure functions of tensors, with a reference, and backends for CPU and GPU."""

from lora_kernels.ops._backend import BACKENDS, use_backend
from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.covariance.op import covariance_, symmetrize_
from lora_kernels.ops.gradient_statistics.op import gradient_statistics_
from lora_kernels.ops.grouped_lora.op import grouped_lora
from lora_kernels.ops.lora_linear.forms import use_form
from lora_kernels.ops.lora_linear.op import lora_delta, lora_linear
from lora_kernels.ops.lora_pro_adam import lora_pro_adam_
from lora_kernels.ops.orthonormalize.op import orthonormalize
from lora_kernels.ops.random_matrix.op import random_matrix
from lora_kernels.ops.sketch.op import project, sketch_
from lora_kernels.ops.skinny.op import expand, shrink, tsreduce
from lora_kernels.ops.small_linalg.op import cholesky, cholesky_solve, eigh, sylvester
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum

__all__ = [
    "BACKENDS",
    "Dropout",
    "cholesky",
    "cholesky_solve",
    "covariance_",
    "eigh",
    "expand",
    "factor_spectrum",
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
