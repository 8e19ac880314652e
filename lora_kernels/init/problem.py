"""One layer as a method gets it to solve (rank, means, what is under the adapter), the answer, the loop over layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from lora_kernels.linalg.randomized_svd import RandomizedSVD
from lora_kernels.runtime.processes import share_out, world_size
from lora_kernels.runtime.progress import progress_bar
from lora_kernels.statistics.sketches import GradientSketch, stream_of
from lora_kernels.statistics.store import LayerStatistics
from lora_kernels.statistics.sums import FISHER, GRADIENT, INPUT_SECOND, Accumulator

Layer = TypeVar("Layer")
Answer = TypeVar("Answer")

# Matrices of one shape are decomposed in batches of at most this many bytes; on a CPU large ones gain nothing from it.
_BATCH_BYTES = {"cpu": 2**22}
_BATCH_BYTES_ELSEWHERE = 2**28


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of an adapter, `W + s B A`.

    Attributes:
        A: `(r, n)` float32.
        B: `(m, r)` float32.
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """Rank: the number of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True)
class LayerFactors:
    """A method's answer for one layer.

    Attributes:
        factors: the factors; rank 0 where the layer is to have no adapter.
        explained_variance: share of the input variance in the span of A's rows, in [0, 1]; NaN if the input never
            varies, or the method does not look at it.
        residual: largest relative residual of the eigenpairs behind A (see `linalg.TopEigenpairs`), or what the
            method says of the error of its singular triplets, relative to the largest singular value.
        solver: the algorithm; `stock` for LoRA's own start, where the method has nothing to start from.
        notes: facts a user should know, in words.
    """

    factors: LoraFactors
    explained_variance: float = math.nan
    residual: float = 0.0
    solver: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseLayer:
    """What a method may need to know of the layer under an adapter."""

    # Returns W, `(m, n)` float32, dequantized where the base is; called only by methods that need it.
    weight: Callable[[], torch.Tensor]
    scaling: float  # s, by which PEFT multiplies `B A`
    adapter: Callable[[], LoraFactors] | None = None  # returns the factors as they are now, or `None`
    shape: tuple[int, int] | None = None  # `(m, n)`; by default that of `weight()`


def as_factors(a: torch.Tensor, b: torch.Tensor) -> LoraFactors:
    """The factors in float32."""
    return LoraFactors(a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous())


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, scaling: float) -> tuple[LoraFactors, tuple[str, ...]]:
    """The factors with `scaling * B A = U diag(S) Vh` (`(m, r)`, `(r,)`, `(r, n)`), S split evenly; and notes."""
    root = (s / scaling).sqrt()
    factors = as_factors(root.unsqueeze(-1) * vh, u * root)
    zeros = int((s <= 0).sum())
    if not zeros:
        return factors, ()
    return factors, (f"{zeros} components have singular value zero: their rows of A and B are zero and never learn",)


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
        must = "layer {} has rank {}, but must be between 1 and min(m, n) = {}"
        raise ValueError("; ".join(must.format(name, ranks[name], limits[name]) for name in bad))


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be solved: its rank, what was seen of it (means over tokens or items), what is under its adapter."""

    name: str
    rank: int
    collection: Mapping[str, LayerStatistics]
    base: BaseLayer | None

    @property
    def seen(self) -> LayerStatistics:
        """What was collected of it; nothing, where the method wants nothing."""
        if self.name in self.collection:
            return self.collection[self.name]
        m, n = self.under.shape or self.under.weight().shape
        return LayerStatistics(name=self.name, in_features=n, out_features=m)

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.seen.out_features, self.seen.in_features

    @property
    def device(self) -> torch.device:
        """Where the sums are, or else the base weight."""
        return next((part.count.device for part in self.seen.sums.values()), None) or self.under.weight().device

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

    def mean(self, statistic: str) -> torch.Tensor:
        """The mean of a statistic (see `LayerStatistics.mean`), with finite entries."""
        return finite(self.seen.sums[statistic].words, self.name, self.seen.mean(statistic))

    def gradient_svd(self, rank: int) -> RandomizedSVD:
        """The leading singular triplets of the sketch of a gradient, in float64."""
        sketch = self.seen.sums[GRADIENT]
        assert isinstance(sketch, GradientSketch)
        for sums in sketch.tensors().values():
            finite(sketch.words, self.name, sums)
        return sketch.svd(rank, scale=1.0 / self.seen.loss_items)

    def has(self, statistic: str, *, exact: bool) -> bool:
        """Whether a statistic was collected."""
        form = self.seen.form(statistic) if self.name in self.collection else None
        return form == "exact" or (form is not None and not exact)

    def why_unusable(self, wants: Iterable[str]) -> str | None:
        """Why its statistics say nothing, or `None`."""
        sums = {name: self.seen.sums[name] for name in wants}
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
    if GRADIENT in wants and any(layer.seen.loss_items <= 0 for layer in layers.values()):
        raise ValueError("statistics hold no loss: there was no backward pass")
    check_ranks(ranks, {name: min(layer.shape) for name, layer in layers.items()})
    return layers


def batch_size(matrix_bytes: int, device: torch.device) -> int:
    """How many matrices of this size are decomposed at once."""
    return max(1, _BATCH_BYTES.get(device.type, _BATCH_BYTES_ELSEWHERE) // matrix_bytes)


def solve_layers(
    layers: Mapping[str, Layer],
    solve: Callable[[Sequence[Layer]], Iterable[Answer]],
    *,
    device: Callable[[Layer], torch.device],
    title: str = "solving layers",
    unit: str = "layer",
    together: Callable[[Layer], Hashable] | None = None,
    at_most: Callable[[Layer], int | None] = lambda _: None,
    work: Callable[[Layer], float] = lambda _: 1.0,
) -> dict[str, Answer]:
    """The answers for layers, by name: solved group by group with a progress bar; processes share the groups."""
    # Layers with one key of `together` form a group (by default each its own), of which `at_most` so many are solved at
    # once. `device` is where a layer's answer lives, `work` how long it takes, in any unit.
    if not layers:
        return {}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[name if together is None else together(layer)].append(name)
    pieces: list[list[str]] = []
    for names in groups.values():
        size = len(names)
        limit = at_most(layers[names[0]]) if size > 1 else None
        if limit is not None:  # no larger than what leaves every process a share
            size = max(1, min(limit, -(-size // world_size())))
        pieces += [names[low : low + size] for low in range(0, len(names), size)]
    with progress_bar(len(layers), title, unit) as bar:

        def compute(index: int) -> dict[str, Answer]:
            names = pieces[index]
            answers = dict(zip(names, solve([layers[name] for name in names]), strict=True))
            bar.update(len(names))
            return answers

        def weigh(index: int) -> float:
            return sum(work(layers[name]) for name in pieces[index])

        where = device(next(iter(layers.values()))) if world_size() > 1 else torch.device("cpu")
        shares = share_out(range(len(pieces)), compute, where, weigh)
    merged = {name: answer for part in shares.values() for name, answer in part.items()}
    return {name: merged[name] for name in layers}
