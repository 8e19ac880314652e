"""What a machine copies and multiplies per second, and the least that a problem costs at those rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import records

KINDS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
}
# On a CPU: bytes copied, which no cache holds, and the order of the matrices that are multiplied.
_SIZE, _ORDER = 2**28, 2048
Interleaved = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Rates:
    """What a machine copies and multiplies per second.

    Attributes:
        copy: bytes per second, read and written counted.
        products: FLOPs per second by the name of the arithmetic, a key of `KINDS`.
    """

    copy: float
    products: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """The least that a problem costs.

    Attributes:
        flops: multiplications and additions.
        bytes: each input read once, each output written once.
        rates: of the machine.
        arithmetic: whose rate counts.
    """

    flops: float
    bytes: float
    rates: Rates | None
    arithmetic: str = "bfloat16"

    @property
    def seconds(self) -> float | None:
        """The larger of both times; `None` where no rate is known."""
        if self.rates is None:
            return None
        return max(self.flops / self.rates.products[self.arithmetic], self.bytes / self.rates.copy)

    def record(self) -> dict[str, Any]:
        """For the record."""
        return {"flops": self.flops, "bytes": self.bytes, "arithmetic": self.arithmetic, "seconds": self.seconds}


def measure(
    device: torch.device, interleaved: Interleaved, size: int, order: int, kinds: Sequence[str]
) -> tuple[Rates, dict[str, Mapping[str, float]]]:
    """Copy and multiply.

    Args:
        device: where.
        interleaved: times calls by name; returns quantiles of the seconds by name.
        size: bytes of the tensor that is copied.
        order: of the square matrices that are multiplied.
        kinds: of arithmetic.

    Returns:
        The rates at the medians, and all quantiles (`copy`, and one entry per kind).
    """
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = dict(interleaved({"copy": lambda x=source, y=target: y.copy_(x)}))
    del source, target
    products = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for kind in kinds:
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            x, y = (torch.randn(order, order, device=device).to(KINDS[kind]) for _ in range(2))
            out = torch.empty_like(x)
            seconds |= interleaved({kind: lambda x=x, y=y, out=out: torch.mm(x, y, out=out)})
            products[kind] = 2.0 * order**3 / seconds[kind]["p50"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Rates(2.0 * size / seconds["copy"]["p50"], products), seconds


@functools.cache
def here(device: str = "cpu") -> Rates:
    """Those of this machine, measured once per process.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        For float32 and float64.
    """
    scale = 4 if device == "cuda" else 1
    kinds = ("float32", "float64")
    return measure(
        torch.device(device), lambda calls: records.interleaved(calls, 5), scale * _SIZE, scale * _ORDER, kinds
    )[0]
