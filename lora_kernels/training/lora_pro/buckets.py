"""Pairs of one shape, side by side, and the seeds of their moments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from lora_kernels.statistics.distributed import world_size
from lora_kernels.training.lora_pro.adjustment import Factors, Spectra, decompose

_WORD = 2**64 - 1


@dataclass(frozen=True)
class Bucket:
    """L pairs of one shape, dtype, device and layout, with their gradients of this step.

    Attributes:
        indices: of the pairs.
        scaling: s of each.
        a: the parameters A.
        b: the parameters B.
        factors: their values.
        grad_a: `(L, r, n)`, whole.
        grad_b: `(L, m', r)`, the rows of this process.
    """

    indices: list[int]
    scaling: list[float]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    factors: Factors
    grad_a: torch.Tensor
    grad_b: torch.Tensor


def spectra(buckets: Sequence[Bucket]) -> list[Spectra]:
    """Eigenpairs of all Grams: one call per order and device.

    Args:
        buckets: of this step.

    Returns:
        Spectra in the same order.

    Raises:
        ValueError: if factors are not finite, naming the pair.
    """
    grams = [each.factors.grams() for each in buckets]
    by_order: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for number, each in enumerate(grams):
        by_order[each.shape[-1], each.device].append(number)
    found: dict[int, Spectra] = {}
    for numbers in by_order.values():
        try:
            results = decompose([grams[number] for number in numbers])
        except ValueError as error:
            for number in numbers:
                for index, pair in zip(buckets[number].indices, grams[number].unbind(1), strict=True):
                    if not bool(pair.isfinite().all()):
                        raise ValueError(
                            f"pair {index} has factors with NaN or infinite entries (from a gradient that was not "
                            "finite in an earlier step?)"
                        ) from error
            raise
        found.update(zip(numbers, results, strict=True))
    return [found[number] for number in range(len(buckets))]


def draw_seed() -> int:
    """A seed from torch's default generator, rank 0's on all processes."""
    seed = [int(torch.randint(0, 2**62, (), dtype=torch.int64))]
    if world_size() > 1:
        distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def mix(seed: int, pair: int, step: int) -> int:
    """A seed of its own for every pair and step (the finaliser of SplitMix64)."""
    word = (seed + 0x9E3779B97F4A7C15 * ((pair << 32) + step)) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return (word ^ (word >> 31)) >> 1
