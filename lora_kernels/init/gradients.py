"""Methods that start from the leading singular triplets of the weight gradient, exact or from a sketch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from lora_kernels.init.method import LayerwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.statistics.sums import GRADIENT


def missing_directions(triplets: RandomizedSVD, use: str) -> tuple[str, ...]:
    """What is to be said where the gradient has too few directions for their use."""
    usable = int((triplets.S > 0).sum())
    if usable == triplets.S.numel():
        return ()
    return (f"the gradient has {usable} directions above rounding for {use}: the others are arbitrary in A, zero in B",)


class GradientMethod(LayerwiseMethod):
    """What LoRA-GA and LoRA-One share: the decomposition. Their last field is its `seed`."""

    wants: ClassVar[Mapping[str, bool]] = {GRADIENT: False}
    triplets_per_rank: ClassVar[int]
    seed: int

    @abstractmethod
    def start(self, layer: LayerProblem, triplets: RandomizedSVD) -> LayerFactors:
        """The factors of a layer, from triplets of its gradient: values below rounding are zero, the error relative."""

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the triplets of the widest layer."""
        return 2 * self.triplets_per_rank * max(ranks, default=1)

    def together(self, layer: LayerProblem) -> Hashable:
        """Exact gradients of one shape are decomposed in batches, sketches one by one."""
        return (layer.shape, layer.rank, layer.device) if layer.has(GRADIENT, exact=True) else layer.name

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the factors from the gradients of a group."""
        count = min(self.triplets_per_rank * layers[0].rank, *layers[0].shape)
        exact = layers[0].has(GRADIENT, exact=True)
        every = self._decompose(layers, count) if exact else (layer.gradient_svd(count) for layer in layers)
        for layer, svd in zip(layers, every, strict=True):
            # Errors of the sums are relative to their entries, and independent.
            noise = math.sqrt(max(layer.shape)) * torch.finfo(layer.seen.sums[GRADIENT].dtype).eps
            values = torch.where(svd.S / svd.S[0] > noise, svd.S, 0.0)
            yield self.start(layer, replace(svd, S=values, error=svd.error / svd.S[0]))

    def _decompose(self, layers: Sequence[LayerProblem], count: int) -> Iterator[RandomizedSVD]:
        gradients = torch.stack([layer.mean(GRADIENT) for layer in layers])
        # By its largest entry, so that no product overflows or vanishes.
        scales = gradients.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
        svd = randomized_svd(gradients.div_(scales), count, n_iter=4, seed=self.seed)
        values, errors = (part.to(torch.float64) * scales.view(-1, 1) for part in (svd.S, svd.error.unsqueeze(-1)))
        for u, s, vh, error in zip(svd.U, values, svd.Vh, errors[:, 0], strict=True):
            yield RandomizedSVD(u, s, vh, error, svd.method)
