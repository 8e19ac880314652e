"""EVA: explained variance adaptation (arXiv 2410.07170)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.init.ranks import offers, redistribute
from lora_kernels.linalg import eigh_topk
from lora_kernels.ops._checks import check_range
from lora_kernels.statistics.distributed import share_out, world_size
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.sharing import InputSums
from lora_kernels.statistics.sketches import InputSketch
from lora_kernels.statistics.store import LayerStatistics
from lora_kernels.statistics.wants import METHOD_WANTS

# Covariances decomposed in one batch: bounds the float64 copies to this many bytes.
_BATCH_BYTES = 512 * 2**20
# The sums are float32: residuals below their rounding would be work for nothing.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class _Components:
    """The leading principal components of one input."""

    values: torch.Tensor  # (k,) variances, descending
    vectors: torch.Tensor  # (n, k)
    total: float  # trace of the covariance
    tokens: float
    residual: float
    solver: str

    def ratios(self) -> list[float]:
        """Explained-variance ratios; zeros where the input never varies."""
        if self.total <= 0:
            return [0.0] * self.values.numel()
        return (self.values.clamp_min(0.0) / self.total).tolist()


@dataclass(frozen=True)
class EVA:
    """A = the leading principal components of each layer's inputs, B = 0; ranks follow the explained variance.

    Args:
        rho: a layer's rank may grow to `round(rho * r)`; 1 keeps every rank.
        center: subtract the mean input (as PEFT does); otherwise the raw second moment is decomposed.
        whiten: divide row i of A by the square root of its singular value (that of the centred token matrix).
        min_rank: smallest rank of a layer; with 0 a layer without a winning component loses its adapter.
        max_rank: largest rank of a layer (serving engines allocate for it).
        multiple_of: every rank is a multiple of this.
        adjust_scaling_factors: where a rank changes, alpha follows so that the scaling s stays the same.
        seed: of the random start of the eigensolver.

    Raises:
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "eva"
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["eva"]
    offsets_base: ClassVar[bool] = False
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    rho: float = 2.0
    center: bool = True
    whiten: bool = False
    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    adjust_scaling_factors: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges that need no model."""
        check_range("rho", self.rho, low=1.0)
        check_range("min_rank", self.min_rank, low=0, integer=True)
        check_range("multiple_of", self.multiple_of, low=1, integer=True)
        if self.max_rank is not None:
            check_range("max_rank", self.max_rank, low=max(1, self.min_rank), integer=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the components that the widest layer may offer."""
        return 2 * round(self.rho * max(ranks, default=1))

    def factors(
        self,
        statistics: Mapping[str, LayerStatistics],
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,  # noqa: ARG002  (not needed)
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        Args:
            statistics: of all layers named in `ranks`; each must have been called.
            ranks: the rank each layer asked for; their sum is the budget.
            base: not needed.
            progress: show a progress bar over the decompositions.

        Returns:
            Per layer its factors: `A` `(r, n)` with orthonormal rows (unless whitened), `B` zeros `(m, r)`.

        Raises:
            ValueError: if a rank is outside [1, min(m, n)], a layer was never called or saw no token, or `min_rank`
                cannot be met.
        """
        for name in ranks:
            sums = statistics[name].input
            if sums is None or sums.tokens <= 0:
                raise ValueError(f"layer {name} saw no token in the collection pass")
        limits = {name: min(statistics[name].in_features, statistics[name].out_features) for name in ranks}
        offered = offers(ranks, limits, rho=self.rho, max_rank=self.max_rank)
        components = self._decompose({name: statistics[name] for name in ranks}, offered, progress)
        scores = {name: components[name].ratios()[: offered[name]] for name in ranks}
        if self.rho == 1.0 and self.max_rank is None and self.multiple_of == 1:
            winners = dict(ranks)
        else:
            winners = redistribute(scores, sum(ranks.values()), min_rank=self.min_rank, multiple_of=self.multiple_of)
        return {name: self._layer(components[name], winners[name], statistics[name].out_features) for name in ranks}

    def _decompose(
        self, statistics: Mapping[str, LayerStatistics], offered: Mapping[str, int], progress: bool
    ) -> dict[str, _Components]:
        wanted: dict[str, int] = defaultdict(int)
        sums: dict[str, InputSums] = {}
        first: dict[int, str] = {}  # of the layers that share an input
        for name, layer in statistics.items():
            assert layer.input is not None  # checked by `factors`
            key = first.setdefault(id(layer.input), name)
            sums[key] = layer.input
            wanted[key] = max(wanted[key], offered[name])
        batches = dict(enumerate(_batches(sums, wanted)))
        with tqdm(total=len(sums), desc="decomposing inputs", unit="input", disable=not progress, leave=False) as bar:

            def solve(number: int) -> list[_Components]:
                keys, k = batches[number]
                bar.update(len(keys))
                return self._components([sums[key] for key in keys], k)

            # The processes of a distributed run share the batches out and exchange the results.
            device = next(iter(sums.values())).total.device
            solved = share_out(batches, solve, device)
        found = {
            key: each for number, (keys, _) in batches.items() for key, each in zip(keys, solved[number], strict=True)
        }
        return {name: found[first[id(layer.input)]] for name, layer in statistics.items()}

    def _components(self, sums: Sequence[InputSums], k: int) -> list[_Components]:
        sketches = [each for each in sums if isinstance(each, InputSketch)]
        if sketches:
            return [self._from_sketch(each, k) for each in sketches]
        moments = [each for each in sums if isinstance(each, InputMoments)]
        matrices = torch.stack([each.covariance(center=self.center) for each in moments])
        pairs = eigh_topk(matrices, k, tolerance=_TOLERANCE, seed=self.seed)
        traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
        return [
            _Components(
                pairs.values[index],
                pairs.vectors[index],
                traces[index],
                each.tokens,
                float(pairs.residuals[index]),
                pairs.method,
            )
            for index, each in enumerate(moments)
        ]

    def _from_sketch(self, sketch: InputSketch, k: int) -> _Components:
        pairs, error = sketch.components(k, center=self.center)
        trace = sketch.trace(center=self.center)
        return _Components(pairs.values, pairs.vectors, trace, sketch.tokens, error, "nystrom")

    def _layer(self, components: _Components, rank: int, out_features: int) -> LayerFactors:
        a = components.vectors[:, :rank].mT
        notes = []
        if components.tokens - self.center < rank:
            notes.append(f"{components.tokens:g} tokens cannot determine {rank} directions: the last are arbitrary")
        if components.total <= 0:
            notes.append("the input never varies: all directions are arbitrary")
        if self.whiten:
            # Out of place: layers that share an input share `components.vectors`.
            singular = (components.values[:rank].clamp_min(0.0) * components.tokens).sqrt()
            floor = torch.finfo(torch.float32).eps * singular.max() if rank else singular.new_zeros(())
            a = a / singular.clamp_min(floor.clamp_min(torch.finfo(torch.float32).tiny)).sqrt().unsqueeze(-1)
        factors = LoraFactors(
            a.to(torch.float32).contiguous(),
            torch.zeros(out_features, rank, dtype=torch.float32, device=a.device),
        )
        explained = math.fsum(components.ratios()[:rank]) if components.total > 0 else math.nan
        return LayerFactors(factors, explained, components.residual, components.solver, tuple(notes))


def _batches(sums: Mapping[str, InputSums], wanted: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
    """Inputs of one kind, order and number of components, in batches that bound the memory of their covariances.

    Yields:
        Keys of the inputs, and the number of components.
    """
    groups: dict[tuple[str, int, int, torch.device], list[str]] = defaultdict(list)
    for key, each in sums.items():
        groups[(each.kind, each.features, wanted[key], each.total.device)].append(key)
    for (_kind, order, k, _device), keys in groups.items():
        # No larger than what leaves every process a share.
        size = max(1, min(_BATCH_BYTES // (8 * order * order), -(-len(keys) // world_size())))
        for low in range(0, len(keys), size):
            yield keys[low : low + size], k
