"""The definition of the random matrix in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lora_kernels.ops._philox import words

KINDS = ("rademacher", "gaussian")


class Omega(NamedTuple):
    """Which random matrix a sketch is made with."""

    kind: str
    seed: int
    stream: int


def random_matrix(
    rows: int, columns: int, kind: str, seed: int, stream: int = 0, step: int = 0, *, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """`(rows, columns)` on the CPU: signs (a bit is 0 for 1 and 1 for -1), or normal draws by Box-Muller in float64."""
    signs = kind == "rademacher"
    drawn = words(rows, -(-columns // (128 if signs else 4)), seed=seed, stream=stream, step=step)
    if signs:
        draws = 1 - 2 * ((drawn.unsqueeze(-1) >> torch.arange(32)) & 1)  # (rows, groups, 4, 32)
    else:
        uniform = (drawn.to(torch.float64) + 0.5) * 2.0**-32  # open interval (0, 1)
        radius, angle = (-2.0 * uniform[..., 0::2].log()).sqrt(), (2.0 * math.pi) * uniform[..., 1::2]
        draws = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (rows, groups, 2, 2)
    return draws.flatten(1)[:, :columns].to(dtype)
