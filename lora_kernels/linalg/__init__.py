"""Floor 2: matrix algorithms made of ops."""

from lora_kernels.linalg.eigen import TopEigenpairs, eigh_topk

__all__ = ["TopEigenpairs", "eigh_topk"]
