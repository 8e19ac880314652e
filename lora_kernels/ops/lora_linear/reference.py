"""The definition of the LoRA layer in plain torch; autograd gives its gradients."""

from __future__ import annotations

import torch

from lora_kernels.ops._dropout import Dropout
from lora_kernels.ops.skinny.reference import dropped


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dropout: Dropout | None = None,
    extra: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """`x W^T + bias + s drop(x) A^T B^T + e x A0^T B0^T` `(..., m)`; without W, the adapter's part alone.

    `extra` is A0 `(q, n)`, B0 `(m, q)` and e. Rows are counted, for dropout, over all leading sizes.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    y = scaling * (dropped(rows, dropout) @ a.mT @ b.mT)
    if weight is not None:
        y = y + rows @ weight.mT
    if bias is not None:
        y = y + bias
    if extra is not None:
        y = y + extra[2] * (rows @ extra[0].mT @ extra[1].mT)
    return y.reshape(*x.shape[:-1], b.shape[0])
