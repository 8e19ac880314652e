"""The self-test of each op on each backend that says it can run, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lora_kernels.ops._backend import Refused
from lora_kernels.ops._by_hand import BY_HAND, ByHand
from lora_kernels.ops._op import OPS, Op


@dataclass(frozen=True)
class SelfTest:
    """The outcome of running one op on one backend.

    Attributes:
        op: the op's name.
        backend: the backend.
        device: where.
        error: relative error against float64, or `None` if it did not run.
        bound: the error allowed.
        reason: why it did not run, or what went wrong.
    """

    op: str
    backend: str
    device: str
    error: float | None
    bound: float
    reason: str = ""

    @property
    def broken(self) -> bool:
        """Whether a backend that says it can run gave a wrong answer or failed."""
        return (self.error is None and self.reason.startswith("failed")) or (
            self.error is not None and not self.error <= self.bound
        )


def _run(op: Op | ByHand, backend: str, device: torch.device) -> SelfTest:
    error, reason = None, ""
    try:
        error = op.error(device, backend)
    except Refused as refusal:
        reason = refusal.reasons.get(backend, str(refusal))
    except Exception as problem:
        reason = f"failed: {problem!r}"
    return SelfTest(op.name, backend, device.type, error, op.bound, reason)


def _cases() -> Iterator[tuple[Op | ByHand, str]]:
    for op in OPS.values():
        for backend in op.backends:
            yield op, backend.name
    for other in BY_HAND:
        for name in other.backends:
            yield other, name


def self_tests() -> list[SelfTest]:
    """Run every op on every backend of every device at hand.

    Returns:
        The outcomes.
    """
    devices = [torch.device("cpu")] + [torch.device("cuda")] * torch.cuda.is_available()
    return [_run(op, backend, device) for op, backend in _cases() for device in devices]
