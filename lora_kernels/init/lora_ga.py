"""LoRA-GA: the adapter's first step is aligned with that of full fine-tuning (arXiv 2407.05000)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_positive
from lora_kernels.init.gradients import GradientMethod, missing_directions
from lora_kernels.init.problem import LayerFactors, LayerProblem, as_factors, stock_start
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.statistics.sketches import stream_of

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd", "unit")
# Columns of B outside the first two lengths say that the scale does not suit the gradients; beyond the last one,
# `W + s B A` would round W away, and the function could not be kept.
_SHORT, _LONG, _TOO_LONG = 1e-8, 1e3, 1e6


@dataclass(frozen=True)
class LoraGA(GradientMethod):
    """A and B from the 2r leading singular triplets of the gradient of the mean loss.

    As in PEFT, B carries the singular values: `B = U_J diag(S_J)` and `A = V_I^T`, then scaled. `residual` is an upper
    bound on the spectral norm of what the 2r triplets leave of the gradient, relative to that of the gradient.

    Args:
        direction: which triplets (numbered from 1) A and B get: `ArB2r` the first r and the second r, `A2rBr` the other
            way round, `ArBr` the even and the odd ones, `random` the same r random ones. Of a layer with fewer than 2r
            all are given away, and the last rows of A or columns of B are zero.
        scale: `stable` multiplies B by `m^(1/4) / sqrt(gamma)`; `weight_svd` makes the first column of B as long as the
            base weight's largest singular value; `gd` divides both factors by s; `unit` leaves them.
        gamma: of `stable`.
        seed: of the random start of the decomposition, and of `random`.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "lora_ga"
    offsets_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True
    triplets_per_rank: ClassVar[int] = 2

    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_positive("gamma", self.gamma, high=torch.finfo(torch.float32).max)

    @property
    def reads_base(self) -> bool:
        """Whether it reads the base weights: with the scale `weight_svd`."""
        return self.scale == "weight_svd"

    def start(self, layer: LayerProblem, triplets: RandomizedSVD) -> LayerFactors:
        """Give the triplets away, and scale."""
        rank, count = layer.rank, triplets.S.numel()
        rows, columns = self._chosen(layer.name, rank, count)
        kept = triplets.S[columns]
        a, b = triplets.Vh[rows].to(torch.float64), triplets.U[:, columns] * kept
        if self.scale == "stable":
            b = b * (b.shape[0] ** 0.25 / self.gamma**0.5)
        elif self.scale == "gd":
            a, b = a / layer.scaling, b / layer.scaling
        elif self.scale == "weight_svd" and kept.numel() and kept[0] > 0:
            top = randomized_svd(layer.weight(), 1, n_iter=6, probes=0, seed=self.seed).S[0]
            b = b * float(top / kept[0])
        size = float(b.norm(dim=0).max()) if b.numel() else 0.0
        need = 'gradients of this size need another gamma, or scale="weight_svd"'
        if size > _TOO_LONG:
            return stock_start(layer, f"B would be as large as {size:.1e}: {need}")
        notes = missing_directions(triplets, f"the 2r = {2 * rank} of A and B")
        if min(len(rows), len(columns)) < rank:
            notes = (*notes, f"min(m, n) = {count} directions for the 2r = {2 * rank} of A and B: the last are zero")
        if size > _LONG or 0 < size < _SHORT:
            notes = (*notes, f"B starts at {size:.1e}: {need}")
        a = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        b = nn.functional.pad(b, (0, rank - b.shape[1]))
        return LayerFactors(as_factors(a, b), residual=float(triplets.error), solver=triplets.method, notes=notes)

    def _chosen(self, name: str, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Triplets of A and of B, from 0; of a layer with fewer than 2r one of both gets less than r."""
        every = torch.arange(count)
        if self.direction == "random":
            # The generator reads no more than 32 bits of a seed.
            generator = torch.Generator().manual_seed(stream_of(f"{self.seed} {name}"))
            some = torch.randperm(count, generator=generator)[:rank]
            return some, some
        if self.direction == "ArBr":
            return every[1::2], every[::2]
        halves = every[:rank], every[rank:]
        return halves if self.direction == "ArB2r" else halves[::-1]
