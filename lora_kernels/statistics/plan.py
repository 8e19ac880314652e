"""What a collection will keep, decided before any data is read: exact or sketched, in which pass."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console, ConsoleOptions, RenderResult

from lora_kernels._checks import check_choice, check_range, check_type, repr_short
from lora_kernels.reports import Report, Table, short_name
from lora_kernels.statistics.distributed import buckets
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.sums import Accumulator, needs_backward, new_sums, packed_size

FORMS = ("auto", "exact", "sketch")
# Of the free memory, what `auto` takes.
AUTO_SHARE = 0.5
_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}

Budget = int | float | str | None


def show_bytes(size: float) -> str:
    """A size in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, or what Linux calls available on the host; a ValueError if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise ValueError("the free memory of this system is not known: give the budget in bytes") from None


def parse_budget(budget: Budget, device: torch.device | None = None) -> int | None:
    """A memory budget in bytes.

    Args:
        budget: bytes (int), a share of the free memory in (0, 1) (float), text such as `"40GB"` or `"512MiB"`,
            `"auto"` for half of the free memory, or `None` for no limit.
        device: whose free memory is meant; the host's by default.

    Raises:
        ValueError: if it is anything else.
        TypeError: if it is of another type.
    """
    if budget is None:
        return None
    where = device or torch.device("cpu")
    if isinstance(budget, str):
        if budget == "auto":
            return int(AUTO_SHARE * free_memory(where))
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)?\s*", budget, re.IGNORECASE)
        if match is None:
            raise ValueError(f'budget is {budget!r}, but must be bytes, a share, "auto" or a size such as "40GB"')
        number, unit = match.groups()
        return int(float(number) * _UNITS[(unit or "B").upper()])
    if isinstance(budget, float):
        if not 0 < budget < 1:
            raise ValueError(f"budget is {budget!r}: a float is a share of the free memory, between 0 and 1")
        return int(budget * free_memory(where))
    check_range("budget", budget, low=1, integer=True)
    return budget


@dataclass(frozen=True)
class Entry:
    """One set of sums."""

    statistic: str  # see `statistic.STATISTICS`
    form: str  # `exact` or `sketch`
    layers: tuple[str, ...]  # the layers it belongs to: several where they read the same tensor
    bytes: int  # memory of its sums per process
    message: int  # bytes that a process contributes to the reduction over processes (of symmetric sums about half)
    number: int = 0  # the pass over the data that collects it, from 0


@dataclass(frozen=True, kw_only=True)
class Plan(Report):
    """The plan of a collection; prints as a table.

    Attributes:
        entries: in the model's order.
        passes: passes over the data.
        budget: bytes of sums that a pass may hold, or `None`.
        world_size: number of processes.
        sketch_size: columns of a sketch.
        shared: whether it is known which layers read the same tensor (otherwise every layer is counted by itself, an
            upper bound).
        messages: all-reductions that add up the sums of all processes.
    """

    derived: ClassVar[tuple[str, ...]] = ("pass_bytes", "total_bytes", "message_bytes", "communication")

    entries: tuple[Entry, ...]
    passes: int
    budget: int | None
    world_size: int
    sketch_size: int
    shared: bool
    messages: int = 0

    @property
    def pass_bytes(self) -> tuple[int, ...]:
        """Memory of the sums by pass, per process."""
        sizes = [0] * self.passes
        for entry in self.entries:
            sizes[entry.number] += entry.bytes
        return tuple(sizes)

    @property
    def total_bytes(self) -> int:
        """Memory of all sums together (what is kept at the end, and about the size of a stored file)."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def message_bytes(self) -> int:
        """Bytes that a process contributes to the reduction of all sums over processes."""
        return sum(entry.message for entry in self.entries)

    @property
    def communication(self) -> int:
        """Bytes that a process sends in a ring all-reduce of all sums: `2 (W - 1) / W` times their size."""
        return 2 * (self.world_size - 1) * self.message_bytes // self.world_size

    @property
    def backward(self) -> int | None:
        """The first pass that runs backward too, or `None`."""
        return min((entry.number for entry in self.entries if needs_backward([entry.statistic])), default=None)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layers", "number", "statistic", "form", "bytes each", "bytes", "passes", title="Plan")
        rows: dict[tuple[str, str, str, int], list[Entry]] = {}
        for entry in self.entries:
            names = ", ".join(re.sub(r"\.\d+(?=\.|$)", ".*", short_name(name)) for name in entry.layers)
            rows.setdefault((names, entry.statistic, entry.form, entry.bytes), []).append(entry)
        for (names, statistic, form, size), entries in rows.items():
            numbers = sorted({entry.number + 1 for entry in entries})
            span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
            count = str(len(entries))
            table.add_row(names, count, statistic, form, show_bytes(size), show_bytes(size * len(entries)), span)
        yield table
        limit = "no limit" if self.budget is None else f"budget {show_bytes(self.budget)}"
        kind = "forward only" if self.backward is None else "forward and backward"
        yield (
            f"passes over the data: {self.passes} ({kind}); "
            f"largest pass {show_bytes(max(self.pass_bytes, default=0))} per process ({limit}); "
            f"all sums {show_bytes(self.total_bytes)}"
        )
        if sketches := sum(entry.form == "sketch" for entry in self.entries):
            yield f"{sketches:,} of {len(self.entries):,} sums are sketches of {self.sketch_size} columns"
        if self.world_size > 1:
            sent = show_bytes(self.communication)
            yield f"{self.world_size} processes: each sends {sent} in {self.messages} all-reductions to add up the sums"
        if not self.shared:
            yield "which layers read the same tensor is not known: each is counted by itself (an upper bound)"


def _assign(groups: Sequence[Sequence[Entry]], budget: int | None) -> tuple[tuple[Entry, ...], int]:
    """Fill passes in the model's order; a group that does not fit what is left goes to the next pass."""
    if budget is None:
        return tuple(entry for group in groups for entry in group), 1
    placed, number, used = [], 0, 0
    for group in groups:
        whole = sum(entry.bytes for entry in group)
        if used and used + whole > budget:
            number, used = number + 1, 0
        for entry in group:
            if used + entry.bytes > budget:  # the group alone is larger than a pass: it is split
                number, used = number + 1, 0
            placed.append(replace(entry, number=number))
            used += entry.bytes
    return tuple(placed), number + 1


def make_plan(
    targets: Sequence[Target],
    wants: Mapping[str, bool],
    *,
    groups: Sequence[Sequence[str]] | None = None,
    budget: int | None = None,
    form: str = "auto",
    sketch_size: int = 64,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Plan:
    """Decide what is exact, what is sketched, and in which pass a layer's turn comes.

    With `form="auto"` everything is exact if that fits one pass. Otherwise the largest sums that may be sketched (see
    `wants`) and would shrink to less than half are sketched until it does; what then still exceeds the budget is
    postponed to later passes, in the model's order.

    Args:
        targets: the layers.
        wants: from `resolve_wants`.
        groups: names of layers that read the same tensor; `None` if not known.
        budget: bytes of sums that one pass may hold, or `None`.
        form: `auto`, `exact` (as many passes as it takes) or `sketch` (whatever may be sketched is).
        sketch_size: columns of a sketch.
        world_size: number of processes (every one holds all sums).
        dtype: of the sums.

    Raises:
        TypeError: on an argument of another type.
        ValueError: on a bad argument, or a budget that a single set of sums exceeds.
    """
    check_type("targets", targets, Sequence, "a sequence of Target")
    for target in targets:
        if not all(hasattr(target, name) for name in ("name", "in_features", "out_features")):
            raise TypeError(f"targets must be a sequence of Target, got {repr_short(target)} in it")
    check_type("wants", wants, Mapping, "a mapping from `resolve_wants`")
    for name in wants:
        check_choice("wants", name, tuple(Accumulator.statistics))
    check_range("budget", budget, low=1, integer=True, optional=True)
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    by_name = {target.name: target for target in targets}
    check_type("groups", groups, (tuple, list, type(None)), "lists of names, or None")
    for group in groups or ():
        check_type("groups", group, (tuple, list), "lists of names")
        for name in group:
            if not isinstance(name, str) or name not in by_name:
                raise ValueError(f"groups has {repr_short(name)}, but must have names of targets")
    check_choice("form", form, FORMS)
    check_range("sketch_size", sketch_size, low=1, integer=True)
    check_range("world_size", world_size, low=1, integer=True)
    if not targets:
        raise ValueError("targets is empty: there is no layer to plan for")
    partition = [list(group) for group in groups or ()]
    partition += [[name] for name in by_name.keys() - {name for group in partition for name in group}]
    order = {name: position for position, name in enumerate(by_name)}
    partition.sort(key=lambda group: order[group[0]])

    def sums_of(statistic: str, chosen: str, layer: str) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
        """Dtype, shape, and whether the lower triangle stands for the tensor."""
        target = by_name[layer]
        sizes = {"out_features": target.out_features, "in_features": target.in_features, "size": sketch_size}
        sums = new_sums(statistic, chosen, sizes, torch.device("meta"), dtype)
        return [(value.dtype, tuple(value.shape), name in sums.triangular) for name, value in sums.tensors().items()]

    def entry(statistic: str, layers: Sequence[str], chosen: str) -> Entry:
        held = sent = 0
        for kind, size, triangular in sums_of(statistic, chosen, layers[0]):
            held += math.prod(size) * kind.itemsize
            sent += (packed_size(size[0]) if triangular else math.prod(size)) * kind.itemsize
        return Entry(statistic, chosen, tuple(layers), held, sent)

    def sketched(exact: Entry) -> Entry | None:
        if wants[exact.statistic] or "sketch" not in Accumulator.statistics[exact.statistic]:
            return None
        smaller = entry(exact.statistic, exact.layers, "sketch")
        return smaller if 2 * smaller.bytes < exact.bytes else None  # otherwise it does not pay

    planned: list[list[Entry]] = []
    for group in partition:
        backward = needs_backward(wants)
        owners = [(name, group) for name in wants if name not in backward]
        owners += [(name, [layer]) for layer in group for name in backward]
        exact = [entry(statistic, layers, "exact") for statistic, layers in owners]
        planned.append([(form == "sketch" and sketched(part)) or part for part in exact])
    if form == "auto" and budget is not None:
        _sketch_until_it_fits(planned, sketched, budget)
    largest = max((part for group in planned for part in group), key=lambda part: part.bytes)
    if budget is not None and largest.bytes > budget:
        raise ValueError(
            f"budget is {show_bytes(budget)}, but the {largest.form} {largest.statistic} of {largest.layers[0]} alone "
            f"takes {show_bytes(largest.bytes)}"
        )
    entries, passes = _assign(planned, budget)
    sums = [part[:2] for one in entries for part in sums_of(one.statistic, one.form, one.layers[0])]
    return Plan(
        entries=entries,
        passes=passes,
        budget=budget,
        world_size=world_size,
        sketch_size=sketch_size,
        shared=groups is not None,
        messages=len(buckets(sums)) if world_size > 1 else 0,
    )


def _sketch_until_it_fits(planned: list[list[Entry]], sketched: Callable[[Entry], Entry | None], budget: int) -> None:
    total = sum(part.bytes for group in planned for part in group)
    places = [(group, index) for group in planned for index in range(len(group))]
    for group, index in sorted(places, key=lambda place: -place[0][place[1]].bytes):
        if total <= budget:
            return
        smaller = sketched(group[index])
        if smaller is not None:
            total += smaller.bytes - group[index].bytes
            group[index] = smaller
