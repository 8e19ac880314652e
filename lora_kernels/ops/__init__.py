"""Floor 1: kernels. Each op is a folder with its definition, its kernels and its registration."""

from lora_kernels.ops._backend import BACKENDS, use_backend
from lora_kernels.ops.covariance import covariance_, symmetrize_
from lora_kernels.ops.gradient_statistics import fisher_scaled, gradient_statistics_
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.random_matrix import random_matrix
from lora_kernels.ops.sketch import project, sketch_
from lora_kernels.ops.small_linalg import eigh

__all__ = [
    "BACKENDS",
    "covariance_",
    "eigh",
    "fisher_scaled",
    "gradient_statistics_",
    "orthonormalize",
    "project",
    "random_matrix",
    "sketch_",
    "symmetrize_",
    "use_backend",
]
