"""Philox 4x32, the one random generator of the project: counter based, so any draw is addressed, never stored.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The state is `(key, counter)`: a 64-bit key and
four 32-bit counter words give four 32-bit words. The convention for matrices of random numbers is

    normal draws    counter = (column // 4, row, stream, step)       word column % 4
    signs           counter = (column // 128, row, stream, step)     word (column % 128) // 32, bit column % 32
    dropout         counter = (column // 8, row, stream, 0)          word (column % 8) // 2, its low 16 bits if the
                    column is even, the high ones if it is odd; 7 rounds (Crush-resistant with a margin of one; ten
                    cost a memory-bound kernel 20 to 30 %)
    rounding        as dropout, but the last word of the counter is the step: 16 bits that decide where bfloat16 is
                    rounded stochastically

so an element depends on its position alone: not on tile shapes, devices or the order of evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels._checks import repr_short

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


def philox4x32(
    seed: int | torch.Tensor, counter: Sequence[torch.Tensor], rounds: int = ROUNDS
) -> tuple[torch.Tensor, ...]:
    """Four random 32-bit words per counter, int64 like its words; a seed that is a tensor is read where it lies."""
    if len(counter) != 4:
        raise ValueError(f"counter must hold 4 words, got {len(counter)}")
    if not isinstance(seed, torch.Tensor) and not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, but must be a 64-bit integer")
    c0, c1, c2, c3 = counter
    key = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(rounds):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(word + step) & _MASK for word, step in zip(key, _WEYL, strict=True)]
    return c0, c1, c2, c3


def words(
    rows: int,
    groups: int,
    *,
    seed: int | torch.Tensor,
    stream: int,
    step: int,
    rounds: int = ROUNDS,
    first_row: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`(rows, groups, 4)`: the words of counters (group, row, stream, step); a tensor as seed must be on `device`."""
    column = torch.arange(groups, dtype=torch.int64, device=device).expand(rows, groups)
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device).unsqueeze(1).expand(rows, groups)
    constant = torch.zeros_like(column)
    counter = (column, row & _MASK, constant + (stream & _MASK), constant + (step & _MASK))
    return torch.stack(philox4x32(seed, counter, rounds), dim=-1)


def keep_threshold(p: float) -> int:
    """Below which 16-bit number an element is dropped: `round(65536 p)`, at most 65535. 0 drops nothing."""
    return min(max(round(p * 65536), 0), 65535)


def keep_factor(threshold: int) -> float:
    """What kept elements are multiplied by: one over the share kept, which is a multiple of 2^-16."""
    return 65536 / (65536 - threshold)


def halves(
    rows: int,
    columns: int,
    *,
    seed: int | torch.Tensor,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`(rows, columns)` int64 in [0, 2^16) by 7 rounds, from `first_row` on; a tensor as seed must be on `device`."""
    groups = -(-columns // 8)
    drawn = words(rows, groups, seed=seed, stream=stream, step=step, rounds=7, first_row=first_row, device=device)
    return torch.stack((drawn & 0xFFFF, drawn >> 16), dim=-1).flatten(1)[:, :columns]


def keep_mask(
    rows: int,
    columns: int,
    *,
    p: float,
    seed: int | torch.Tensor,
    stream: int = 0,
    first_row: int = 0,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Which elements dropout keeps, to be multiplied by `keep_factor`, `(rows, columns)` bool; see `halves`."""
    return halves(rows, columns, seed=seed, stream=stream, first_row=first_row, device=device) >= keep_threshold(p)


def signed64(name: str, seed: object, expected: str = "an int") -> int:
    """A 64-bit integer as a signed one."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be {expected}, got {type(seed).__name__} {repr_short(seed)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{name} is {repr_short(seed)}, but must be a 64-bit integer")
    return seed - 2**64 if seed >= 2**63 else seed


def seed_tensor(name: str, seed: object, device: torch.device) -> torch.Tensor:
    """A seed as the argument of a registered op: `(1,)` int64, from a number on `device`, a tensor where it is."""
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {str(seed.dtype).removeprefix('torch.')}, but must be int64")
        if seed.numel() != 1:
            raise ValueError(f"{name} has {seed.numel()} elements, but must have one")
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"{name} is on {seed.device}, but must be on {device} or on the CPU")
        return seed.reshape(1)
    return torch.full((1,), signed64(name, seed, "an int or a tensor"), dtype=torch.int64, device=device)
