"""Matrix algorithms on top of the ops."""

from lora_kernels.linalg.basis import core_basis
from lora_kernels.linalg.eigen import TopEigenpairs, eigh_topk
from lora_kernels.linalg.randomized_svd import LinearOperator, RandomizedSVD, randomized_svd

__all__ = [
    "LinearOperator",
    "RandomizedSVD",
    "TopEigenpairs",
    "core_basis",
    "eigh_topk",
    "randomized_svd",
]
