"""The loop over layers: groups of them, shared out over processes, with a progress bar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from lora_kernels.runtime.processes import share_out, world_size
from lora_kernels.runtime.progress import progress_bar

Layer = TypeVar("Layer")
Answer = TypeVar("Answer")

# Matrices of one shape are decomposed in batches of at most this many bytes; on a CPU large ones gain nothing from it.
_BATCH_BYTES = {"cpu": 2**22}
_BATCH_BYTES_ELSEWHERE = 2**28


def batch_size(matrix_bytes: int, device: torch.device) -> int:
    """How many matrices of this size are decomposed at once."""
    return max(1, _BATCH_BYTES.get(device.type, _BATCH_BYTES_ELSEWHERE) // matrix_bytes)


def solve_layers(
    layers: Mapping[str, Layer],
    solve: Callable[[Sequence[Layer]], Iterable[Answer]],
    *,
    device: Callable[[Layer], torch.device],
    title: str = "solving layers",
    unit: str = "layer",
    together: Callable[[Layer], Hashable] | None = None,
    at_most: Callable[[Layer], int | None] = lambda _: None,
    work: Callable[[Layer], float] = lambda _: 1.0,
) -> dict[str, Answer]:
    """The answers for layers, by name: solved group by group with a progress bar; processes share the groups."""
    # Layers with one key of `together` form a group (by default each its own), of which `at_most` so many are solved at
    # once. `device` is where a layer's answer lives, `work` how long it takes, in any unit.
    if not layers:
        return {}
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        groups[name if together is None else together(layer)].append(name)
    pieces: list[list[str]] = []
    for names in groups.values():
        size = len(names)
        limit = at_most(layers[names[0]]) if size > 1 else None
        if limit is not None:  # no larger than what leaves every process a share
            size = max(1, min(limit, -(-size // world_size())))
        pieces += [names[low : low + size] for low in range(0, len(names), size)]
    with progress_bar(len(layers), title, unit) as bar:

        def compute(index: int) -> dict[str, Answer]:
            names = pieces[index]
            answers = dict(zip(names, solve([layers[name] for name in names]), strict=True))
            bar.update(len(names))
            return answers

        def weigh(index: int) -> float:
            return sum(work(layers[name]) for name in pieces[index])

        where = device(next(iter(layers.values()))) if world_size() > 1 else torch.device("cpu")
        shares = share_out(range(len(pieces)), compute, where, weigh)
    merged = {name: answer for part in shares.values() for name, answer in part.items()}
    return {name: merged[name] for name in layers}
