"""The definition of the sketch ops in plain torch."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels.ops._rows import counted
from lora_kernels.ops.random_matrix import reference as random_reference


def project(a: torch.Tensor, k: int, *, seed: int, stream: int = 0, kind: str = "rademacher") -> torch.Tensor:
    """`a @ Omega` `(..., k)` in float64."""
    return a.double() @ random_reference.random_matrix(a.shape[-1], k, kind, seed=seed, stream=stream).to(a.device)


def sketch(
    left: torch.Tensor, right: torch.Tensor, k: int, weight: torch.Tensor | None = None, **omega: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sum_t w_t left_t (right_t^T Omega)` `(p, k)` and `sum_t w_t left_t` `(p,)`; rows of weight zero do not count."""
    (one, factor), (two, _) = counted(left, weight), counted(right, weight)
    return (one * factor).mT @ project(two, k, **omega), (one * factor).sum(0)
