"""Pairs of one shape side by side, the memory they stand in, and the seeds of their moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from lora_kernels.runtime.processes import world_size
from lora_kernels.training.lora_pro.shards import Layout, local
from lora_kernels.training.lora_pro.update import working_dtype

_WORD = 2**64 - 1


class Scratch:
    """Memory for tensors that live within a step.

    On the CPU it is kept from step to step: pages fresh from the system cost more than the arithmetic on them.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._kept: dict[Any, torch.Tensor] = {}

    def take(self, key: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor that holds anything, in the same memory again for the same key."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size, key = math.prod(shape), (key, dtype)
        if key not in self._kept or self._kept[key].numel() < size:
            self._kept[key] = torch.empty(size, dtype=dtype)
        return self._kept[key][:size].view(*shape)


@dataclass
class Bucket:
    """L pairs of one shape, dtype, device and layout, with their gradients."""

    indices: list[int]  # numbers of the pairs
    scaling: list[float]  # s of each
    parameters: list[tuple[torch.Tensor, torch.Tensor]]  # A and B of each
    rows: Layout  # layout of both
    a: torch.Tensor = field(init=False)  # A, `(L, r, n)`, whole
    b: torch.Tensor = field(init=False)  # B, `(L, m', r)`, the rows of this process
    grad_a: torch.Tensor = field(init=False)  # `(L, r, n)`, whole
    grad_b: torch.Tensor = field(init=False)  # `(L, m', r)`
    out_a: torch.Tensor = field(init=False)  # for the adjusted gradients of A
    out_b: torch.Tensor = field(init=False)  # of B
    grams: torch.Tensor = field(init=False)  # `B^T B` and `A A^T`, `(2, L, r, r)` float64
    overlap: torch.Tensor = field(init=False)  # `B^T gB`, `(L, r, r)`
    inner: torch.Tensor = field(init=False)  # `gA A^T`, `(L, r, r)`

    def fill(self, scratch: Scratch, slot: int) -> Bucket:
        """Copy the factors and their gradients side by side, and contract their long axes.

        `slot` is the number of the bucket among those that live at once.
        """
        count, first = len(self.indices), self.parameters[0][0]
        dtype, device = working_dtype(first.dtype), first.device
        stacks = []
        for which in range(2):
            factors = [pair[which] for pair in self.parameters]
            tensors = [local(tensor) for tensor in (*factors, *(tensor.grad for tensor in factors))]  # type: ignore[arg-type]
            stack = scratch.take((slot, "in", which), (2 * count, *tensors[0].shape), dtype, device)
            if all(tensor.dtype == dtype for tensor in tensors):
                torch.stack(tensors, out=stack)
            else:
                torch._foreach_copy_(list(stack.unbind(0)), tensors)
            stacks.append(stack)
        whole = self.rows.whole(stacks[0], first.shape[0])
        (self.a, self.grad_a), (self.b, self.grad_b) = torch.split(whole, count), torch.split(stacks[1], count)
        self.out_a = scratch.take((slot, "out", 0), self.a.shape, dtype, device)
        self.out_b = scratch.take((slot, "out", 1), self.b.shape, dtype, device)
        # Next to the copies, while they are in the processor's cache.
        self.grams = self._grams(scratch)
        self.contract()
        return self

    def _grams(self, scratch: Scratch) -> torch.Tensor:
        grams = []
        for factor in (self.b, self.a):
            wide = factor
            if factor.dtype != torch.float64:
                wide = scratch.take("wide", factor.shape, torch.float64, factor.device).copy_(factor)
            grams.append(torch.bmm(wide.mT, wide) if factor is self.b else torch.bmm(wide, wide.mT))
        self.rows.add_up(grams[0])
        return torch.stack(grams)

    def contract(self) -> None:
        """Contract the long axes of the gradients with the factors: again, whenever the gradients are others."""
        self.overlap = self.rows.add_up(torch.bmm(self.b.mT, self.grad_b))
        self.inner = torch.bmm(self.grad_a, self.a.mT)


def draw_seed() -> int:
    """A seed from torch's default generator, rank 0's on all processes."""
    seed = [int(torch.randint(0, 2**62, (), dtype=torch.int64))]
    if world_size() > 1:
        distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def mix(seed: int, pair: int) -> int:
    """A seed of its own for every pair (the finaliser of SplitMix64), below 2^63; the op adds step, row and column."""
    word = (seed + 0x9E3779B97F4A7C15 * (pair + 1)) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return (word ^ (word >> 31)) >> 1
