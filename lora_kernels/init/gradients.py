"""Methods that start from the leading singular triplets of the weight gradient, exact or from a sketch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels.init.factors import LayerFactors
from lora_kernels.init.method import LayerwiseMethod
from lora_kernels.init.problem import LayerProblem
from lora_kernels.init.solving import batch_size
from lora_kernels.linalg.randomized_svd import randomized_svd
from lora_kernels.statistics.gradients import GRADIENT


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets of a gradient of the mean loss."""

    u: torch.Tensor  # `(m, k)`
    s: torch.Tensor  # `(k,)` float64, descending; zero where it is not above the rounding of the sums
    vh: torch.Tensor  # `(k, n)`
    usable: int  # how many are above that rounding
    residual: float  # bound on the spectral norm of what they leave, relative to that of the gradient
    solver: str  # the algorithm

    def notes(self, use: str) -> tuple[str, ...]:
        """What is to be said where the gradient has too few directions for their use."""
        count = self.s.numel()
        if self.usable == count:
            return ()
        said = f"the gradient has {self.usable} directions above rounding for {use}"
        return (f"{said}: the others are arbitrary in A, zero in B",)


class GradientMethod(LayerwiseMethod):
    """What LoRA-GA and LoRA-One share: the decomposition. Their last field is its `seed`."""

    wants: ClassVar[Mapping[str, bool]] = {GRADIENT: False}
    triplets_per_rank: ClassVar[int]
    seed: int

    @abstractmethod
    def start(self, layer: LayerProblem, triplets: Triplets) -> LayerFactors:
        """The factors of one layer."""

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the triplets of the widest layer."""
        return 2 * self.triplets_per_rank * max(ranks, default=1)

    def together(self, layer: LayerProblem) -> Hashable:
        """Exact gradients of one shape are decomposed in batches, sketches one by one."""
        return (layer.shape, layer.rank, layer.device) if layer.has(GRADIENT, exact=True) else layer.name

    def at_most(self, layer: LayerProblem) -> int:
        """As many as a batch holds."""
        return batch_size(4 * math.prod(layer.shape), layer.device)

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the factors from the gradients of a group."""
        count = min(self.triplets_per_rank * layers[0].rank, *layers[0].shape)
        decompose = self._decompose if layers[0].has(GRADIENT, exact=True) else self._reconstruct
        for layer, triplets in zip(layers, decompose(layers, count), strict=True):
            yield self.start(layer, triplets)

    def _decompose(self, layers: Sequence[LayerProblem], count: int) -> Iterator[Triplets]:
        gradients = torch.stack([layer.mean(GRADIENT) for layer in layers])
        # By its largest entry, so that no product overflows or vanishes.
        scales = gradients.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
        gradients /= scales
        triplets = randomized_svd(gradients, count, n_iter=4, seed=self.seed)
        assert triplets.error is not None  # probes are drawn
        for u, s, vh, error, scale in zip(
            triplets.U, triplets.S, triplets.Vh, triplets.error, scales.flatten(), strict=True
        ):
            residual = float(error / s[0])
            yield _triplets(u, s.to(torch.float64) * scale, vh, residual, triplets.method, gradients.dtype)

    def _reconstruct(self, layers: Sequence[LayerProblem], count: int) -> Iterator[Triplets]:
        for layer in layers:
            triplets = layer.gradient_svd(count)
            assert triplets.error is not None  # a sketch has probes
            residual = float(triplets.error / triplets.S[0])
            yield _triplets(triplets.U, triplets.S, triplets.Vh, residual, triplets.method, layer.sums_dtype(GRADIENT))


def _triplets(
    u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, residual: float, solver: str, dtype: torch.dtype
) -> Triplets:
    # Errors of the sums are relative to their entries, and independent.
    noise = math.sqrt(max(u.shape[0], vh.shape[1])) * torch.finfo(dtype).eps
    above = s > noise * s[0]
    return Triplets(u, torch.where(above, s, 0.0), vh, int(above.sum()), residual, solver)
