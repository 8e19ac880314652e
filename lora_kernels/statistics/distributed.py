"""Statistics of several processes: what they agree on before a pass, and their sums added up."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from lora_kernels.runtime.processes import gather, rank
from lora_kernels.statistics.storage import LayerSums, Progress
from lora_kernels.statistics.sums import Accumulator, pack_lower, packed_size, unpack_lower_

Groups = list[list[str]] | None
_BUCKET = 64 * 2**20
IDLE, READY, FAILED = range(3)


def agree(parts: Sequence[LayerSums], device: torch.device) -> list[LayerSums]:
    """The same list of sums on every process, in one order; what a process never saw starts at zero."""
    # Layers that shared an input on one process but not on another have sums of their own everywhere, as copies.
    described = [(part.sums.kind, part.layers, part.sums.settings(), str(part.sums.dtype)) for part in parts]
    everyone = gather(described)
    # Layers stay together if they are so on every process that has called one of them.
    partners: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    empty: dict[tuple[str, str], tuple[dict[str, Any], str]] = {}
    for per_rank in everyone:
        for kind, layers, settings, dtype in per_rank:
            for layer in layers:
                partners.setdefault((kind, layer), []).append(tuple(layers))
                empty.setdefault((kind, layer), (settings, dtype))
    mine = {(part.sums.kind, layer): part for part in parts for layer in part.layers}
    agreed: dict[tuple[str, tuple[str, ...]], LayerSums] = {}
    for (kind, layer), groups in partners.items():
        together = [name for name in groups[0] if partners[(kind, name)] == groups]
        if together[0] != layer:
            continue
        part = mine.get((kind, layer))
        if part is None:
            settings, dtype = empty[(kind, layer)]
            sums = Accumulator.kinds[kind].empty(settings, device, getattr(torch, dtype.removeprefix("torch.")))
        else:
            sums = part.sums if part.layers[0] == layer else copy.deepcopy(part.sums)
        agreed[(kind, tuple(together))] = LayerSums(together, sums)
    return list(agreed.values())


def all_reduce(parts: Sequence[LayerSums], device: torch.device) -> None:
    """Add up sums over all processes, in place: in flat buckets of one dtype, of symmetric sums the lower triangle."""
    # `parts` are as `agree` returns them; `device` is where the process group can reduce (NCCL: a GPU).
    entries = [(value, name in part.sums.triangular) for part in parts for name, value in part.sums.tensors().items()]
    in_flight: list[tuple[Any, torch.Tensor, list[tuple[torch.Tensor, bool]]]] = []

    def copy_back() -> None:
        work, flat, owners = in_flight.pop(0)
        work.wait()
        offset = 0
        for value, triangular in owners:
            size = packed_size(value.shape[0]) if triangular else value.numel()
            part = flat[offset : offset + size]
            if triangular:
                unpack_lower_(value, part)
            else:
                value.copy_(part.view_as(value))
            offset += size

    for positions in buckets([(value.dtype, tuple(value.shape)) for value, _ in entries]):
        bucket = [entries[position] for position in positions]
        packed = [pack_lower(value) if triangular else value.reshape(-1) for value, triangular in bucket]
        flat = torch.cat(packed).to(device)
        in_flight.append((distributed.all_reduce(flat, async_op=True), flat, bucket))
        if len(in_flight) > 1:  # one bucket travels while the next is packed
            copy_back()
    while in_flight:
        copy_back()


def buckets(sums: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[list[int]]:
    """Positions of the sums that travel in one message: of one dtype, equal shapes together, up to 64 MiB."""
    order = sorted(range(len(sums)), key=lambda position: (str(sums[position][0]), sums[position][1]))
    groups: list[list[int]] = []
    used = 0
    for position in order:
        dtype, shape = sums[position]
        if not groups or sums[groups[-1][-1]][0] != dtype or used > _BUCKET:
            groups.append([])
            used = 0
        groups[-1].append(position)
        used += math.prod(shape) * dtype.itemsize
    return groups


def reduce_progress(progress: Progress) -> Progress:
    """Add up the counts of all processes, in place; notes are united."""
    everyone: list[Progress] = gather(progress)
    skipped: Counter[str] = Counter()
    notes: dict[str, list[str]] = {}
    for other in everyone:
        skipped.update(other.skipped_rows)
        for name, lines in other.notes.items():
            notes.setdefault(name, []).extend(line for line in lines if line not in notes.get(name, []))
    progress.skipped_rows, progress.notes = dict(skipped), notes
    for name in ("tokens", "loss_items", "samples", "batches"):
        setattr(progress, name, sum(getattr(other, name) for other in everyone))
    progress.left_out = sorted({name for other in everyone for name in other.left_out})
    progress.seconds = max(other.seconds for other in everyone)
    return progress


def step_state(state: int, device: torch.device) -> int:
    """IDLE if all processes are, FAILED if one is, else READY (one has a batch); one small reduction."""
    flag = torch.tensor([state], device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return int(flag.item())


def agree_on_plan(budget: int | None, groups: Groups) -> tuple[int | None, Groups]:
    """The smallest budget of all processes, and the groups of the first process that knows them."""
    everyone = gather((budget, groups))
    budgets = [other for other, _ in everyone if other is not None]
    return min(budgets, default=None), next((others for _, others in everyone if others is not None), None)


def first_batch(batch: Any, have: bool) -> Any:
    """This process's batch if it has one (`have`), or that of the lowest process that has; `None` if no process has."""
    owners = gather(have)
    if True not in owners:
        return None
    source = owners.index(True)
    values = [batch if rank() == source else None]
    distributed.broadcast_object_list(values, src=source)
    return batch if have else values[0]
