"""One layer as a method gets it to solve: rank, statistics as means, what is under the adapter."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lora_kernels.init.factors import BaseLayer, LayerFactors, as_factors
from lora_kernels.linalg.randomized_svd import RandomizedSVD
from lora_kernels.statistics.gradients import FISHER, GRADIENT
from lora_kernels.statistics.moments import INPUT_SECOND, Accumulator
from lora_kernels.statistics.sketches import stream_of
from lora_kernels.statistics.store import LayerStatistics


def finite(what: str, name: str, values: torch.Tensor) -> torch.Tensor:
    """The values without their graph; a ValueError if an entry is NaN or infinite."""
    values = values.detach()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the {what} of layer {name} holds NaN or infinite entries")
    return values


def check_ranks(ranks: Mapping[str, int], limits: Mapping[str, int]) -> None:
    """Refuse ranks outside [1, min(m, n)], naming all such layers."""
    bad = [name for name, rank in ranks.items() if not 1 <= rank <= limits[name]]
    if bad:
        layers = (
            f"layer {name} has rank {ranks[name]}, but must be between 1 and min(m, n) = {limits[name]}" for name in bad
        )
        raise ValueError("; ".join(layers))


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be solved: its rank, what was seen of it (means over tokens or items), what is under its adapter."""

    name: str
    rank: int
    collection: Mapping[str, LayerStatistics]
    base: BaseLayer | None

    @property
    def seen(self) -> LayerStatistics | None:
        """What was collected of it."""
        return self.collection.get(self.name)

    @property
    def items(self) -> float:
        """By what its sum of gradients is divided."""
        return 0.0 if self.seen is None else self.seen.loss_items

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        if self.seen is not None:
            return self.seen.out_features, self.seen.in_features
        base = self.under
        m, n = base.weight().shape if base.shape is None else base.shape
        return m, n

    @property
    def device(self) -> torch.device:
        """Where the sums are, or else the base weight."""
        sums = () if self.seen is None else self.seen.sums.values()
        return next((part.count.device for part in sums), None) or self.under.weight().device

    @property
    def under(self) -> BaseLayer:
        """What is under the adapter."""
        if self.base is None:
            raise ValueError(f"the method starts from the base weight, but base has no layer {self.name}")
        return self.base

    @property
    def scaling(self) -> float:
        """Scaling of the adapter."""
        scaling = self.under.scaling
        if not (math.isfinite(scaling) and scaling > 0):
            raise ValueError(f"layer {self.name} has scaling {scaling!r}, but must be positive and finite")
        return scaling

    def weight(self) -> torch.Tensor:
        """The base weight, `(m, n)`."""
        weight = finite("base weight", self.name, self.under.weight())
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"the base weight of layer {self.name} is {tuple(weight.shape)}, but must be {self.shape}")
        return weight

    @property
    def tokens(self) -> float:
        """Rows counted."""
        return 0.0 if self.seen is None else self.seen.tokens

    def mean(self, statistic: str) -> torch.Tensor:
        """The mean of a statistic (see `LayerStatistics.mean`), with finite entries."""
        seen = self._statistics()
        return finite(seen.sums[statistic].words, self.name, seen.mean(statistic))

    def input_mean(self) -> torch.Tensor:
        """Mean of x, `(n,)` float64."""
        inputs = self._statistics().input
        assert inputs is not None  # `problems` has checked it
        return inputs.mean()

    def gradient_svd(self, rank: int) -> RandomizedSVD:
        """The leading singular triplets of the gradient, or of its sketch (then in float64)."""
        seen = self._statistics()
        for sums in seen.sums[GRADIENT].tensors().values():
            finite(seen.sums[GRADIENT].words, self.name, sums)
        return seen.gradient_svd(rank)

    def sums_dtype(self, statistic: str) -> torch.dtype:
        """Dtype of the sums of a statistic."""
        return self._statistics().sums[statistic].dtype

    def _statistics(self) -> LayerStatistics:
        assert self.seen is not None  # `problems` has checked it
        return self.seen

    @property
    def input_key(self) -> Hashable:
        """The same for layers that read the same tensor."""
        return self.name if self.seen is None else id(self.seen.input)

    def has(self, statistic: str, *, exact: bool) -> bool:
        """Whether a statistic was collected."""
        form = None if self.seen is None else self.seen.form(statistic)
        return form == "exact" or (form is not None and not exact)

    def why_unusable(self, wants: Iterable[str]) -> str | None:
        """Why its statistics say nothing, or `None`."""
        sums = {} if self.seen is None else {name: self.seen.sums[name] for name in wants if name in self.seen.sums}
        if INPUT_SECOND in sums and sums[INPUT_SECOND].tokens <= 0:
            return "it saw no token in the collection pass"
        if FISHER in sums and sums[FISHER].tokens <= 0:
            return "it counted no row in the backward pass: there was none, or all were masked"
        zero = (part for part in sums.values() if part.needs_backward and part.is_zero)
        return next((f"its {part.words} is zero: the loss of this data does not depend on it" for part in zero), None)


def stock_start(layer: LayerProblem, why: str | None) -> LayerFactors:
    """LoRA's own start, for a layer that a method cannot start: A uniform in `1 / sqrt(n)`, B zero."""
    (m, n), device = layer.shape, layer.device
    generator = torch.Generator().manual_seed(stream_of(layer.name))
    a = (2 * torch.rand(layer.rank, n, generator=generator) - 1) / math.sqrt(n)
    factors = as_factors(a.to(device), torch.zeros(m, layer.rank, device=device))
    return LayerFactors(factors, solver="stock", notes=(f"stock start: {why}",))


def problems(
    statistics: Mapping[str, LayerStatistics],
    ranks: Mapping[str, int],
    wants: Mapping[str, bool],
    base: Mapping[str, BaseLayer] | None = None,
) -> dict[str, LayerProblem]:
    """The layers in `ranks`, checked for the statistics that are read."""
    seen, bases = statistics if wants else {}, base or {}
    layers = {name: LayerProblem(name, rank, seen, bases.get(name)) for name, rank in ranks.items()}
    for statistic, exact in wants.items():
        missing = [name for name, layer in layers.items() if not layer.has(statistic, exact=exact)]
        if missing:
            words = next(iter(Accumulator.statistics[statistic].values())).words
            what = f"exact {words}" if exact else words
            raise ValueError(
                f"statistics hold no {what} of layer {', '.join(missing)}: collect with the method, or with "
                f"wants={{{statistic!r}: {exact}}}"
            )
    if GRADIENT in wants and any(layer.items <= 0 for layer in layers.values()):
        raise ValueError("statistics hold no loss: there was no backward pass")
    check_ranks(ranks, {name: min(layer.shape) for name, layer in layers.items()})
    return layers
