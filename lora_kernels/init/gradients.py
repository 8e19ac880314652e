"""Methods that start from the leading singular triplets of the weight gradient, exact or from a sketch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels.init.method import LayerwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.statistics.sums import GRADIENT


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets of a gradient of the mean loss."""

    u: torch.Tensor  # `(m, k)`
    s: torch.Tensor  # `(k,)` float64, descending; zero where it is not above the rounding of the sums
    vh: torch.Tensor  # `(k, n)`
    usable: int  # how many are above that rounding
    residual: float  # bound on the spectral norm of what they leave, relative to that of the gradient
    solver: str  # the algorithm

    @classmethod
    def of(cls, svd: RandomizedSVD, dtype: torch.dtype) -> Triplets:
        """Those of a gradient whose sums are of some dtype."""
        assert svd.error is not None  # probes are drawn
        # Errors of the sums are relative to their entries, and independent.
        noise = math.sqrt(max(svd.U.shape[0], svd.Vh.shape[1])) * torch.finfo(dtype).eps
        above = svd.S / svd.S[0] > noise
        residual = float(svd.error / svd.S[0])
        return cls(svd.U, torch.where(above, svd.S, 0.0), svd.Vh, int(above.sum()), residual, svd.method)

    def notes(self, use: str) -> tuple[str, ...]:
        """What is to be said where the gradient has too few directions for their use."""
        if self.usable == self.s.numel():
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

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the factors from the gradients of a group."""
        count = min(self.triplets_per_rank * layers[0].rank, *layers[0].shape)
        exact = layers[0].has(GRADIENT, exact=True)
        every = self._decompose(layers, count) if exact else (layer.gradient_svd(count) for layer in layers)
        for layer, svd in zip(layers, every, strict=True):
            yield self.start(layer, Triplets.of(svd, layer.seen.sums[GRADIENT].dtype))

    def _decompose(self, layers: Sequence[LayerProblem], count: int) -> Iterator[RandomizedSVD]:
        gradients = torch.stack([layer.mean(GRADIENT) for layer in layers])
        # By its largest entry, so that no product overflows or vanishes.
        scales = gradients.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
        svd = randomized_svd(gradients.div_(scales), count, n_iter=4, seed=self.seed)
        assert svd.error is not None  # probes are drawn
        values, errors = (part.to(torch.float64) * scales.view(-1, 1) for part in (svd.S, svd.error.unsqueeze(-1)))
        for u, s, vh, error in zip(svd.U, values, svd.Vh, errors[:, 0], strict=True):
            yield RandomizedSVD(u, s, vh, error, svd.method)
