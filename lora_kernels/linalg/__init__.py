"""Matrix algorithms on top of the ops."""

from lora_kernels.linalg.basis import core_basis
from lora_kernels.linalg.eigen import TopEigenpairs, eigh_topk
from lora_kernels.linalg.randomized_svd import LinearOperator, RandomizedSVD, randomized_svd
from lora_kernels.linalg.single_pass import Nystrom, nystrom, two_sided
from lora_kernels.linalg.spectral_norm import SpectralNorm, spectral_norm

__all__ = [
    "LinearOperator",
    "Nystrom",
    "RandomizedSVD",
    "SpectralNorm",
    "TopEigenpairs",
    "core_basis",
    "eigh_topk",
    "nystrom",
    "randomized_svd",
    "spectral_norm",
    "two_sided",
]
