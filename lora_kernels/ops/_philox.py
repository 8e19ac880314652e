"""Philox 4x32, the one random generator of the project: counter based, so any draw is addressed, never stored.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The state is `(key, counter)`: a 64-bit key and
four 32-bit counter words give four 32-bit words. The convention for matrices of random numbers is

    normal draws    counter = (column // 4, row, stream, step)       word column % 4
    signs           counter = (column // 128, row, stream, step)     word (column % 128) // 32, bit column % 32

so an element depends on its position alone: not on tile shapes, devices or the order of evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The 64-bit product of two 32-bit words does not fit a signed int64: multiply by the two 16-bit halves instead.
    low = word * (multiplier & 0xFFFF)  # < 2^48
    high = word * (multiplier >> 16)  # < 2^48, to be shifted left by 16
    middle = (low >> 16) + (high & 0xFFFFFFFF)  # < 2^33; the rest of `high` belongs to the upper word alone
    upper = (middle >> 16) + ((high >> 32) << 16)
    lower = ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
    return upper & _MASK, lower


def philox4x32(seed: int, counter: Sequence[torch.Tensor], rounds: int = ROUNDS) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words per counter.

    Args:
        seed: the 64-bit key.
        counter: four int64 tensors of one shape, values in [0, 2^32).
        rounds: number of rounds.

    Returns:
        Four int64 tensors of that shape, values in [0, 2^32).

    Raises:
        ValueError: if `counter` does not hold four tensors or `seed` is no 64-bit number.
    """
    if len(counter) != 4:
        raise ValueError(f"counter must hold 4 words, got {len(counter)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, but must be a 64-bit integer")
    c0, c1, c2, c3 = counter
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(rounds):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(word + step) & _MASK for word, step in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def _words(rows: int, groups: int, seed: int, stream: int, step: int) -> torch.Tensor:
    column = torch.arange(groups, dtype=torch.int64).expand(rows, groups)
    row = torch.arange(rows, dtype=torch.int64).unsqueeze(1).expand(rows, groups)
    constant = torch.zeros_like(column)
    words = philox4x32(seed, (column, row, constant + (stream & _MASK), constant + (step & _MASK)))
    return torch.stack(words, dim=-1)  # (rows, groups, 4)


def normal(
    rows: int, columns: int, *, seed: int, stream: int = 0, step: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A matrix of standard normal draws, by Box-Muller on pairs of words.

    Args:
        rows: number of rows.
        columns: number of columns.
        seed: 64-bit key.
        stream: which matrix (a layer, say), 32 bits.
        step: which draw of that matrix, 32 bits.
        dtype: dtype of the result; the arithmetic is float64.

    Returns:
        `(rows, columns)` on the CPU, the same on every machine.
    """
    words = _words(rows, -(-columns // 4), seed, stream, step).to(torch.float64)
    uniform = (words + 0.5) * 2.0**-32  # open interval (0, 1)
    radius = (-2.0 * uniform[..., 0::2].log()).sqrt()
    angle = (2.0 * math.pi) * uniform[..., 1::2]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (rows, groups, 2, 2)
    return pairs.flatten(1)[:, :columns].to(dtype)


def signs(
    rows: int, columns: int, *, seed: int, stream: int = 0, step: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """A matrix of Rademacher draws: each bit of the words is one, 0 for 1 and 1 for -1.

    Args:
        rows: number of rows.
        columns: number of columns.
        seed: 64-bit key.
        stream: which matrix (a layer, say), 32 bits.
        step: which draw of that matrix, 32 bits.
        dtype: dtype of the result.

    Returns:
        `(rows, columns)` of 1 and -1 on the CPU, the same on every machine.
    """
    words = _words(rows, -(-columns // 128), seed, stream, step)
    bits = (words.unsqueeze(-1) >> torch.arange(32)) & 1  # (rows, groups, 4, 32)
    return (1 - 2 * bits).flatten(1)[:, :columns].to(dtype)
