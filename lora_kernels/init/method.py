"""What every method is: a frozen dataclass that turns statistics into factors, known by its name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from typing_extensions import Self

from lora_kernels._checks import check_choice, check_type
from lora_kernels.init.problem import (
    BaseLayer,
    LayerFactors,
    LayerProblem,
    batch_size,
    problems,
    solve_layers,
    stock_start,
)
from lora_kernels.init.ranks import RankRule
from lora_kernels.statistics.options import Wants
from lora_kernels.statistics.store import LayerStatistics, Statistics
from lora_kernels.statistics.sums import Accumulator

# The methods by name: every subclass of `InitMethod` that has one.
METHODS: dict[str, type[InitMethod]] = {}


@dataclass(frozen=True)
class InitMethod(ABC):
    """A frozen config that turns statistics into factors; a subclass with a `name` is registered in `METHODS`.

    Attributes:
        name: as in `initialize(method=...)`.
        full_rate: whether its authors train at learning rates of full fine-tuning.
        offsets_base: whether the base has to cancel `s B A` of the start for the model to keep its function.
        moves_function: whether the start is away from zero and stays in the model's function.
        own_score: the score by which its authors redistribute ranks, if they do.
    """

    name: ClassVar[str]
    full_rate: ClassVar[bool] = False
    offsets_base: ClassVar[bool] = False
    moves_function: ClassVar[bool] = False
    own_score: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        """Register the method; a ValueError if another class has its name."""
        if "name" in cls.__dict__:
            other = METHODS.setdefault(cls.name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"name of {cls.__qualname__} is {cls.name!r}, which {other.__qualname__} has")
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
    def redistribution(self) -> RankRule | None:
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
        """The factors A `(r, n)` and B `(m, r)` of every layer.

        A layer that its statistics say nothing of (no token, a zero gradient) gets LoRA's stock start, with a note.

        Args:
            statistics: of all layers named in `ranks`; gradients in a plain mapping are of the mean loss.
            ranks: the rank per layer; EVA with `rho` takes their sum for its budget.
            base: weight and scaling per layer, for methods that start from them.

        Raises:
            ValueError: if statistics or base layers are missing or not finite, or ranks are outside [1, min(m, n)].
        """
        layers = problems(statistics, ranks, self.wants, base)
        reasons = {name: layer.why_unusable(self.wants) for name, layer in layers.items()}
        usable = {name: layer for name, layer in layers.items() if reasons[name] is None}
        answers = self.solve_all(usable) if usable else {}
        return {name: answers[name] if name in usable else stock_start(layers[name], reasons[name]) for name in layers}

    @abstractmethod
    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of layers that have what is wanted."""


@dataclass(frozen=True)
class LayerwiseMethod(InitMethod):
    """A method that solves layers one by one, or in groups."""

    @abstractmethod
    def solve(self, layers: Sequence[LayerProblem]) -> Iterable[LayerFactors]:
        """The factors of the layers of one group, in order."""

    def together(self, layer: LayerProblem) -> Hashable:
        """Layers of one key are solved together; by default a layer alone."""
        return layer.name

    def at_most(self, layer: LayerProblem) -> int | None:
        """How many layers of one key are solved at once, by default as many as a batch holds; all if it is `None`."""
        return batch_size(4 * math.prod(layer.shape), layer.device)

    def work(self, layer: LayerProblem) -> float:  # noqa: ARG002
        """How long a layer takes, in any unit."""
        return 1.0

    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of all layers, group by group."""
        keys = {"together": self.together, "at_most": self.at_most, "work": self.work}
        return solve_layers(layers, self.solve, device=lambda layer: layer.device, **keys)  # type: ignore[arg-type]


@dataclass(frozen=True)
class InputwiseMethod(LayerwiseMethod):
    """A method that factors C, the second moment of an input, once for all layers that read it."""

    def together(self, layer: LayerProblem) -> Hashable:
        """Layers that read the same tensor share C and its factor."""
        return id(layer.seen.input)

    def at_most(self, layer: LayerProblem) -> None:
        """All: C and its factor are needed by each."""

    def work(self, layer: LayerProblem) -> float:
        """Multiplications with C and with a matrix of the weight's shape, per column."""
        m, n = layer.shape
        return n * (n + m)


def resolve_method(method: str | InitMethod) -> InitMethod:
    """The method config for a name, or the config itself.

    Args:
        method: a name in `METHODS`, for that method with its defaults, or a config such as `EVA(rho=1.0)`.

    Raises:
        ValueError: if the name is unknown; the message lists the names.
        TypeError: if it is neither a name nor a config.
    """
    if isinstance(method, str):
        check_choice("method", method, tuple(METHODS))
        return METHODS[method]()
    check_type("method", method, InitMethod, "a name or a method config such as EVA()")
    return method


def named_wants(wants: Wants) -> Wants:
    """What to collect, where it may also be the name of a method: that method, with its defaults."""
    if isinstance(wants, str):
        check_choice("wants", wants, (*METHODS, *Accumulator.statistics))
        return METHODS[wants]() if wants in METHODS else wants
    return wants
