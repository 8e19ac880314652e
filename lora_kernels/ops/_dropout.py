"""Dropout that is drawn from a seed wherever it is needed, and kept for no longer than a backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lora_kernels._checks import check_number, check_range
from lora_kernels.ops._philox import keep_factor, keep_mask, keep_threshold, seed_tensor


@dataclass(frozen=True)
class Dropout:
    """Which elements of a matrix are dropped: a function of the seed, the stream and the element's place alone.

    The same values give the same mask in every kernel, on every device, in the forward and in the backward; see
    `_philox.keep_mask`. Rows are counted from 0 over all leading sizes.

    A seed that is a tensor is read by the kernel, where it lies: one drawn on the GPU is never waited for, and what
    `torch.compile` traces does not depend on its value. `Dropout.draw` draws one from torch's own generator, so
    `torch.manual_seed` makes training reproducible, and a checkpointed function (`torch.utils.checkpoint`, both modes),
    whose generator state is restored, drops the same elements when it is computed again. Draw it inside that function.

    Attributes:
        p: the probability to be dropped, in [0, 1). It is rounded to a multiple of 2^-16, and what is kept is scaled by
            one over the rounded share: the mean is preserved exactly.
        seed: a 64-bit integer, or an int64 tensor of one element on the CPU or on the device of the matrix.
        stream: which mask of that seed, in [0, 2^32): layers that share a seed take different ones.
    """

    p: float
    seed: int | torch.Tensor
    stream: int = 0

    @staticmethod
    def draw(p: float, *, stream: int = 0, device: torch.device | str = "cpu") -> Dropout:
        """A new mask, its seed drawn from torch's generator of a device.

        Args:
            p: the probability to be dropped, in [0, 1).
            stream: which mask of that seed.
            device: where the seed is drawn: that of the matrix.

        Returns:
            The dropout.
        """
        return Dropout(p, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device), stream)


class Mask(NamedTuple):
    """A dropout as kernels take it."""

    threshold: int  # 16-bit numbers below it drop their element; at least 1
    seed: torch.Tensor  # `(1,)` int64
    stream: int  # which mask of that seed
    bits: torch.Tensor | None = None  # `(rows, ceil(columns / 8))` uint8, where a kernel has written what is kept

    @property
    def factor(self) -> float:
        """What kept elements are multiplied by."""
        return keep_factor(self.threshold)

    def keep(self, rows: slice, columns: int, device: torch.device) -> torch.Tensor:
        """Which elements of some rows, `(rows, columns)` bool, are kept; on the seed's device."""
        height, p = rows.stop - rows.start, self.threshold / 65536
        return keep_mask(height, columns, p=p, seed=self.seed, stream=self.stream, first_row=rows.start, device=device)

    def key(self) -> int:
        """The seed as an unsigned number. Waits for the device if it is not on the CPU."""
        return int(self.seed) & (2**64 - 1)

    def on(self, device: torch.device) -> Mask:
        """The same mask with its seed on a device; a number from the CPU goes there without waiting."""
        if self.seed.device == device:
            return self
        return self._replace(seed=torch.full((1,), int(self.seed), dtype=torch.int64, device=device))


def to_op_args(dropout: Dropout | None, device: torch.device) -> tuple[int, torch.Tensor | None, int]:
    """A dropout as the arguments of a registered op: threshold (0: nothing is dropped), seed and stream."""
    if dropout is None:
        return 0, None, 0
    if not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be a Dropout or None, got {type(dropout).__name__}")
    check_number("dropout.p", dropout.p)
    if not 0 <= dropout.p < 1:
        raise ValueError(f"dropout.p is {dropout.p!r}, but must be at least 0 and below 1")
    check_range("dropout.stream", dropout.stream, low=0, high=2**32 - 1, integer=True)
    seed = seed_tensor("dropout.seed", dropout.seed, device)
    threshold = keep_threshold(dropout.p)
    return (threshold, seed, dropout.stream) if threshold else (0, None, 0)


def mask_of(threshold: int, seed: torch.Tensor | None, stream: int) -> Mask | None:
    """The inverse of `to_op_args`, inside an op."""
    if threshold == 0:
        return None
    if seed is None:
        raise ValueError("seed must be given where threshold is not 0")
    return Mask(threshold, seed, stream)
