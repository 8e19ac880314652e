"""What can be collected: which statistics a method asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

from lora_kernels._checks import check_choice, check_type, repr_short
from lora_kernels.statistics.sketches import GradientSketch, InputSketch
from lora_kernels.statistics.sums import INPUT_SECOND, Accumulator

STATISTICS = tuple(Accumulator.statistics)
__all__ = ["STATISTICS", "GradientSketch", "InputSketch", "resolve_wants"]  # the sketches are registered


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
