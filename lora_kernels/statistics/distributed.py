"""Statistics of several processes: what they agree on before a pass, and their sums added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from lora_kernels.runtime.processes import gather, rank
from lora_kernels.statistics import storage
from lora_kernels.statistics.moments import pack_lower, packed_size, unpack_lower_
from lora_kernels.statistics.storage import Held, Progress

Groups = list[list[str]] | None
_BUCKET = 64 * 2**20
IDLE, READY, FAILED = range(3)


def agree(held: Sequence[Held], device: torch.device) -> list[Held]:
    """Give every process the same list of sums; what a process never saw starts at zero.

    Args:
        held: the sums of this process.
        device: where sums that another process alone has seen are made.

    Returns:
        Sums in one order on all processes.

    Raises:
        RuntimeError: if processes disagree about which layers read the same tensor.
    """
    described = [(each.sums.kind, tuple(each.layers), each.sums.settings(), str(_dtype(each))) for each in held]
    mine = {(kind, layers): each for (kind, layers, _, _), each in zip(described, held, strict=True)}
    agreed: list[Held] = []
    seen: set[tuple[str, tuple[str, ...]]] = set()
    owner: dict[tuple[str, str], tuple[str, ...]] = {}
    for per_rank in gather(described):
        for kind, layers, settings, dtype in per_rank:
            for layer in layers:
                if owner.setdefault((kind, layer), layers) != layers:
                    raise RuntimeError(
                        f"processes disagree about which layers read the same tensor as {layer}: "
                        f"{owner[(kind, layer)]} and {layers}; pass share_inputs=False"
                    )
            if (kind, layers) in seen:
                continue
            seen.add((kind, layers))
            empty = None
            if (kind, layers) not in mine:
                empty = storage.rebuild(kind, settings, device, getattr(torch, dtype.removeprefix("torch.")))
            agreed.append(mine[(kind, layers)] if empty is None else Held(list(layers), empty))
    return agreed


def _dtype(held: Held) -> torch.dtype:
    return next(value.dtype for name, value in held.sums.tensors().items() if name not in ("count", "calls"))


def all_reduce(held: Sequence[Held], device: torch.device) -> None:
    """Add up sums over all processes, in place.

    Sums travel in flat buckets, one dtype each; of symmetric sums only the lower triangle travels.

    Args:
        held: the same sums in the same order on every process (see `agree`).
        device: where the process group can reduce (NCCL: a GPU; sums of earlier passes wait on the host).
    """
    bucket: list[tuple[torch.Tensor, bool]] = []
    in_flight: list[tuple[Any, torch.Tensor, list[tuple[torch.Tensor, bool]]]] = []

    def land() -> None:
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

    def flush() -> None:
        flat = torch.cat([pack_lower(value) if triangular else value.reshape(-1) for value, triangular in bucket])
        flat = flat.to(device)
        in_flight.append((distributed.all_reduce(flat, async_op=True), flat, list(bucket)))
        bucket.clear()
        if len(in_flight) > 1:  # one bucket travels while the next is packed
            land()

    entries = [(value, name in each.sums.triangular) for each in held for name, value in each.sums.tensors().items()]
    for positions in buckets([(value.dtype, tuple(value.shape)) for value, _ in entries]):
        bucket += [entries[position] for position in positions]
        flush()
    while in_flight:
        land()


def buckets(sums: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[list[int]]:
    """Which sums travel in one message: those of one dtype, equal shapes together, until there are 64 MiB of them.

    Args:
        sums: dtype and shape of each.

    Returns:
        Positions in `sums`, one list per message.
    """
    order = sorted(range(len(sums)), key=lambda position: (str(sums[position][0]), sums[position][1]))
    found: list[list[int]] = []
    used = 0
    for position in order:
        dtype, shape = sums[position]
        if not found or sums[found[-1][-1]][0] != dtype or used > _BUCKET:
            found.append([])
            used = 0
        found[-1].append(position)
        used += math.prod(shape) * dtype.itemsize
    return found


def reduce_progress(progress: Progress) -> Progress:
    """Add up the counts of all processes.

    Args:
        progress: of this process.

    Returns:
        The sum, equal on all processes; notes are united.
    """
    everyone: list[Progress] = gather(progress)
    skipped: dict[str, int] = {}
    notes: dict[str, list[str]] = {}
    for each in everyone:
        for name, count in each.skipped.items():
            skipped[name] = skipped.get(name, 0) + count
        for name, lines in each.notes.items():
            notes.setdefault(name, []).extend(line for line in lines if line not in notes.get(name, []))
    progress.skipped, progress.notes = skipped, notes
    progress.tokens = sum(each.tokens for each in everyone)
    progress.loss_items = sum(each.loss_items for each in everyone)
    progress.samples = sum(each.samples for each in everyone)
    progress.batches = sum(each.batches for each in everyone)
    progress.seconds = max(each.seconds for each in everyone)
    return progress


def step_state(state: int, device: torch.device) -> int:
    """What the processes are about to do, as the largest of their states (one small reduction).

    Args:
        state: of this process: IDLE, READY (it has a batch) or FAILED.
        device: where the process group can reduce.

    Returns:
        IDLE if all are, FAILED if one is, else READY.
    """
    flag = torch.tensor([state], device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return int(flag.item())


def agree_on_plan(budget: int | None, groups: Groups) -> tuple[int | None, Groups]:
    """One basis for the plans of all processes.

    Args:
        budget: bytes per process, or `None`.
        groups: of layers that read the same tensor, or `None` where they could not be found.

    Returns:
        The smallest budget, and the groups of the first process that knows them.
    """
    everyone = gather((budget, groups))
    budgets = [each for each, _ in everyone if each is not None]
    return min(budgets, default=None), next((each for _, each in everyone if each is not None), None)


def first_batch(batch: Any, have: bool) -> Any:
    """A batch for a process that has none of its own, from the lowest process that has one.

    Args:
        batch: this process's batch, or anything.
        have: whether it is one.

    Returns:
        This process's batch, or the other's; `None` if no process has one.
    """
    owners = gather(have)
    if True not in owners:
        return None
    source = owners.index(True)
    values = [batch if rank() == source else None]
    distributed.broadcast_object_list(values, src=source)
    return batch if have else values[0]
