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
    """Independent draws of mean 0 and variance 1, each a function of the seed and its position.

    Args:
        rows: number of rows.
        columns: number of columns.
        kind: `rademacher` (1 or -1) or `gaussian`.
        seed: 64-bit key.
        stream: which matrix, 32 bits.
        step: which draw of that matrix, 32 bits.
        dtype: of the result; the arithmetic is that of integers or of float64.

    Returns:
        `(rows, columns)` on the CPU.
    """
    draw = _philox.signs if kind == "rademacher" else _philox.normal
    return draw(rows, columns, seed=seed, stream=stream, step=step, dtype=dtype)
