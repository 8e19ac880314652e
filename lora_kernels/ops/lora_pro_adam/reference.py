"""The definition of the LoRA-Pro Adam op in plain torch."""

from __future__ import annotations

import math

import torch

from lora_kernels.ops import _philox

FIRST_MOMENT, SECOND_MOMENT = 0, 1  # streams of the random bits


def stochastic_round(
    x: torch.Tensor, *, seed: int | torch.Tensor, stream: int, step: int, first_row: int = 0
) -> torch.Tensor:
    """Round `(rows, columns)` to bfloat16, up with the probability of what is cut off; a NaN stays one."""
    random = _philox.halves(*x.shape, seed=seed, stream=stream, step=step, first_row=first_row, device=x.device)
    # Sign and magnitude: what is added to the bits adds to the magnitude.
    bits = (x.contiguous().view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def lora_pro_adam(
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    *,
    scaling: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    step: int,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of Adam on `E = s (B dA + dB A)`: new moments `(m, n)`, `s B^T H` `(r, n)` and `s H A^T` `(m, r)`."""
    a, b, grad_a, grad_b = (factor.to(dtype) for factor in (a, b, grad_a, grad_b))
    e = scaling * (b @ grad_a + grad_b @ a)
    exp_avg = betas[0] * exp_avg.to(dtype) + (1 - betas[0]) * e
    exp_avg_sq = betas[1] * exp_avg_sq.to(dtype) + (1 - betas[1]) * e * e
    root = exp_avg_sq.sqrt() / math.sqrt(1 - betas[1] ** step)
    h = exp_avg / (1 - betas[0] ** step) / (root + eps)
    return exp_avg, exp_avg_sq, scaling * (b.mT @ h), scaling * (h @ a.mT)
