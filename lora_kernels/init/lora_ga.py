"""LoRA-GA: the adapter's first step is aligned with that of full fine-tuning (arXiv 2407.05000)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_range
from lora_kernels.init._layers import base_layer, by_shape, check_rank, finite
from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.statistics.sketches import stream_of
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import METHOD_WANTS

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd", "unit")


@dataclass(frozen=True)
class LoraGA:
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
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["lora_ga"]
    offsets_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choices and ranges."""
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_range("gamma", self.gamma, low=0.0, high=torch.finfo(torch.float32).max)
        if self.gamma == 0:
            raise ValueError("gamma is 0, but must be positive")

    @property
    def reads_base(self) -> bool:
        """Whether it reads the base weights: with the scale `weight_svd`."""
        return self.scale == "weight_svd"

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the 2r triplets of the widest layer."""
        return 4 * max(ranks, default=1)

    def factors(
        self,
        statistics: Statistics,
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        Args:
            statistics: of all layers named in `ranks`. Gradients are divided by `Statistics.loss_items`; those of a
                plain mapping, which has no such count, are taken to be of the mean loss already.
            ranks: the rank of each layer.
            base: weight and scaling of each layer; read by the scales `weight_svd` and `gd` alone.
            progress: show a progress bar.

        Returns:
            Per layer its factors.

        Raises:
            ValueError: if a layer has no gradient or a gradient that is not finite, a rank is outside [1, min(m, n)] or
                2r exceeds the size of the sketch, no loss was counted, or a base layer is needed and missing.
        """
        mean = 1.0
        if isinstance(statistics, Statistics):
            if statistics.loss_items <= 0:
                raise ValueError("the statistics hold no loss: collect them with LoRA-GA, or with the gradient")
            mean = 1.0 / statistics.loss_items
        exact: list[str] = []
        sketched: list[str] = []
        for name, rank in ranks.items():
            sums = statistics[name].output if name in statistics else None
            if sums is None or (sums.gradient is None and sums.sketch is None):
                raise ValueError(f'layer {name} has no weight gradient: collect it with wants=("gradient",)')
            check_rank(name, rank, min(statistics[name].in_features, statistics[name].out_features))
            if self.scale in ("weight_svd", "gd"):
                base_layer(base, name, "LoRA-GA with this scale")
            (exact if sums.gradient is not None else sketched).append(name)

        def matrix(name: str) -> torch.Tensor:
            return finite("weight gradient", name, statistics[name].output.gradient) * mean  # type: ignore[union-attr, arg-type]

        def solve(names: Sequence[str], gradients: torch.Tensor, rank: int) -> list[LayerFactors]:
            found = randomized_svd(gradients, min(2 * rank, *gradients.shape[-2:]), n_iter=4, seed=self.seed)
            return [self._layer(name, _part(found, index), rank, base) for index, name in enumerate(names)]

        done = by_shape(exact, matrix, ranks, solve, lambda: matrix(exact[0]).device, progress) if exact else {}
        for name in sketched:
            sketch = statistics[name].output.sketch  # type: ignore[union-attr]
            assert sketch is not None
            for side in (sketch.left, sketch.right):
                finite("gradient sketch", name, side)
            count = min(2 * ranks[name], statistics[name].in_features, statistics[name].out_features)
            done[name] = self._layer(name, sketch.svd(count, scale=mean), ranks[name], base)
        return {name: done[name] for name in ranks}

    def _layer(
        self, name: str, triplets: RandomizedSVD, rank: int, base: Mapping[str, BaseLayer] | None
    ) -> LayerFactors:
        count = triplets.S.shape[0]
        rows, columns = self._chosen(name, rank, count)
        kept = triplets.S[columns]
        a, b = triplets.Vh[rows], triplets.U[:, columns] * kept
        if self.scale == "stable":
            b = b * (b.shape[0] ** 0.25 / self.gamma**0.5)
        elif self.scale == "gd":
            scaling = base_layer(base, name, self.name).scaling
            a, b = a / scaling, b / scaling
        elif self.scale == "weight_svd" and kept.numel() and kept[0] > 0:
            weight = finite("base weight", name, base_layer(base, name, self.name).weight())
            b = b * float(randomized_svd(weight, 1, n_iter=6, probes=0, seed=self.seed).S[0] / kept[0])
        top = float(triplets.S[0])
        assert triplets.error is not None  # probes are drawn
        residual = float(triplets.error) / top if top > 0 else 0.0
        notes = () if top > 0 else ("the gradient is zero: all directions are arbitrary, and B is zero",)
        if min(len(rows), len(columns)) < rank:
            notes = (*notes, f"min(m, n) = {count} directions for the 2r = {2 * rank} of A and B: the last are zero")
        a = nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        b = nn.functional.pad(b, (0, rank - b.shape[1]))
        factors = LoraFactors(a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous())
        return LayerFactors(factors, math.nan, residual, triplets.method, notes)

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


def _part(found: RandomizedSVD, index: int) -> RandomizedSVD:
    """One matrix of a batch."""
    error = None if found.error is None else found.error[index]
    return RandomizedSVD(found.U[index], found.S[index], found.Vh[index], error, found.method, found.products)
