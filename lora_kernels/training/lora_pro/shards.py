"""Rows of a parameter on this process: all of them, or the shard of FSDP2 (a DTensor split along its first axis)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from lora_kernels.runtime.modes import is_sharded


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds (for a plain tensor, itself); shares its memory."""
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def like_rows(parameter: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros `(m, columns)`, of the rows of a parameter `(m, *)` and sharded as it is."""
    part = local(parameter)
    zeros = torch.zeros(part.shape[0], columns, dtype=dtype, device=part.device)
    return wrap(zeros, parameter) if is_sharded(parameter) else zeros


def wrap(part: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A DTensor whose local part is given, sharded as a parameter is."""
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
        """The layout of a parameter, which may be sharded by rows along one axis of its mesh."""
        if not is_sharded(parameter):
            return cls()
        split = [placement for placement in parameter.placements if not placement.is_replicate()]
        # (A strided shard, as FSDP2 makes it on top of tensor parallelism, is no plain one: its rows are interleaved.)
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
        """Processes that share the rows, this one's number among them, and the largest share of rows."""
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
