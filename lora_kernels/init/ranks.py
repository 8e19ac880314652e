"""Rank redistribution: a fixed budget of components goes to the layers where they score highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_kernels.ops._checks import check_range


def offers(
    ranks: Mapping[str, int], limits: Mapping[str, int], *, rho: float, max_rank: int | None = None
) -> dict[str, int]:
    """How many components each layer may compete with: `round(rho * r)`, within its limits.

    Args:
        ranks: the rank each layer asked for.
        limits: the largest rank each layer can have, `min(m, n)`.
        rho: how far a rank may grow, at least 1.
        max_rank: a cap for all layers.

    Returns:
        The number of components by layer, at least 1.

    Raises:
        ValueError: if rho is below 1, max_rank below 1, or a rank is outside [1, min(m, n)].
    """
    check_range("rho", rho, low=1.0)
    if max_rank is not None:
        check_range("max_rank", max_rank, low=1, integer=True)
    result = {}
    for name, rank in ranks.items():
        if not 1 <= rank <= limits[name]:
            raise ValueError(f"layer {name} has rank {rank}, but must be between 1 and min(m, n) = {limits[name]}")
        result[name] = min(round(rho * rank), limits[name], max_rank or limits[name])
    return result


def redistribute(
    scores: Mapping[str, Sequence[float]],
    budget: int,
    *,
    min_rank: int = 0,
    multiple_of: int = 1,
) -> dict[str, int]:
    """Give a budget of ranks to the components with the highest scores.

    EVA (arXiv 2410.07170, section 3.3) with the explained-variance ratio as score. Components compete in blocks of
    `multiple_of`, scored by their sum; ties go to the earlier layer.

    Args:
        scores: per layer, the scores of its components in descending order; a layer never gets more than these.
        budget: the sum of ranks to give away.
        min_rank: every layer gets at least this rank, before the competition; rounded up to `multiple_of`.
        multiple_of: every rank is a multiple of this (serving engines want 8 or 16).

    Returns:
        The rank of each layer; 0 means no adapter. The sum is the budget, or what the offers or the block size allow.

    Raises:
        ValueError: if an argument is out of range, or the offers or the budget cannot hold `min_rank`.
    """
    check_range("budget", budget, low=0, integer=True)
    check_range("min_rank", min_rank, low=0, integer=True)
    check_range("multiple_of", multiple_of, low=1, integer=True)
    floor = -(-min_rank // multiple_of)
    blocks: list[tuple[float, int, str]] = []
    counts: dict[str, int] = {}
    for order, (name, values) in enumerate(scores.items()):
        available = len(values) // multiple_of
        if available < floor:
            raise ValueError(
                f"layer {name} offers {len(values)} components, too few for min_rank={min_rank} in multiples of "
                f"{multiple_of}; raise rho or max_rank, or lower min_rank"
            )
        counts[name] = floor
        for block in range(floor, available):
            blocks.append((-sum(values[block * multiple_of : (block + 1) * multiple_of]), order, name))
    remaining = budget // multiple_of - floor * len(counts)
    if remaining < 0:
        raise ValueError(f"the budget of {budget} ranks cannot give {len(counts)} layers a rank of {min_rank} each")
    for _, _, name in sorted(blocks, key=lambda each: each[:2])[:remaining]:
        counts[name] += 1
    return {name: count * multiple_of for name, count in counts.items()}
