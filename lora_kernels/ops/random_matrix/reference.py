"""The definition of the random matrix in plain torch."""

from __future__ import annotations

import torch

from lora_kernels.ops import _philox

KINDS = ("rademacher", "gaussian")


def random_matrix(
    rows: int,
    columns: int,
    kind: str = "rademacher",
    *,
    seed: int,
    stream: int = 0,
    step: int = 0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`(rows, columns)` draws on the CPU, functions of seed and position, by integers or in float64."""
    draw = _philox.signs if kind == "rademacher" else _philox.normal
    return draw(rows, columns, seed=seed, stream=stream, step=step, dtype=dtype)
