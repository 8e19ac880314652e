"""EVA: explained variance adaptation (arXiv 2410.07170)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lora_kernels.init.method import InitMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem, as_factors
from lora_kernels.init.ranks import Components, RankRule, input_components
from lora_kernels.statistics.sums import INPUT_SECOND


@dataclass(frozen=True)
class EVA(RankRule, InitMethod):
    """A = the leading principal components of a layer's inputs, B = 0; with `rho`, ranks follow the variance.

    By default every layer keeps the rank that it has: what is saved then is right in every server as it is.

    Args:
        rho: a layer's rank may grow to `round(rho * r)`, at the same sum of ranks (2 in the paper); 1
            keeps every rank.
        center: subtract the mean input (as PEFT does); otherwise the raw second moment is decomposed.
        whiten: divide row i of A by the square root of its singular value (that of the centred token matrix).
        min_rank: smallest rank of a layer where ranks change; with 0 a layer without a winning component loses its
            adapter.
        max_rank: largest rank of a layer (serving engines allocate for it).
        multiple_of: every rank is a multiple of this.
        adjust_scaling_factors: where a rank changes, alpha follows so that the scaling s stays the same.
        seed: of the random start of the eigensolver.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "eva"
    wants: ClassVar[Mapping[str, bool]] = {INPUT_SECOND: False}
    own_score: ClassVar[str] = "explained_variance"

    rho: float = 1.0
    center: bool = True
    whiten: bool = False

    @property
    def redistribution(self) -> RankRule | None:
        """By explained variance, where `rho`, `max_rank` or `multiple_of` say so."""
        return self if self.rho != 1.0 or self.max_rank is not None or self.multiple_of != 1 else None

    def keeping_ranks(self) -> EVA:
        """The same method with the ranks as they are asked for."""
        return replace(self, rho=1.0, min_rank=1, max_rank=None, multiple_of=1)

    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of all layers, which share the sum of their ranks."""
        winners = {name: layer.rank for name, layer in layers.items()}
        offered = self.offers(winners, {name: min(layer.shape) for name, layer in layers.items()})
        statistics = next(iter(layers.values())).collection
        components = input_components(statistics, offered, center=self.center, seed=self.seed)
        if self.redistribution is not None:
            winners = self.share({name: components[name].ratios()[: offered[name]] for name in layers}, winners)
        return {name: self._layer(components[name], winners[name], layer) for name, layer in layers.items()}

    def _layer(self, components: Components, rank: int, layer: LayerProblem) -> LayerFactors:
        pairs = components.pairs
        a = pairs.vectors[:, :rank].mT
        notes = []
        if components.tokens - self.center < rank:
            notes.append(f"{components.tokens:g} tokens cannot determine {rank} directions: the last are arbitrary")
        if components.total <= 0:
            notes.append("the input never varies: all directions are arbitrary")
        if self.whiten:
            # Out of place: layers that share an input share the vectors.
            singular = (pairs.values[:rank].clamp_min(0.0) * components.tokens).sqrt()
            floor = torch.finfo(torch.float32).eps * singular.max() if rank else singular.new_zeros(())
            a = a / singular.clamp_min(floor.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().unsqueeze(-1)
        factors = as_factors(a, torch.zeros(layer.shape[0], rank, device=a.device))
        explained = math.fsum(components.ratios()[:rank]) if components.total > 0 else math.nan
        return LayerFactors(factors, explained, float(pairs.residuals), pairs.method, tuple(notes))
