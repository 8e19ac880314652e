"""What every method is: a frozen dataclass that turns statistics into factors, known by its name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from typing_extensions import Self

from lora_kernels._checks import check_choice
from lora_kernels.init.factors import BaseLayer, LayerFactors, as_factors
from lora_kernels.runtime.processes import share_out, world_size
from lora_kernels.runtime.progress import progress_bar
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.sketches import stream_of
from lora_kernels.statistics.store import LayerStatistics, Statistics
from lora_kernels.statistics.wants import FISHER, GRADIENT, INPUT_SECOND, STATISTICS, Wants

if TYPE_CHECKING:
    from lora_kernels.init.ranks import Redistribution

Layer = TypeVar("Layer")
Answer = TypeVar("Answer")

_WORDS = {INPUT_SECOND: "second moment of the input", FISHER: "Fisher diagonal", GRADIENT: "weight gradient"}
# Matrices of one shape are decomposed in batches of at most this many bytes; on a CPU large ones gain nothing from it.
_BATCH_BYTES = {"cpu": 2**22}
_BATCH_BYTES_ELSEWHERE = 2**28

# The methods by name: every subclass of `InitMethod` that has one.
METHODS: dict[str, type[InitMethod]] = {}


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
        """By what its sum of gradients is divided; those of a plain mapping are means already."""
        return self.collection.loss_items if isinstance(self.collection, Statistics) else 1.0

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
        if self.seen is not None and self.seen.input is not None:
            return self.seen.input.total.device
        if self.seen is not None and self.seen.output is not None:
            return self.seen.output.count.device
        return self.under.weight().device

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

    def second_moment(self) -> torch.Tensor:
        """Mean of `x x^T`, `(n, n)` float64, exact, not centred."""
        assert self.seen is not None and isinstance(self.seen.input, InputMoments)
        return finite("second moment of the input", self.name, self.seen.input.covariance(center=False))

    def input_mean(self) -> torch.Tensor:
        """Mean of x, `(n,)` float64."""
        assert self.seen is not None and self.seen.input is not None
        return self.seen.input.mean()

    def fisher(self) -> torch.Tensor:
        """Mean of the squared output gradients, `(m,)` float64."""
        assert self.seen is not None and self.seen.output is not None and self.seen.output.fisher is not None
        output = self.seen.output
        return finite("Fisher diagonal", self.name, output.fisher.to(torch.float64) / output.tokens)  # type: ignore[union-attr]

    def gradient(self) -> torch.Tensor:
        """Gradient of the mean loss, `(m, n)` in the dtype of the sums, exact."""
        assert self.seen is not None and self.seen.output is not None and self.seen.output.gradient is not None
        return finite("weight gradient", self.name, self.seen.output.gradient) / self.items

    @property
    def input_key(self) -> Hashable:
        """The same for layers that read the same tensor."""
        return self.name if self.seen is None else id(self.seen.input)

    def has(self, statistic: str, *, exact: bool) -> bool:
        """Whether a statistic was collected."""
        if self.seen is None:
            return False
        output = self.seen.output
        if statistic == INPUT_SECOND:
            return isinstance(self.seen.input, InputMoments) or (self.seen.input is not None and not exact)
        if output is None:
            return False
        if statistic == GRADIENT:
            return output.gradient is not None or (output.sketch is not None and not exact)
        return output.fisher is not None

    def why_unusable(self, wants: Iterable[str]) -> str | None:
        """Why its statistics say nothing, or `None`."""
        assert self.seen is not None  # has
        inputs, output = self.seen.input, self.seen.output
        if INPUT_SECOND in wants and inputs is not None and inputs.tokens <= 0:
            return "it saw no token in the collection pass"
        if FISHER in wants and output is not None and output.tokens <= 0:
            return "it counted no row in the backward pass: there was none, or all were masked"
        zero = [name for name, sums in self._sums(wants) if not bool(sums.any())]
        return f"its {zero[0]} is zero: the loss of this data does not depend on it" if zero else None

    def _sums(self, wants: Iterable[str]) -> list[tuple[str, torch.Tensor]]:
        output = None if self.seen is None else self.seen.output
        if output is None:
            return []
        gradient = output.gradient if output.sketch is None else output.sketch.left
        pairs = (FISHER, output.fisher), (GRADIENT, gradient)
        return [(_WORDS[name], sums) for name, sums in pairs if name in wants and sums is not None]


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
            what = ("exact " if exact else "") + _WORDS[statistic]
            raise ValueError(
                f"statistics hold no {what} of layer {', '.join(missing)}: collect with the method, or with "
                f"wants={{{statistic!r}: {exact}}}"
            )
    if GRADIENT in wants and any(layer.items <= 0 for layer in layers.values()):
        raise ValueError("statistics hold no loss: there was no backward pass")
    check_ranks(ranks, {name: min(layer.shape) for name, layer in layers.items()})
    return layers


def batch_size(layer: LayerProblem) -> int:
    """How many float32 matrices of its shape are decomposed at once."""
    m, n = layer.shape
    return max(1, _BATCH_BYTES.get(layer.device.type, _BATCH_BYTES_ELSEWHERE) // (4 * m * n))


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
    """Solve layers, group by group, with a progress bar; the processes of a distributed run share the groups.

    Args:
        layers: by name; the answers come back in their order.
        solve: the layers of a group to their answers.
        device: where the answers for a layer live.
        title: of the progress bar, which counts in `unit`.
        unit: see there.
        together: layers of one key are solved together; by default each alone.
        at_most: how many of a group are solved at once, where the group is a batch and may be split.
        work: of a layer, in any unit.
    """
    if not layers:
        return {}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[name if together is None else together(layer)].append(name)
    pieces: list[list[str]] = []
    for names in groups.values():
        size, limit = len(names), at_most(layers[names[0]])
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


@dataclass(frozen=True)
class InitMethod(ABC):
    """A frozen config that turns statistics into factors; a subclass with a `name` is registered in `METHODS`.

    Attributes:
        name: as in `initialize(method=...)`.
        full_rate: whether its authors train at learning rates of full fine-tuning.
        offsets_base: whether `s B A` of the start has to be taken off the base for the model to keep its function.
        moves_function: whether the start is away from zero and stays in the model's function.
        own_score: the score by which its authors redistribute ranks, if they do.
    """

    name: ClassVar[str]
    full_rate: ClassVar[bool] = False
    offsets_base: ClassVar[bool] = False
    moves_function: ClassVar[bool] = False
    own_score: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        """Register the method."""
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @property
    @abstractmethod
    def wants(self) -> Mapping[str, bool]:
        """The statistics it reads; True where only the exact sums will do (see `statistics.resolve_wants`)."""

    @property
    def reads_base(self) -> bool:
        """Whether it reads the base weights, which must then be readable and not sharded."""
        return False

    @property
    def collect_options(self) -> Mapping[str, Any]:
        """Fields of `statistics.CollectOptions` that `initialize` collects with, unless told otherwise."""
        return MappingProxyType({})

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002
        """Columns that a sketch should have to serve these ranks well; 1 where none is read."""
        return 1

    @property
    def redistribution(self) -> Redistribution | None:
        """How it changes ranks; `None` where it keeps them."""
        return None

    def keeping_ranks(self) -> Self:
        """The same method with the ranks as they are asked for."""
        return self

    def for_samples(self, count: int) -> Self:  # noqa: ARG002
        """The same method for a training set of so many samples, if it depends on that and was not told."""
        return self

    def remarks(self, statistics: Statistics) -> tuple[str, ...]:  # noqa: ARG002
        """What a user should know of the start as a whole."""
        return ()

    def factors(
        self,
        statistics: Mapping[str, LayerStatistics],
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        A layer that its statistics say nothing of (no token, a zero gradient) gets LoRA's stock start, with a note.

        Args:
            statistics: of all layers named in `ranks`. Gradients are divided by `Statistics.loss_items`; those of a
                plain mapping, which has no such count, are taken to be of the mean loss already.
            ranks: the rank of each layer; EVA with `rho` takes their sum for its budget.
            base: weight and scaling of each layer, for methods that start from them.

        Returns:
            Per layer its factors: A `(r, n)`, B `(m, r)`.

        Raises:
            ValueError: if statistics or base layers are missing or not finite, or ranks are outside [1, min(m, n)].
        """
        layers = problems(statistics, ranks, self.wants, base)
        reasons = {name: layer.why_unusable(self.wants) for name, layer in layers.items()} if self.wants else {}
        usable = {name: layer for name, layer in layers.items() if reasons.get(name) is None}
        answers = self.solve_all(usable) if usable else {}
        return {name: answers[name] if name in usable else stock_start(layers[name], reasons[name]) for name in layers}

    @abstractmethod
    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of layers that have what is wanted."""


@dataclass(frozen=True)
class LayerwiseMethod(InitMethod):
    """A method that solves layers apart from each other, or in groups."""

    @abstractmethod
    def solve(self, layers: Sequence[LayerProblem]) -> Iterable[LayerFactors]:
        """The factors of the layers of one group, in order."""

    def together(self, layer: LayerProblem) -> Hashable:
        """Layers of one key are solved together; by default each alone."""
        return layer.name

    def at_most(self, layer: LayerProblem) -> int | None:  # noqa: ARG002
        """How many layers of one key are solved at once; all where it is `None`."""
        return None

    def work(self, layer: LayerProblem) -> float:  # noqa: ARG002
        """How long a layer takes, in any unit."""
        return 1.0

    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of all layers, group by group."""
        keys = {"together": self.together, "at_most": self.at_most, "work": self.work}
        return solve_layers(layers, self.solve, device=lambda layer: layer.device, **keys)  # type: ignore[arg-type]


def resolve_method(method: str | InitMethod) -> InitMethod:
    """The method config for a name, or the config itself.

    Args:
        method: a name in `METHODS`, for that method with its defaults, or a config such as `EVA(rho=1.0)`.

    Returns:
        The config.

    Raises:
        ValueError: if the name is unknown; the message lists the names.
        TypeError: if it is neither a name nor a config.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, but must be one of {', '.join(map(repr, METHODS))}, or a config")
        return METHODS[method]()
    if not isinstance(method, InitMethod):
        raise TypeError(f"method must be a name or a method config such as EVA(), got {type(method).__name__}")
    return method


def named_wants(wants: Wants) -> Wants:
    """What to collect, where it may also be the name of a method: that method, with its defaults."""
    if isinstance(wants, str):
        check_choice("wants", wants, (*METHODS, *STATISTICS))
        return METHODS[wants]() if wants in METHODS else wants
    return wants
