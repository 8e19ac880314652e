"""Rank redistribution: a fixed budget goes to the layers whose components, such as those of inputs, score highest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kernels._checks import check_choice, check_range, check_type
from lora_kernels.init.curvature import WANTS, whitened_gradient
from lora_kernels.init.problem import LayerProblem, batch_size, check_ranks, problems, solve_layers
from lora_kernels.linalg import TopEigenpairs, eigh_topk, randomized_svd
from lora_kernels.statistics.sketches import InputSketch
from lora_kernels.statistics.store import LayerStatistics, Statistics
from lora_kernels.statistics.sums import GRADIENT, INPUT_SECOND, InputSums

_DAMPING = 1e-6
_ROUNDS = 4
# The sums are float32: residuals of eigenpairs below their rounding would be work for nothing.
_TOLERANCE = 1e-7

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Components:
    """The leading principal components of one input: variances and directions `(n, k)`."""

    pairs: TopEigenpairs
    total: float  # trace of the covariance
    tokens: float  # rows counted

    def ratios(self) -> list[float]:
        """Explained-variance ratios; zeros where the input never varies."""
        if self.total <= 0:
            return [0.0] * self.pairs.values.numel()
        return (self.pairs.values.clamp_min(0.0) / self.total).tolist()


def input_components(
    statistics: Mapping[str, LayerStatistics], wanted: Mapping[str, int], *, center: bool = True, seed: int = 0
) -> dict[str, Components]:
    """The leading components of the inputs of layers, of the covariance or (`center=False`) of the raw second moment.

    Layers that read the same tensor share them, and may get more than they asked for.
    """
    inputs: dict[int, tuple[InputSums, int]] = {}
    keys: dict[str, int] = {}
    for name, count in wanted.items():
        sums = statistics[name].input
        if sums is None or sums.tokens <= 0:
            raise ValueError(f"layer {name} saw no token in the collection pass")
        keys[name] = id(sums)
        inputs[id(sums)] = sums, max(count, inputs.get(id(sums), (sums, 0))[1])
    first = {key: name for name, key in reversed(keys.items())}  # the same name on every process
    components = solve_layers(
        {first[key]: group for key, group in inputs.items()},
        lambda batch: _solve([sums for sums, _ in batch], batch[0][1], center, seed),
        title="decomposing inputs",
        unit="input",
        device=lambda group: group[0].total.device,
        together=lambda group: (group[0].kind, group[0].features, group[1], group[0].total.device),
        at_most=lambda group: batch_size(8 * group[0].features ** 2, group[0].total.device),  # float64 copies
        work=lambda group: float(group[0].features) ** 2 * group[1],
    )
    return {name: components[first[key]] for name, key in keys.items()}


def _solve(sums: Sequence[InputSums], k: int, center: bool, seed: int) -> Iterator[Components]:
    """Yield the components of inputs of one kind and size."""
    sketches = [part for part in sums if isinstance(part, InputSketch)]
    for sketch in sketches:
        yield Components(sketch.components(k, center=center), sketch.trace(center=center), sketch.tokens)
    if sketches:
        return
    matrices = torch.stack([part.covariance(center=center) for part in sums])
    pairs = eigh_topk(matrices, k, tolerance=_TOLERANCE, seed=seed)
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    for index, part in enumerate(sums):
        own = TopEigenpairs(pairs.values[index], pairs.vectors[index], pairs.residuals[index], pairs.method)
        yield Components(own, traces[index], part.tokens)


def explained_variance(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """Share of a layer's (centred) input variance along its principal components (EVA, arXiv 2410.07170)."""
    components = input_components(statistics, offered, seed=seed)
    return {name: components[name].ratios()[:count] for name, count in offered.items()}


def gradient_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """Squared singular values of the mean loss gradient: what a unit gradient step along a component gains."""

    def energies(layer: LayerProblem) -> torch.Tensor:
        if layer.has(GRADIENT, exact=True):
            return _energies(layer.mean(GRADIENT), layer.rank, seed)
        return layer.gradient_svd(layer.rank).S.square()

    return _score(problems(statistics, offered, {GRADIENT: False}), energies)


def fisher_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """What a natural-gradient step along a component gains, in units of the loss."""
    # Half the squared singular values of the gradient, whitened by the input second moments and the Fisher diagonal.
    # Unlike the gradient energy it does not change when a layer's inputs or outputs are rescaled.

    def energies(layer: LayerProblem) -> torch.Tensor:
        if layer.why_unusable(WANTS) is not None:
            return torch.zeros(layer.rank)
        return _energies(whitened_gradient(layer, _DAMPING), layer.rank, seed) / 2

    return _score(problems(statistics, offered, WANTS), energies)


def _energies(matrix: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    return randomized_svd(matrix, count, n_iter=_ROUNDS, probes=0, seed=seed).S.square()


def _score(layers: Mapping[str, LayerProblem], energies: Callable[[LayerProblem], torch.Tensor]) -> Scores:
    def solve(group: Iterable[LayerProblem]) -> Iterable[list[float]]:
        return [energies(layer).tolist() for layer in group]

    return solve_layers(layers, solve, title="scoring layers", device=lambda layer: layer.device)


# By name: the statistics a score reads (True where only the exact sums will do), and its function of statistics, the
# number of components that a layer offers, and a seed.
SCORES: Mapping[str, tuple[Mapping[str, bool], Callable[..., Scores]]] = {
    "explained_variance": ({INPUT_SECOND: False}, explained_variance),
    "gradient_energy": ({GRADIENT: False}, gradient_energy),
    "fisher_energy": (WANTS, fisher_energy),
}


def redistribute(
    scores: Mapping[str, Sequence[float]], budget: int, *, min_rank: int = 0, multiple_of: int = 1
) -> dict[str, int]:
    """Give a budget of ranks to the components with the highest scores.

    EVA (arXiv 2410.07170, section 3.3) with the explained-variance ratio as score. Components compete in blocks of
    `multiple_of`, scored by their sum; ties go to the earlier layer.

    Args:
        scores: per layer, the scores of its components in descending order; a layer never gets more than these.
        budget: the sum of ranks to give away.
        min_rank: every layer gets at least this rank, before the competition; rounded up to `multiple_of`.
        multiple_of: every rank is a multiple of this (serving engines want 8 or 16).

    Returns:
        The rank per layer; 0 means no adapter. The sum is the budget, or what the offers or the block size allow.

    Raises:
        TypeError: if the scores are no mapping to sequences of numbers, or a numeric argument is not a number.
        ValueError: if an argument is out of range, or the offers or the budget cannot hold `min_rank`.
    """
    check_type("scores", scores, Mapping, "a mapping from layers to scores")
    for values in scores.values():
        check_type("scores", values, (tuple, list), "a mapping from layers to sequences of numbers")
        for value in values:
            check_type("scores", value, (int, float), "a mapping from layers to sequences of numbers")
    check_range("budget", budget, low=0, integer=True)
    check_range("min_rank", min_rank, low=0, integer=True)
    check_range("multiple_of", multiple_of, low=1, integer=True)
    floor = -(-min_rank // multiple_of)
    blocks: list[tuple[float, int, str]] = []
    counts: dict[str, int] = {}
    for order, (name, values) in enumerate(scores.items()):
        available = len(values) // multiple_of
        if available < floor:
            raise ValueError(
                f"layer {name} offers {len(values)} components, too few for min_rank={min_rank} in multiples of "
                f"{multiple_of}; raise rho or max_rank, or lower min_rank"
            )
        counts[name] = floor
        for block in range(floor, available):
            blocks.append((-sum(values[block * multiple_of : (block + 1) * multiple_of]), order, name))
    remaining = budget // multiple_of - floor * len(counts)
    if remaining < 0:
        raise ValueError(f"the budget of {budget} ranks cannot give {len(counts)} layers a rank of {min_rank} each")
    for _, _, name in sorted(blocks, key=lambda block: block[:2])[:remaining]:
        counts[name] += 1
    return {name: count * multiple_of for name, count in counts.items()}


@dataclass(frozen=True, kw_only=True)
class RankRule(ABC):
    """How a fixed budget of ranks may go to other layers; `Redistribution` describes the fields."""

    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    adjust_scaling_factors: bool = True
    seed: int = 0

    @property
    @abstractmethod
    def rho(self) -> float:
        """A layer's rank may grow to `round(rho * r)`."""

    def __post_init__(self) -> None:
        check_range("rho", self.rho, low=1.0)
        check_range("min_rank", self.min_rank, low=0, integer=True)
        check_range("multiple_of", self.multiple_of, low=1, integer=True)
        check_range("max_rank", self.max_rank, low=max(1, self.min_rank), integer=True, optional=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the components that the widest layer may offer."""
        return 2 * round(self.rho * max(ranks, default=1))

    def offers(self, ranks: Mapping[str, int], limits: Mapping[str, int]) -> dict[str, int]:
        """How many components a layer may compete with: `round(rho * r)`, within min(m, n) and `max_rank`."""
        check_ranks(ranks, limits)
        most = {name: min(limit, self.max_rank or limit) for name, limit in limits.items()}
        return {name: min(round(self.rho * rank), most[name]) for name, rank in ranks.items()}

    def share(self, scores: Mapping[str, Sequence[float]], ranks: Mapping[str, int]) -> dict[str, int]:
        """The new ranks, 0 where a layer is to have no adapter; the sum of the old ones is the budget."""
        return redistribute(scores, sum(ranks.values()), min_rank=self.min_rank, multiple_of=self.multiple_of)

    def check(self, ranks: Mapping[str, int], limits: Mapping[str, int]) -> None:
        """Refuse ranks outside [1, min(m, n)] and a `min_rank` that no scores could meet, before there are any."""
        self.share({name: [0.0] * count for name, count in self.offers(ranks, limits).items()}, ranks)


@dataclass(frozen=True)
class Redistribution(RankRule):
    """A fixed budget of ranks, the sum of those asked for, goes where components score highest; for any method.

    Args:
        score: `explained_variance` (of the inputs, relative to the layer; as EVA does), `gradient_energy` (squared
            singular values of the weight gradient) or `fisher_energy` (what a natural-gradient step gains along a
            component); the last two compare layers in units of the loss.
        rho: a layer's rank may grow to `round(rho * r)`.
        min_rank: smallest rank of a layer; with 0 a layer without a winning component loses its adapter.
        max_rank: largest rank of a layer (serving engines allocate for it).
        multiple_of: every rank is a multiple of this.
        adjust_scaling_factors: where a rank changes, alpha follows so that the scaling s stays the same.
        seed: of random starts.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range or the score unknown.
    """

    score: str = "explained_variance"
    rho: float = 2.0

    def __post_init__(self) -> None:
        check_choice("score", self.score, tuple(SCORES))
        super().__post_init__()

    @property
    def wants(self) -> Mapping[str, bool]:
        """The statistics it reads; True where only the exact sums will do."""
        return SCORES[self.score][0]

    def assign(self, statistics: Statistics, ranks: Mapping[str, int]) -> dict[str, int]:
        """The new ranks; `ranks` are those asked for."""
        limits = {name: min(statistics[name].in_features, statistics[name].out_features) for name in ranks}
        return self.share(SCORES[self.score][1](statistics, self.offers(ranks, limits), seed=self.seed), ranks)
