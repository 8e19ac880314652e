"""What can be collected: which statistics a method asks for, and the sums of them, exact or sketched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

import torch

from lora_kernels._checks import check_choice, check_type, repr_short
from lora_kernels.statistics.gradients import FISHER, GRADIENT, FisherDiagonal, WeightGradient, add_gradient_and_fisher
from lora_kernels.statistics.moments import INPUT_SECOND, Accumulator, OutputGradients
from lora_kernels.statistics.sketches import GradientSketch, InputSketch

STATISTICS = tuple(Accumulator.statistics)
__all__ = ["STATISTICS", "GradientSketch", "InputSketch", "resolve_wants"]  # the sketches are registered

# Rows of the co-sketch of a gradient per column of its sketch (Tropp et al. 2017, "Practical sketching algorithms",
# section 4.5: the reconstruction needs l > k, and about 2 k is the best split of a given memory).
_CO_SIZE = 2


def new_sums(
    statistic: str,
    form: str,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    sketch_size: int,
    seed: int = 0,
    stream: int = 0,
) -> Accumulator:
    """Zero sums of a layer with a weight of shape `(m, n)`."""
    kind = Accumulator.statistics[statistic][form]  # the plan sketches what can be sketched
    sizes = {"out_features": shape[0], "in_features": shape[1]}
    sketch = {"size": sketch_size, "co_size": _CO_SIZE * sketch_size, "seed": seed, "stream": stream}
    return kind.empty({**sizes, **sketch, "features": sizes[kind.features_of]}, device, dtype)


def shapes(
    statistic: str, form: str, shape: tuple[int, int], dtype: torch.dtype, sketch_size: int
) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
    """Dtype, shape, and whether the lower triangle stands for the tensor, per tensor of `new_sums`."""
    sums = new_sums(statistic, form, shape, torch.device("meta"), dtype, sketch_size=sketch_size)
    return [(value.dtype, tuple(value.shape), name in sums.triangular) for name, value in sums.tensors().items()]


def add_gradients(sums: Mapping[str, Accumulator], call: OutputGradients) -> None:
    """Add the output gradients of one call to the sums of a layer, by statistic."""
    gradient, fisher = sums.get(GRADIENT), sums.get(FISHER)
    both = isinstance(gradient, WeightGradient) and isinstance(fisher, FisherDiagonal)
    if both:
        add_gradient_and_fisher(gradient, fisher, call)  # type: ignore[arg-type]
    for part in sums.values():
        if not (both and part in (gradient, fisher)):
            part.add(call)


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
    if isinstance(wants, str):
        exact_by_name: Mapping[str, bool] = {wants: False}
    elif isinstance(wants, HasWants):
        exact_by_name = wants.wants
        check_type("wants.wants", exact_by_name, Mapping, "a mapping")
    elif isinstance(wants, Mapping):
        exact_by_name = wants
    elif isinstance(wants, (Sequence, Set, Iterator)):
        names = list(wants)
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
