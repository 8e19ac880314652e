"""PiSSA: the principal singular components of the base weight become the adapter (arXiv 2404.02948)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_range
from lora_kernels.init.method import LayerwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem, balanced
from lora_kernels.linalg.randomized_svd import fix_pair, randomized_svd


@dataclass(frozen=True)
class PiSSA(LayerwiseMethod):
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
    wants: ClassVar[Mapping[str, bool]] = {}
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True

    n_iter: int | None = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("n_iter", self.n_iter, low=0, integer=True, optional=True)

    def together(self, layer: LayerProblem) -> Hashable:
        """Weights of one shape are decomposed in batches."""
        return layer.shape, layer.rank

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the factors from a batch of weights."""
        scalings = [layer.scaling for layer in layers]
        weights = [layer.weight().to(torch.float32) for layer in layers]
        batch = torch.stack([weight.to(weights[0].device) for weight in weights])
        rank = layers[0].rank
        if self.n_iter is not None:
            triplets = randomized_svd(batch, rank, n_iter=self.n_iter, seed=self.seed)
            u, s, vh, left, solver = triplets.U, triplets.S, triplets.Vh, triplets.error, triplets.method
        else:
            u, s, vh = torch.linalg.svd(batch, full_matrices=False)
            left, solver = s[:, rank] if rank < s.shape[-1] else torch.zeros_like(s[:, 0]), "svd"
            u, v = fix_pair(u[..., :rank], vh[:, :rank].mT)
            s, vh = s[:, :rank], v.mT
        for index, scaling in enumerate(scalings):
            factors, notes = balanced(u[index], s[index], vh[index], scaling)
            residual = float(left[index] / s[index, 0]) if s[index, 0] > 0 else 0.0
            yield LayerFactors(factors, residual=residual, solver=solver, notes=notes)
