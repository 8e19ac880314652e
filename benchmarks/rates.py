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
# On a CPU: bytes copied, which no cache holds, and the orders of the matrices that are multiplied.
_SIZE, _ORDERS, _ROUNDS = 2**28, (512, 1024, 2048), 21
_LONG = 0.5  # seconds of a product; without bfloat16 arithmetic a processor takes 20 at order 2048
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
    device: torch.device, interleaved: Interleaved, size: int, orders: Sequence[int], kinds: Sequence[str]
) -> tuple[Rates, dict[str, Mapping[str, float]]]:
    """Copy and multiply, at best: what stands on these rates is called a floor, so none may be faster.

    Args:
        device: where.
        interleaved: times calls by name; returns quantiles of the seconds by name.
        size: bytes of the tensor that is copied.
        orders: of the square matrices that are multiplied, but for those that take long.
        kinds: of arithmetic.

    Returns:
        The rates at p20, of the order that is fastest, and all quantiles (`copy`, and one per kind and order).
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
            calls: dict[int, Callable[[], Any]] = {}
            for order in sorted(orders):
                call = _product(device, KINDS[kind], order)
                if calls and records.seconds(call) > _LONG:
                    break  # no fast product of this kind: smaller ones run at the same rate
                calls[order] = call
            seconds |= interleaved({f"{kind} {order}": call for order, call in calls.items()})
            products[kind] = max(2.0 * order**3 / seconds[f"{kind} {order}"]["p20"] for order in calls)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Rates(2.0 * size / seconds["copy"]["p20"], products), seconds


def _product(device: torch.device, dtype: torch.dtype, order: int) -> Callable[[], Any]:
    x, y = (torch.randn(order, order, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    return lambda: torch.mm(x, y, out=out)


@functools.cache
def here(device: str = "cpu") -> Rates:
    """Those of this machine, measured once per process.

    Args:
        device: `cpu` or `cuda`.

    Returns:
        For bfloat16, float32 and float64.
    """
    scale = 4 if device == "cuda" else 1
    sizes = scale * _SIZE, [scale * order for order in _ORDERS]
    kinds = ("bfloat16", "float32", "float64")
    return measure(torch.device(device), lambda calls: records.interleaved(dict(calls), _ROUNDS), *sizes, kinds)[0]
