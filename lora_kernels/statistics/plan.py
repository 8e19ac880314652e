"""What a collection will keep, decided before any data is read: exact or sketched, in which pass, at what cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lora_kernels.ops._checks import check_choice, check_range, check_type, shown
from lora_kernels.reports import Printed
from lora_kernels.statistics.sketches import PROBES
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.wants import FISHER, INPUT_SECOND, OF_GRADIENTS, OUTPUT_SECOND, SKETCHABLE, STATISTICS

FORMS = ("auto", "exact", "sketch")
# Rows of the co-sketch of a gradient per column of its sketch (Tropp et al. 2017, "Practical sketching algorithms",
# section 4.5: the reconstruction needs l > k, and about 2 k is the best split of a given memory).
_CO_SIZE = 2
_AUTO_SHARE = 0.5
_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}

Budget = int | float | str | None


@dataclass(frozen=True)
class Entry:
    """One set of sums.

    Attributes:
        statistic: see `wants.STATISTICS`.
        form: `exact` or `sketch`.
        layers: the layers it belongs to: several where they read the same tensor.
        bytes: memory of its sums on each process.
        message: bytes that each process contributes to the reduction over processes (symmetric sums go packed).
        number: the pass over the data that collects it, from 0.
    """

    statistic: str
    form: str
    layers: tuple[str, ...]
    bytes: int
    message: int
    number: int = 0


@dataclass(frozen=True)
class Plan(Printed):
    """The plan of a collection; prints as a table.

    Attributes:
        entries: in the model's order.
        passes: passes over the data.
        budget: bytes of sums that a pass may hold, or `None`.
        world_size: number of processes.
        sketch_size: columns of a sketch.
        shared: whether it is known which layers read the same tensor (otherwise each is counted by itself, which is an
            upper bound).
    """

    entries: tuple[Entry, ...]
    passes: int
    budget: int | None
    world_size: int
    sketch_size: int
    shared: bool

    @property
    def pass_bytes(self) -> tuple[int, ...]:
        """Memory of the sums of each pass, per process."""
        found = Counter({number: 0 for number in range(self.passes)})
        for entry in self.entries:
            found[entry.number] += entry.bytes
        return tuple(found[number] for number in range(self.passes))

    @property
    def total_bytes(self) -> int:
        """Memory of all sums together (what is kept at the end, and the size of a stored file)."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def communication(self) -> int:
        """Bytes that each process sends in a ring all-reduce of all sums: `2 (W - 1) / W` times their size."""
        size = sum(entry.message for entry in self.entries)
        return 2 * (self.world_size - 1) * size // self.world_size

    @property
    def backward(self) -> int | None:
        """The first pass that runs backward too, or `None`."""
        return min((entry.number for entry in self.entries if entry.statistic in OF_GRADIENTS), default=None)

    def form_of(self, layer: str, number: int) -> dict[str, str]:
        """Statistic names and forms of one layer in one pass."""
        return {
            entry.statistic: entry.form for entry in self.entries if entry.number == number and layer in entry.layers
        }

    def to_json(self) -> str:
        """The plan as JSON."""
        sums = {"pass_bytes": self.pass_bytes, "total_bytes": self.total_bytes, "communication": self.communication}
        return json.dumps({**asdict(self), **sums}, indent=1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table with one row per kind of layer, and the totals.

        Yields:
            The table, then lines of text.
        """
        table = Table("layers", "number", "statistic", "form", "bytes each", "bytes", "passes", title="Plan")
        rows: dict[tuple[str, str, str, int], list[Entry]] = {}
        for entry in self.entries:
            names = ", ".join(re.sub(r"\.\d+\.", ".*.", name) for name in entry.layers)
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
        if self.world_size > 1:
            yield f"{self.world_size} processes: each sends {show_bytes(self.communication)} to add up the sums"
        if not self.shared:
            yield "which layers read the same tensor is not known: each is counted by itself (an upper bound)"


def show_bytes(size: float) -> str:
    """A size in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device.

    Args:
        device: a CUDA device, or anything else for the host.

    Returns:
        The device's free memory, or what Linux calls available.

    Raises:
        ValueError: if the host does not tell.
    """
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

    Returns:
        The bytes, or `None`.

    Raises:
        ValueError: if it is none of these.
        TypeError: if it is of another type.
    """
    if budget is None:
        return None
    where = device or torch.device("cpu")
    if isinstance(budget, str):
        if budget == "auto":
            return int(_AUTO_SHARE * free_memory(where))
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


def _sizes(statistic: str, form: str, target: Target, sketch_size: int, width: int) -> tuple[int, int]:
    """Bytes of the sums, and of what is reduced over processes."""
    m, n = target.out_features, target.in_features
    if statistic in (INPUT_SECOND, OUTPUT_SECOND):
        order = n if statistic == INPUT_SECOND else m
        if form == "sketch":
            size = order * (sketch_size + PROBES + 2) * width + 8
            return size, size
        return (order * order + order) * width + 8, (order * (order + 1) // 2 + order) * width + 8
    if statistic == FISHER:
        return m * width + 8, m * width + 8
    size = m * n * width if form == "exact" else (m * (sketch_size + PROBES) + n * co_size(sketch_size)) * width
    return size, size


def co_size(sketch_size: int) -> int:
    """Rows of `Psi G` that go with `sketch_size` columns of `G Omega`."""
    return _CO_SIZE * sketch_size


def _can_sketch(statistic: str, target: Target, sketch_size: int) -> bool:
    """A sketch pays where it is smaller than half of the exact sums."""
    if statistic not in SKETCHABLE:
        return False
    exact = _sizes(statistic, "exact", target, sketch_size, 4)[0]
    return 2 * _sizes(statistic, "sketch", target, sketch_size, 4)[0] < exact


def _check_budget(entries: Sequence[Entry], budget: int | None) -> None:
    largest = max(entries, key=lambda entry: entry.bytes)
    if budget is not None and largest.bytes > budget:
        raise ValueError(
            f"budget is {show_bytes(budget)}, but the {largest.form} {largest.statistic} of {largest.layers[0]} alone "
            f"takes {show_bytes(largest.bytes)}"
        )


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
    """Decide what is exact, what is sketched, and in which pass each layer's turn comes.

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

    Returns:
        The plan.

    Raises:
        TypeError: on an argument of another type.
        ValueError: on a bad argument, or a budget that a single set of sums exceeds.
    """
    check_type("targets", targets, Sequence, "a sequence of Target")
    for target in targets:
        if not all(hasattr(target, each) for each in ("name", "in_features", "out_features")):
            raise TypeError(f"targets must be a sequence of Target, got {shown(target)} in it")
    check_type("wants", wants, Mapping, "a mapping from `resolve_wants`")
    for name in wants:
        check_choice("wants", name, STATISTICS)
    if budget is not None:
        check_range("budget", budget, low=1, integer=True)
    check_choice("dtype", dtype, (torch.float32, torch.float64))
    names = {target.name for target in targets}
    check_type("groups", groups, (tuple, list, type(None)), "lists of names, or None")
    for group in groups or ():
        check_type("groups", group, (tuple, list), "lists of names")
        for name in group:
            if not isinstance(name, str) or name not in names:
                raise ValueError(f"groups has {shown(name)}, but must have names of targets")
    check_choice("form", form, FORMS)
    check_range("sketch_size", sketch_size, low=1, integer=True)
    check_range("world_size", world_size, low=1, integer=True)
    if not targets:
        raise ValueError("targets is empty: there is no layer to plan for")
    width = torch.finfo(dtype).bits // 8
    by_name = {target.name: target for target in targets}
    partition = [list(group) for group in groups] if groups is not None else []
    known = {name for group in partition for name in group}
    partition += [[name] for name in by_name if name not in known]
    order = {name: position for position, name in enumerate(by_name)}
    partition.sort(key=lambda group: order[group[0]])

    def entry(statistic: str, layers: Sequence[str], chosen: str) -> Entry:
        size, message = _sizes(statistic, chosen, by_name[layers[0]], sketch_size, width)
        return Entry(statistic, chosen, tuple(layers), size, message)

    def sketched(exact: Entry) -> Entry | None:
        target = by_name[exact.layers[0]]
        if wants[exact.statistic] or not _can_sketch(exact.statistic, target, sketch_size):
            return None
        return entry(exact.statistic, exact.layers, "sketch")

    planned: list[list[Entry]] = []
    for group in partition:
        owners = [(INPUT_SECOND, group)] if INPUT_SECOND in wants else []
        owners += [(each, [name]) for name in group for each in wants if each != INPUT_SECOND]
        exact = [entry(statistic, layers, "exact") for statistic, layers in owners]
        planned.append([(form == "sketch" and sketched(each)) or each for each in exact])
    if form == "auto" and budget is not None:
        _sketch_until_it_fits(planned, sketched, budget)
    _check_budget([each for group in planned for each in group], budget)
    entries, passes = _assign(planned, budget)
    return Plan(entries, passes, budget, world_size, sketch_size, groups is not None)


def _sketch_until_it_fits(planned: list[list[Entry]], sketched: Callable[[Entry], Entry | None], budget: int) -> None:
    total = sum(each.bytes for group in planned for each in group)
    places = [(group, index) for group in planned for index in range(len(group))]
    for group, index in sorted(places, key=lambda place: -place[0][place[1]].bytes):
        if total <= budget:
            return
        smaller = sketched(group[index])
        if smaller is not None:
            total += smaller.bytes - group[index].bytes
            group[index] = smaller
