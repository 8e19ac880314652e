"""What to collect, and every knob of a collection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from typing_extensions import TypedDict

from lora_kernels._checks import check_choice, check_range, check_type, repr_short
from lora_kernels.runtime.loss import REDUCTIONS, Loss, Reduction
from lora_kernels.statistics.masks import Mask, check_mask
from lora_kernels.statistics.plan import FORMS, Budget, Plan, make_plan
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.sums import INPUT_SECOND, Accumulator

Forward = Callable[[nn.Module, Any], Any]
WEIGHTINGS = ("token", "sample")
STATISTICS = tuple(Accumulator.statistics)


@dataclass(frozen=True)
class CollectOptions:
    """How data is read and what is kept of it.

    Attributes:
        mask: which tokens count in second moments and in the Fisher diagonal; see `statistics.token_weights`. The
            weight gradient always counts every row.
        forward: called as `forward(model, batch)`; by default a mapping batch is passed as keywords.
        loss: called as `loss(outputs, batch)`, returns a scalar; by default the loss in the model's output. Only used
            where a statistic needs gradients.
        reduction: what the loss is a mean over; see `statistics.loss_items`.
        weighting: `token`: gradients are those of the sum of all items' losses, so that every token weighs the same.
            `sample`: those of the sum of the samples' mean losses, so that every sample weighs the same (what a loop
            over single samples gives). Neither depends on the batch size.
        max_batches: read at most this many batches (per process).
        max_tokens: stop after the batch that reaches this many counted tokens (per process).
        share_inputs: layers that read the same tensor share one set of sums.
        nonfinite: `raise`: NaN or infinity in an input or gradient is an error; `skip`: such rows are left out, counted
            and reported.
        dtype: of the sums, float32 or float64.
        form: `auto`, `exact` or `sketch`; see `statistics.make_plan`.
        sketch_size: columns of a sketch.
        budget: memory for the sums of one pass: bytes, a share of the free memory, text such as `"40GB"`, `"auto"`
            (half of what is free), or `None` for no limit. What does not fit is sketched or goes to a later pass.
        seed: of the sketches.
        checkpoint: file for partial and final sums; a run with the same arguments goes on from it. With several
            processes each adds its rank to the name.
        checkpoint_every: batches between two writes.
        distributed: add up the sums of all processes of the default process group, if there is one.
        progress: show a progress bar.

    Raises:
        ValueError: if a value is out of range.
        TypeError: if a numeric argument is not a number.
    """

    mask: Mask = "attention"
    forward: Forward | None = None
    loss: Loss | None = None
    reduction: Reduction = "auto"
    weighting: str = "token"
    max_batches: int | None = None
    max_tokens: int | None = None
    share_inputs: bool = True
    nonfinite: str = "raise"
    dtype: torch.dtype = torch.float32
    form: str = "auto"
    sketch_size: int = 64
    budget: Budget = None
    seed: int = 0
    checkpoint: str | Path | None = None
    checkpoint_every: int = 50
    distributed: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_mask(self.mask)
        check_choice("nonfinite", self.nonfinite, ("raise", "skip"))
        check_choice("dtype", self.dtype, (torch.float32, torch.float64))
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("form", self.form, FORMS)
        if not callable(self.reduction):
            check_choice("reduction", self.reduction, REDUCTIONS)
        check_range("sketch_size", self.sketch_size, low=1, integer=True)
        check_range("checkpoint_every", self.checkpoint_every, low=1, integer=True)
        for name in ("max_batches", "max_tokens"):
            check_range(name, getattr(self, name), low=1, integer=True, optional=True)

    def plan(
        self, targets: Sequence[Target], wants: Mapping[str, bool], groups: Any, budget: int | None, world_size: int
    ) -> Plan:
        """`make_plan` with these options."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in ("form", "sketch_size", "dtype")}
        return make_plan(targets, wants, groups=groups, budget=budget, world_size=world_size, **settings)

    def described(self) -> dict[str, Any]:
        """What of this changes the numbers: part of a stored file's fingerprint."""

        def named(value: Any) -> Any:
            return getattr(value, "__qualname__", type(value).__name__) if callable(value) else value

        keys: tuple[str, ...] = ("mask", "forward", "loss", "reduction", "weighting", "max_batches", "max_tokens")
        keys += ("share_inputs", "nonfinite", "sketch_size", "seed")
        return {**{key: named(getattr(self, key)) for key in keys}, "dtype": str(self.dtype)}


class PlanKeywords(TypedDict, total=False):
    """Fields of `CollectOptions` that a plan depends on, as keywords."""

    dtype: torch.dtype
    form: str
    sketch_size: int
    budget: Budget


class CollectKeywords(PlanKeywords, total=False):
    """The fields of `CollectOptions`, as keywords."""

    mask: Mask
    forward: Forward | None
    loss: Loss | None
    reduction: Reduction
    weighting: str
    max_batches: int | None
    max_tokens: int | None
    share_inputs: bool
    nonfinite: str
    seed: int
    checkpoint: str | Path | None
    checkpoint_every: int
    distributed: bool
    progress: bool


def read_options(options: Mapping[str, Any]) -> CollectOptions:
    """The options of a collection, given as keywords; a TypeError if a name is unknown."""
    unknown = sorted(set(options) - {field.name for field in fields(CollectOptions)})
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; options are the fields of statistics.CollectOptions")
    return CollectOptions(**options)


@runtime_checkable
class HasWants(Protocol):
    """Anything with `wants`: a method config."""

    @property
    def wants(self) -> Mapping[str, bool]:
        """Statistic names; True where only the exact sums will do."""


Wants = str | HasWants | Mapping[str, bool] | Iterable[str] | None


def resolve_wants(wants: Wants) -> dict[str, bool]:
    """The statistics to collect.

    Args:
        wants: a method's config, the name of a statistic (`STATISTICS`), several names, a mapping from names to whether
            only the exact sums will do, or `None` for the input second moment.

    Returns:
        Statistic names in the order of `STATISTICS`, with whether they must be exact.

    Raises:
        ValueError: if a name is unknown, or the method needs no data.
        TypeError: if it is nothing of the above.
    """
    known = tuple(Accumulator.statistics)  # of any class, not those here alone
    if wants is None:
        return {INPUT_SECOND: False}
    if isinstance(wants, HasWants):
        exact_by_name = wants.wants
        check_type("wants.wants", exact_by_name, Mapping, "a mapping")
    elif isinstance(wants, Mapping):
        exact_by_name = wants
    elif isinstance(wants, (Sequence, Set, Iterator)):
        names = [wants] if isinstance(wants, str) else list(wants)
        for name in names:
            check_choice("wants", name, known)
        exact_by_name = dict.fromkeys(names, False)
    else:
        raise TypeError(f"wants must be a method, a name, names or a mapping, got {type(wants).__name__}")
    for name in exact_by_name:
        check_choice("wants", name, known)
    if not exact_by_name:
        raise ValueError(
            f"wants is {repr_short(wants)}, which needs no statistics of data: there is nothing to collect"
        )
    return {name: bool(exact_by_name[name]) for name in known if name in exact_by_name}
