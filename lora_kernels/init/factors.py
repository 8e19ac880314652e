"""What a method returns, and what every method looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from lora_kernels.statistics.store import Statistics


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
        solver: how they were found.
        notes: facts a user should know, in words.
    """

    factors: LoraFactors
    explained_variance: float
    residual: float
    solver: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseLayer:
    """What a method may need to know of the layer under an adapter.

    Attributes:
        weight: returns W, `(m, n)` float32, dequantized where the base is; called only by methods that need it.
        scaling: s, by which PEFT multiplies `B A`.
        adapter: returns the factors as they are now, or `None`.
    """

    weight: Callable[[], torch.Tensor]
    scaling: float
    adapter: Callable[[], LoraFactors] | None = None


@runtime_checkable
class InitMethod(Protocol):
    """A frozen config that turns statistics into factors."""

    @property
    def name(self) -> str:
        """The method's name, as in `initialize(method=...)`."""

    @property
    def wants(self) -> Mapping[str, bool]:
        """The statistics it reads; True where only the exact sums will do (see `statistics.resolve_wants`)."""

    @property
    def collect_options(self) -> Mapping[str, Any]:
        """Fields of `statistics.CollectOptions` that `initialize` collects with, unless told otherwise."""

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have to serve these ranks well."""

    @property
    def adjust_scaling_factors(self) -> bool:
        """Whether alpha follows a changed rank so that the scaling `s` stays as it was."""

    @property
    def full_rate(self) -> bool:
        """Whether its authors train at learning rates of full fine-tuning."""

    @property
    def offsets_base(self) -> bool:
        """Whether `s B A` of the start has to be taken off the base for the model to keep its function."""

    def factors(
        self,
        statistics: Statistics,
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer in `ranks`, given the rank each layer asked for and what is under its adapter."""
