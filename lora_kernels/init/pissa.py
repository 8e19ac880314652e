"""PiSSA: the principal singular components of the base weight become the adapter (arXiv 2404.02948)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lora_kernels._checks import check_range
from lora_kernels.init._layers import balanced, base_layer, by_shape, check_rank, finite
from lora_kernels.init.factors import BaseLayer, LayerFactors
from lora_kernels.linalg.randomized_svd import fix_pair, randomized_svd
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import METHOD_WANTS


@dataclass(frozen=True)
class PiSSA:
    """B = `U_r sqrt(S_r / s)` and A = `sqrt(S_r / s) V_r^T` of the base weight; needs no data.

    `residual` is the spectral norm of `W - s B A` relative to that of W: exact from the full decomposition, an upper
    bound (see `linalg.RandomizedSVD.error`) from the randomized one; where many components of like size are left, it is
    several times too large and may exceed 1.

    Args:
        n_iter: rounds of the randomized (block Krylov) decomposition; `None` for the full one. Eight leave no more than
            about 2e-3 of the components' energy even where the singular values hardly decay.
        seed: of its random start.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "pissa"
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["pissa"]
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    n_iter: int | None = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.n_iter is not None:
            check_range("n_iter", self.n_iter, low=0, integer=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002  (no sketch is read)
        """Columns that a sketch should have: one, as none is read."""
        return 1

    def factors(
        self,
        statistics: Statistics,  # noqa: ARG002  (not needed)
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        Args:
            statistics: not needed.
            ranks: the rank of each layer.
            base: weight and scaling of each layer.
            progress: show a progress bar.

        Returns:
            Per layer its factors.

        Raises:
            ValueError: if a layer has no base or no positive scaling, its weight is not finite, or its rank is outside
                [1, min(m, n)].
        """
        layers = {name: base_layer(base, name, "PiSSA") for name in ranks}

        def matrix(name: str) -> torch.Tensor:
            weight = finite("base weight", name, layers[name].weight()).to(torch.float32)
            check_rank(name, ranks[name], min(weight.shape))
            return weight

        def solve(names: Sequence[str], weights: torch.Tensor, rank: int) -> list[LayerFactors]:
            u, s, vh, left, solver = self._svd(weights, rank)
            found = []
            for index, name in enumerate(names):
                factors, notes = balanced(u[index], s[index], vh[index], layers[name].scaling)
                residual = float(left[index] / s[index, 0]) if s[index, 0] > 0 else 0.0
                found.append(LayerFactors(factors, math.nan, residual, solver, notes))
            return found

        return by_shape(ranks, matrix, ranks, solve, lambda: next(iter(layers.values())).weight().device, progress)

    def _svd(
        self, weights: torch.Tensor, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str]:
        """The leading triplets, the spectral norm of what they leave, and how they were found."""
        if self.n_iter is not None:
            found = randomized_svd(weights, rank, n_iter=self.n_iter, seed=self.seed)
            assert found.error is not None  # probes are drawn
            return found.U, found.S, found.Vh, found.error, found.method
        u, s, vh = torch.linalg.svd(weights, full_matrices=False)
        left = s[:, rank] if rank < s.shape[-1] else torch.zeros_like(s[:, 0])
        u, v = fix_pair(u[..., :rank], vh[:, :rank].mT)
        return u, s[:, :rank], v.mT, left, "svd"
