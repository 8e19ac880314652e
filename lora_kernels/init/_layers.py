"""What methods that decompose the base weight or the gradient share: checks, batches of one shape, balanced factors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.runtime.processes import share_out, world_size

# Matrices of one shape are decomposed in batches of at most this many bytes; on a CPU large ones gain nothing from it.
_BATCH_BYTES = {"cpu": 2**22}
_BATCH_BYTES_ELSEWHERE = 2**28


def check_rank(name: str, rank: int, limit: int) -> None:
    """Check that a matrix has the singular triplets that a rank needs.

    Args:
        name: the layer.
        rank: r.
        limit: `min(m, n)`.

    Raises:
        ValueError: if it has not.
    """
    if not 1 <= rank <= limit:
        raise ValueError(f"layer {name} has rank {rank}, but must be between 1 and min(m, n) = {limit}")


def base_layer(base: Mapping[str, BaseLayer] | None, name: str, method: str) -> BaseLayer:
    """What is under the adapter of a layer.

    Args:
        base: as given to the method.
        name: the layer.
        method: the method's name, for the message.

    Returns:
        The base layer.

    Raises:
        ValueError: if it was not given, or its scaling is no positive number.
    """
    if base is None or name not in base:
        raise ValueError(f"{method} starts from the base weight, but base has no layer {name}")
    found = base[name]
    if not (math.isfinite(found.scaling) and found.scaling > 0):
        raise ValueError(f"layer {name} has scaling {found.scaling!r}, but must be positive and finite")
    return found


def finite(what: str, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, if all its entries are numbers.

    Args:
        what: what it is, for the message.
        name: the layer.
        matrix: any tensor.

    Returns:
        The matrix, without its graph.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    matrix = matrix.detach()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"the {what} of layer {name} holds NaN or infinite entries")
    return matrix


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, scaling: float) -> tuple[LoraFactors, tuple[str, ...]]:
    """The factors with `scaling * B A = U diag(S) Vh`, S split evenly.

    Args:
        u: `(m, r)`.
        s: `(r,)`.
        vh: `(r, n)`.
        scaling: s of the adapter.

    Returns:
        Factors in float32, and what is to be said about them.
    """
    root = (s / scaling).sqrt()
    factors = LoraFactors(
        (root.unsqueeze(-1) * vh).to(torch.float32).contiguous(), (u * root).to(torch.float32).contiguous()
    )
    zeros = int((s <= 0).sum())
    if not zeros:
        return factors, ()
    return factors, (f"{zeros} components have singular value zero: their rows of A and B are zero and never learn",)


def by_shape(
    names: Iterable[str],
    matrix: Callable[[str], torch.Tensor],
    ranks: Mapping[str, int],
    solve: Callable[[Sequence[str], torch.Tensor, int], list[LayerFactors]],
    device: Callable[[], torch.device],
    progress: bool,
) -> dict[str, LayerFactors]:
    """Solve layer by layer, matrices of one shape and rank at once; the processes of a distributed run share the work.

    Args:
        names: the layers.
        matrix: loads the matrix of a layer; no more than a few batches are held at a time.
        ranks: by layer.
        solve: names, their matrices `(batch, m, n)` and rank to answers.
        device: where answers from other processes are to live.
        progress: show a bar.

    Returns:
        The answers, in the order of the names.
    """
    ordered = list(names)

    def share(process: int) -> dict[str, LayerFactors]:
        mine = ordered[process :: world_size()]
        waiting: dict[tuple[torch.Size, int, torch.device], dict[str, torch.Tensor]] = defaultdict(dict)
        done: dict[str, LayerFactors] = {}

        with tqdm(total=len(mine), desc="decomposing", unit="layer", disable=not progress, leave=False) as bar:

            def flush(batch: dict[str, torch.Tensor], rank: int) -> None:
                keys = list(batch)
                done.update(zip(keys, solve(keys, torch.stack([batch.pop(key) for key in keys]), rank), strict=True))
                bar.update(len(keys))

            for name in mine:
                loaded = matrix(name)
                key = (loaded.shape, ranks[name], loaded.device)
                waiting[key][name] = loaded
                limit = _BATCH_BYTES.get(loaded.device.type, _BATCH_BYTES_ELSEWHERE)
                if (len(waiting[key]) + 1) * loaded.nbytes > limit:
                    flush(waiting.pop(key), ranks[name])
            for (_, rank, _), batch in waiting.items():
                flush(batch, rank)
        return done

    # One key per process: each batches its own layers.
    where = device() if world_size() > 1 else torch.device("cpu")
    shares = share_out(range(world_size()), share, where)
    merged = {name: answer for part in shares.values() for name, answer in part.items()}
    return {name: merged[name] for name in ordered}
