"""The definition of the low-rank part of experts in plain torch; autograd gives its gradients."""

from __future__ import annotations

import torch

from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.skinny.reference import dropped


def grouped_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """`y + s drop(x) A_e^T B_e^T` `(rows, m)`, e the expert whose rows begin at `offsets[e]`; others keep their y."""
    x, bounds = dropped(x, dropout), offsets.tolist()
    parts = [
        scaling * (x[first:last] @ a[expert].mT @ b[expert].mT)
        for expert, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    return y + torch.cat((*parts, torch.zeros_like(y[bounds[-1] :])))
