"""The definition of the skinny products in plain torch."""

from __future__ import annotations

import torch

from lora_kernels.ops import _philox
from lora_kernels.ops._dropout import Dropout


def dropped(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """`(tokens, n)` after dropout: zero where dropped, else scaled by one over the share kept. Differentiable."""
    if dropout is None:
        return x
    keep = _philox.keep_mask(*x.shape, p=dropout.p, seed=dropout.seed, stream=dropout.stream, device=x.device)
    return torch.where(keep, x, 0) * _philox.keep_factor(_philox.keep_threshold(dropout.p))


def shrink(x: torch.Tensor, a: torch.Tensor, scale: float = 1.0, dropout: Dropout | None = None) -> torch.Tensor:
    """`scale * drop(x) a^T`: `(tokens, n)` and `(r, n)` give `(tokens, r)`."""
    return scale * (dropped(x, dropout) @ a.mT)


def tsreduce(t: torch.Tensor, z: torch.Tensor, dropout: Dropout | None = None) -> torch.Tensor:
    """`t^T drop(z)`: `(tokens, r)` and `(tokens, d)` give `(r, d)`."""
    return t.mT @ dropped(z, dropout)


def expand(
    t: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None = None, dropout: Dropout | None = None
) -> torch.Tensor:
    """`base + drop(t b)`: `(tokens, r)` and `(r, d)` give `(tokens, d)`; the base may be a row, a matrix or nothing."""
    delta = dropped(t @ b, dropout)
    return delta if base is None else base + delta
