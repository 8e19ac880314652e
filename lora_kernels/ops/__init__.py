"""Floor 1: kernels. Each op is a folder with its definition, its kernels and its registration."""

from lora_kernels.ops._backend import BACKENDS, use_backend
from lora_kernels.ops.covariance import covariance_, symmetrize_
from lora_kernels.ops.small_linalg import cholesky, cholesky_solve, eigh, factor_spectrum, sylvester

__all__ = [
    "BACKENDS",
    "cholesky",
    "cholesky_solve",
    "covariance_",
    "eigh",
    "factor_spectrum",
    "sylvester",
    "symmetrize_",
    "use_backend",
]
