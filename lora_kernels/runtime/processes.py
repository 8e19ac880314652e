"""Sharing work among processes, where a failure on one is a failure on all. Plain torch.distributed."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from lora_kernels._checks import check_type, repr_short

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


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


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_together(error: BaseException | None) -> None:
    """Raise this process's error, or a RuntimeError with those of other processes, so that none waits forever."""
    if world_size() == 1:
        if error is not None:
            raise error
        return
    messages = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"process {number}: {message}" for number, message in enumerate(messages) if message is not None]
    if failed:
        raise RuntimeError(f"another process failed: {'; '.join(failed)}")


def together(step: Callable[[], Result]) -> Result:
    """The result of a step that all processes take; a failure on one process fails all of them."""
    error: BaseException | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    raise_together(error)
    return result


def check_same(**arguments: Any) -> None:
    """Refuse, on every process, arguments that differ between processes."""
    if world_size() == 1:
        return
    everyone = gather(arguments)
    for number, other in enumerate(everyone):
        names = [name for name in arguments if other[name] != everyone[0][name]]
        if names:
            name = names[0]
            raise ValueError(
                f"{name} must be the same on all processes, but is {repr_short(other[name])} on process {number} and "
                f"{repr_short(everyone[0][name])} on process 0"
            )


def owners(weights: Sequence[float], processes: int) -> list[int]:
    """The process of every task, given the tasks' weights: the heaviest first, to the process with the least load."""
    loads = [0.0] * processes
    assigned = [0] * len(weights)
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        assigned[index] = loads.index(min(loads))
        loads[assigned[index]] += weights[index]
    return assigned


def share_out(
    keys: Iterable[Key],
    compute: Callable[[Key], Any],
    device: torch.device,
    weigh: Callable[[Key], float] | None = None,
) -> dict[Key, Any]:
    """The value of every key, computed by one process and bit for bit the same on all."""
    # Keys come in the same order on every process; `device` is that of tensors in the values; `weigh` says how long a
    # key takes, in any unit.
    ordered = list(keys)
    if world_size() == 1:
        return {key: compute(key) for key in ordered}

    def mine() -> dict[Key, Any]:
        assigned = owners([1.0 if weigh is None else weigh(key) for key in ordered], world_size())
        return {key: compute(key) for key, owner in zip(ordered, assigned, strict=True) if owner == rank()}

    values: dict[Key, Any] = {}
    buffer = io.BytesIO()
    torch.save(together(mine), buffer)
    for part in gather(buffer.getvalue()):
        # This process's own values too, so that all processes hold the same. The pickles are of this run.
        values.update(torch.load(io.BytesIO(part), map_location=device, weights_only=False))
    return {key: values[key] for key in ordered}
