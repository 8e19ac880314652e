"""Several processes: sums are added up, decompositions shared out, factors broadcast. Plain torch.distributed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from lora_kernels.ops._checks import check_type
from lora_kernels.statistics import storage
from lora_kernels.statistics.moments import pack_lower, packed_size, unpack_lower_
from lora_kernels.statistics.storage import Held, Progress

Key = TypeVar("Key", bound=Hashable)
Groups = list[list[str]] | None
_BUCKET = 64 * 2**20
IDLE, READY, FAILED = range(3)


def world_size() -> int:
    """Number of processes of the default group; 1 without one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without a group."""
    return distributed.get_rank() if world_size() > 1 else 0


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel (whose own forward only serves training)."""
    check_type("model", model, nn.Module, "a torch.nn.Module")
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def raise_together(error: BaseException | None) -> None:
    """Let a failure on one process be a failure on all, instead of a wait without end.

    Args:
        error: what went wrong here, or `None`.

    Raises:
        BaseException: this process's own error.
        RuntimeError: if only others failed.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return
    messages = _gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"process {number}: {message}" for number, message in enumerate(messages) if message is not None]
    if failed:
        raise RuntimeError(f"the collection failed elsewhere; {'; '.join(failed)}")


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
    for per_rank in _gather(described):
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
    everyone: list[Progress] = _gather(progress)
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


def owners(weights: Sequence[float], processes: int) -> list[int]:
    """Who computes what: the heaviest first, each to the process that has the least to do so far.

    Args:
        weights: of every piece of work.
        processes: how many share it.

    Returns:
        The process of every piece.
    """
    loads = [0.0] * processes
    found = [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        found[index] = loads.index(min(loads))
        loads[found[index]] += weights[index]
    return found


def share_out(
    keys: Iterable[Key],
    compute: Callable[[Key], Any],
    device: torch.device,
    weigh: Callable[[Key], float] | None = None,
) -> dict[Key, Any]:
    """Compute a value per key, the keys shared out over the processes; every process gets all values, the same bits.

    Args:
        keys: the same on every process, in the same order.
        compute: called for this process's keys; returns anything that can be pickled.
        device: where the tensors of values that come from other processes are to live.
        weigh: how long the value of a key takes, in any unit; all the same by default.

    Returns:
        The values by key.
    """
    ordered = list(keys)
    if world_size() == 1:
        return {key: compute(key) for key in ordered}
    found: dict[Key, Any] = {}
    error: BaseException | None = None
    try:
        who = owners([1.0 if weigh is None else weigh(key) for key in ordered], world_size())
        mine = {key: compute(key) for key, owner in zip(ordered, who, strict=True) if owner == rank()}
    except Exception as caught:
        mine, error = {}, caught
    raise_together(error)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    for part in _gather(buffer.getvalue()):
        # Also this process's own values make the trip, so that all hold the same. They are pickles of this very run.
        found.update(torch.load(io.BytesIO(part), map_location=device, weights_only=False))
    return {key: found[key] for key in ordered}


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
    everyone = _gather((budget, groups))
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
    owners = _gather(have)
    if True not in owners:
        return None
    source = owners.index(True)
    values = [batch if rank() == source else None]
    distributed.broadcast_object_list(values, src=source)
    return batch if have else values[0]
