"""Pairs of one shape stacked for batched products, and the rows of their parameters that this process holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

from lora_kernels.adapters.experts import join_experts, split_experts
from lora_kernels.runtime.modes import is_sharded, local
from lora_kernels.runtime.processes import world_size

_WORD = 2**64 - 1


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for a parameter of some dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wrap(part: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A DTensor with a given local part, sharded as a parameter is."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  (needs torch.distributed)

    shape = torch.Size((parameter.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True)
class Layout:
    """How parameters are spread over processes."""

    mesh: Any = None  # of a sharded parameter
    placements: tuple[Any, ...] = ()  # of the parameter on the axes of the mesh

    @classmethod
    def of(cls, parameter: Any) -> Layout:
        """The layout of a parameter that is whole, or sharded by rows along one axis of its mesh."""
        if not is_sharded(parameter):
            return cls()
        split = [placement for placement in parameter.placements if not placement.is_replicate()]
        # (A strided shard, from FSDP2 on top of tensor parallelism, has interleaved rows.)
        if len(split) > 1 or any(type(placement).__name__ != "Shard" or placement.dim != 0 for placement in split):
            raise ValueError(
                f"a factor has the placements {tuple(parameter.placements)}, but LoraPro needs factors that are whole "
                "or sharded along their first axis over one axis of the mesh (as fully_shard does)"
            )
        return cls(parameter.device_mesh, tuple(parameter.placements))

    @property
    def _axis(self) -> int | None:
        return next((axis for axis, placement in enumerate(self.placements) if not placement.is_replicate()), None)

    @property
    def sharded(self) -> bool:
        """Whether processes hold different rows."""
        return self._axis is not None

    def _share(self, rows: int) -> tuple[int, int, int]:
        """Number of processes that share the rows, this one's index, and the largest number of rows of one."""
        count, number = self.mesh.size(self._axis), self.mesh.get_local_rank(self._axis)
        return count, number, -(-rows // count)

    def own(self, rows: int) -> slice:
        """The rows of this process, of all rows (split as `torch.chunk` does)."""
        if not self.sharded:
            return slice(0, rows)
        _, number, share = self._share(rows)
        return slice(min(number * share, rows), min((number + 1) * share, rows))

    def whole(self, stack: torch.Tensor, rows: int) -> torch.Tensor:
        """`(L, rows, n)` from this process's rows of L matrices, `(L, own rows, n)`, in one all-gather."""
        if not self.sharded:
            return stack
        count, _, share = self._share(rows)
        padded = stack.new_zeros(stack.shape[0], share, stack.shape[2])
        padded[:, : stack.shape[1]] = stack
        gathered = padded.new_empty(count * padded.shape[0], *padded.shape[1:])
        distributed.all_gather_into_tensor(gathered, padded, group=self.mesh.get_group(self._axis))
        by_matrix = gathered.view(count, *padded.shape).transpose(0, 1)
        return by_matrix.reshape(stack.shape[0], count * share, stack.shape[2])[:, :rows].contiguous()

    def add_up(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over the processes that share the rows, in place; of a dense tensor."""
        if self.sharded:
            distributed.all_reduce(partial, group=self.mesh.get_group(self._axis))
        return partial


class Scratch:
    """Memory for temporaries of a step, reused on the CPU: fresh pages cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._buffers: dict[Any, torch.Tensor] = {}

    def empty(self, key: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialized tensor, in the same memory again for the same key."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size, key = math.prod(shape), (key, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=dtype)
        return self._buffers[key][:size].view(*shape)


@dataclass
class Bucket:
    """L pairs of one shape, dtype, device and layout, with their gradients."""

    indices: list[int]  # of the pairs in the optimizer
    scaling: list[float]  # s by pair
    parameters: list[tuple[torch.Tensor, torch.Tensor]]  # A and B by pair
    rows: Layout  # of A and B
    # How many have their pairs in one A `(e r, n)` and one B `(m, r e)`; L counts each. PEFT's A and B may be those of
    # the transposed weight, which makes no difference to LoRA-Pro.
    experts: int = 1
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
        """Stack the factors and their gradients, and contract their long axes; `slot` tells live buckets apart."""
        count, first = len(self.indices), self.parameters[0][0]
        dtype, device = working_dtype(first.dtype), first.device
        stacks = []
        for which in range(2):
            factors = [pair[which] for pair in self.parameters]
            tensors = [local(tensor) for tensor in (*factors, *(tensor.grad for tensor in factors))]  # type: ignore[arg-type]
            stack = scratch.empty((slot, "in", which), (2 * count, *tensors[0].shape), dtype, device)
            if all(tensor.dtype == dtype for tensor in tensors):
                torch.stack(tensors, out=stack)
            else:
                torch._foreach_copy_(list(stack.unbind(0)), tensors)
            stacks.append(stack)
        whole = self.rows.whole(stacks[0], first.shape[0])
        split_a, split_b = split_experts(whole, stacks[1], self.experts)
        (self.a, self.grad_a), (self.b, self.grad_b) = split_a.chunk(2), split_b.chunk(2)
        self.out_a = scratch.empty((slot, "out", 0), self.a.shape, dtype, device)
        self.out_b = scratch.empty((slot, "out", 1), self.b.shape, dtype, device)
        # Next to the copies, while they are in the processor's cache.
        self.grams = self._grams(scratch)
        self.contract()
        return self

    @property
    def matrices(self) -> list[tuple[int, float]]:
        """Index and s of the pair that each of the L matrices belongs to."""
        pairs = zip(self.indices, self.scaling, strict=True)
        return [pair for pair in pairs for _ in range(self.experts)]

    def adjusted(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """By pair, `out_a` and `out_b` as the parameters are: the rows of this process.

        Yields:
            Of A and of B.
        """
        all_a, all_b = join_experts(self.out_a, self.out_b, self.experts)
        own = self.rows.own(all_a.shape[1])
        yield from zip(all_a[:, own], all_b, strict=True)

    def _grams(self, scratch: Scratch) -> torch.Tensor:
        grams = []
        for factor in (self.b, self.a):
            wide = factor
            if factor.dtype != torch.float64:
                wide = scratch.empty("wide", factor.shape, torch.float64, factor.device).copy_(factor)
            grams.append(torch.bmm(wide.mT, wide) if factor is self.b else torch.bmm(wide, wide.mT))
        self.rows.add_up(grams[0])
        return torch.stack(grams)

    def contract(self) -> None:
        """Contract the long axes of the gradients with the factors; repeat it when the gradients change."""
        self.overlap = self.rows.add_up(torch.bmm(self.b.mT, self.grad_b))
        self.inner = torch.bmm(self.grad_a, self.a.mT)


def draw_seed() -> int:
    """A seed from torch's default generator, rank 0's on all processes."""
    seed = [int(torch.randint(0, 2**62, (), dtype=torch.int64))]
    if world_size() > 1:
        distributed.broadcast_object_list(seed, src=0)
    return seed[0]


def mix(seed: int, number: int) -> int:
    """The seed of a pair or a step, below 2^63, by the finaliser of SplitMix64."""
    word = (seed + 0x9E3779B97F4A7C15 * (number + 1)) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return (word ^ (word >> 31)) >> 1
