"""Norms and leading directions of base weights, read in blocks of rows, so that a quantized one is never whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lora_kernels._checks import as_device, check_range, check_tensor, check_type, repr_short
from lora_kernels.linalg.randomized_svd import LinearOperator, RandomizedSVD, randomized_svd

# Yields the rows of a weight in order, in blocks of any height; called once per product.
RowBlocks = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class WeightNorms:
    """Norms of a base weight.

    Attributes:
        spectral: the largest singular value, a lower bound by a Krylov method (to about 1e-4).
        frobenius: the Frobenius norm.
    """

    spectral: float
    frobenius: float


def as_operator(blocks: RowBlocks, shape: tuple[int, int], device: torch.device | str) -> LinearOperator:
    """A weight `(m, n)` that is read in blocks of rows, as a float32 operator; the arguments are checked."""
    if not callable(blocks):
        raise TypeError(f"blocks must be a function that returns blocks of rows, got {type(blocks).__name__}")
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise TypeError(f"shape must be (m, n), got {type(shape).__name__} {repr_short(shape)}")
    for size in shape:
        check_range("shape", size, low=1, integer=True)
    device = as_device("device", device)
    if device.type == "meta":
        raise ValueError(f"device is {device}, but the blocks must hold numbers")

    def matmul(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.to(torch.float32) @ x for block in blocks()], dim=-2)

    def rmatmul(y: torch.Tensor) -> torch.Tensor:
        total, low = y.new_zeros(shape[1], y.shape[-1]), 0
        for block in blocks():
            total += block.to(torch.float32).mT @ y[low : low + block.shape[0]]
            low += block.shape[0]
        return total

    return LinearOperator(tuple(shape), matmul, rmatmul, torch.float32, device)


def weight_norms(blocks: RowBlocks, shape: tuple[int, int], device: torch.device | str = "cpu") -> WeightNorms:
    """Spectral and Frobenius norm of a weight.

    Args:
        blocks: a function that yields the rows in blocks.
        shape: (m, n).
        device: of the blocks.

    Returns:
        The norms; NaN if the weight holds NaN or infinite entries.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `shape` is not a shape, or the device does not exist.
    """
    operator = as_operator(blocks, shape, device)
    frobenius = math.sqrt(sum(float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2 for block in blocks()))
    if frobenius == 0.0 or not math.isfinite(frobenius):
        return WeightNorms(0.0, 0.0) if frobenius == 0.0 else WeightNorms(math.nan, math.nan)
    leading = randomized_svd(operator, 1, n_iter=3, probes=0)
    return WeightNorms(float(leading.S[0]), frobenius)


def leading_directions(
    blocks: RowBlocks, shape: tuple[int, int], count: int, device: torch.device | str = "cpu"
) -> RandomizedSVD:
    """The leading singular triplets of a weight, float32.

    Args:
        blocks: a function that yields the rows in blocks.
        shape: (m, n).
        count: number of triplets, cut to min(m, n).
        device: of the blocks.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if `shape` is not a shape, the device does not exist, or the count is not positive.
    """
    operator = as_operator(blocks, shape, device)
    check_range("count", count, low=1, integer=True)
    return randomized_svd(operator, min(count, *shape), probes=0)


@dataclass(frozen=True)
class Overlap:
    """How much of an update's leading singular directions lies in the leading directions of the weight.

    A direction of the update that is nearly orthogonal to them, and as large, is new to the model: an intruder
    dimension (arXiv 2410.21228).

    Attributes:
        left: per direction, `|P u|` with P the projection onto the weight's leading left directions, in [0, 1].
        right: the same for the right directions.
        chance: the expected `left` of a random direction, `sqrt(count / m)`.
        intruders: number of directions with a singular value above the smallest of the weight's leading ones, and both
            `left` and `right` below `INTRUDER`.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    chance: float
    intruders: int


# Cosine below which a direction is not one of the weight's (the middle of the range studied in arXiv 2410.21228).
INTRUDER = 0.5


def overlap(update: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: RandomizedSVD) -> Overlap:
    """Compare the leading directions of an update with those of its weight.

    Args:
        update: U `(m, k)`, S `(k,)` and V `(n, k)` of the update.
        weight: leading triplets of the weight.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if shapes do not match.
    """
    if not isinstance(update, (tuple, list)) or len(update) != 3:
        raise TypeError(f"update must be three tensors, got {type(update).__name__} {repr_short(update)}")
    check_type("weight", weight, RandomizedSVD, "a RandomizedSVD")
    u, s, v = update
    check_tensor("update[0]", u, shape=(weight.U.shape[-2], None), numbers=True)
    check_tensor("update[1]", s, shape=(u.shape[1],), numbers=True)
    check_tensor("update[2]", v, shape=(weight.Vh.shape[-1], u.shape[1]), numbers=True)
    left = torch.linalg.vector_norm(weight.U.mT.to(u) @ u, dim=0).clamp_max(1.0)
    right = torch.linalg.vector_norm(weight.Vh.to(v) @ v, dim=0).clamp_max(1.0)
    smallest = weight.S[-1].to(s)
    intruders = int(((s > smallest) & (left < INTRUDER) & (right < INTRUDER)).sum())
    chance = math.sqrt(weight.S.shape[-1] / u.shape[0])
    return Overlap(tuple(left.tolist()), tuple(right.tolist()), chance, intruders)
