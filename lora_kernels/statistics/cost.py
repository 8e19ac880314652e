"""What a plan costs: memory per device and the least seconds, from operations and bytes at given rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn

from lora_kernels._checks import check_range


@dataclass(frozen=True)
class Rates:
    """What the device of one process, and its links, do at most.

    Attributes:
        name: of the device.
        matmul: products of the model's dtype, FLOP/s.
        single: float32 products, FLOP/s.
        double: float64 products, FLOP/s.
        memory: device memory, bytes/s.
        capacity: of that memory, bytes.
        link: to another process of the same node, bytes/s in each direction.
        network: of one process's share of what leaves the node, bytes/s in each direction.
        host: between device and host, bytes/s in each direction.
        host_double: float64 products on a process's share of the host, FLOP/s.
        host_capacity: memory of the whole host, bytes.
        node: processes per node.
        source: where the numbers are from: peaks, or measured.

    Raises:
        ValueError: if a rate is not positive.
        TypeError: if one is no number.
    """

    name: str
    matmul: float
    single: float
    double: float
    memory: float
    capacity: float
    link: float
    network: float
    host: float
    host_double: float
    host_capacity: float
    node: int = 8
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for each in fields(self):
            if each.name not in ("name", "source"):
                check_range(each.name, getattr(self, each.name), low=0.0)
                if not getattr(self, each.name):
                    raise ValueError(f"{each.name} is 0, but must be positive")

    @staticmethod
    def read(path: str | Path) -> Rates:
        """Rates from a JSON file, by the names of the attributes.

        Args:
            path: the file.

        Returns:
            The rates.

        Raises:
            ValueError: if it is no such file.
        """
        try:
            return Rates(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no rates: {error}") from error

    def exchange(self, size: float, processes: int) -> float:
        """Seconds until every process has what the others hold of `size` bytes (an all-gather), each an equal share.

        Args:
            size: of the whole, bytes.
            processes: how many.

        Returns:
            The larger of the times that a ring takes inside the nodes and between them.
        """
        nodes = -(-processes // self.node)
        inside = size * (processes - 1) / processes / self.link
        between = size * (nodes - 1) / nodes / (self.node * self.network)
        return max(inside, between)


H200 = Rates(
    "H200",
    matmul=989e12,
    single=67e12,
    double=67e12,
    memory=4.8e12,
    capacity=141e9,
    link=450e9,
    network=50e9,
    host=64e9,
    host_double=0.9e12,
    host_capacity=2e12,
    node=8,
    source="peaks: NVIDIA's data sheets of the H200 SXM (bfloat16 without sparsity; float64 on tensor cores; NVLink 4 "
    "and PCIe 5 per direction) and of the DGX H200 (400 Gbit/s per GPU; 2 TB; two Xeon 8480C, 56 cores at 2.0 GHz with "
    "32 float64 operations per cycle, an eighth each)",
)


@dataclass(frozen=True)
class Work:
    """Operations and bytes of device memory that something takes at least.

    Attributes:
        matmul: floating-point operations in products of the model's dtype.
        single: in float32.
        double: in float64.
        bytes: read and written.
    """

    matmul: float = 0.0
    single: float = 0.0
    double: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def seconds(self, rates: Rates, *, on_host: bool = False) -> float:
        """The least time, with operations and memory traffic in parallel.

        Args:
            rates: of the device.
            on_host: done by the host instead (its memory traffic is not counted).

        Returns:
            Seconds.
        """
        if on_host:
            return (self.single / 2 + self.double) / rates.host_double
        operations = self.matmul / rates.matmul + self.single / rates.single + self.double / rates.double
        return max(operations, self.bytes / rates.memory)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's weights.

    Attributes:
        total: all of them, each once.
        root: what is in no repeated block (embeddings, the output layer): FSDP2 keeps it gathered during a step.
        unit: of the largest repeated block: FSDP2 gathers one and prefetches the next.
        blocks: number of repeated blocks.
    """

    total: int
    root: int
    unit: int
    blocks: int

    @staticmethod
    def of(model: nn.Module) -> Footprint:
        """Measure a model, on any device; blocks are what its outermost `ModuleList`s hold.

        Args:
            model: the model.

        Returns:
            The footprint.
        """
        found: list[nn.Module] = []
        inside: set[int] = set()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and id(module) not in inside:
                found += list(module)
                inside |= {id(each) for block in module for each in block.modules()}
        sizes = [_bytes(block) for block in found]
        total = _bytes(model)
        return Footprint(total, total - sum(sizes), max(sizes, default=0), len(sizes))

    def sharded(self, processes: int) -> float:
        """Bytes per device with FSDP2, a unit per block: the shard, and what is gathered at the worst moment."""
        return self.total / processes + self.root + min(2, self.blocks) * self.unit


def _bytes(module: nn.Module) -> int:
    tensors = {id(each): each for each in (*module.parameters(), *module.buffers())}
    return sum(each.numel() * each.element_size() for each in tensors.values())


@dataclass(frozen=True)
class Cost:
    """The memory of a collection and the decompositions that follow, and the least seconds that they take.

    Counted of the model: the products of the observed layers, and their gradients with respect to their inputs. Left
    out: attention, norms, the output layer, the activations that a backward pass keeps, launches and waits. So the
    seconds are lower bounds, and what is said to fit may still not fit.

    Attributes:
        rates: what they were worked out with.
        tokens: read by all processes together in each pass.
        batch_tokens: per process and step.
        layout: `whole` (every process holds the model), `sharded` (FSDP2 over all processes), or `none`: it does not
            fit. Seconds are then those of the last one tried.
        why_not: what does not fit, in words.
        device_bytes: per device: weights, and the sums of the largest pass.
        host_bytes: per node: sums of finished passes, of all its processes.
        model_seconds: forward and backward passes.
        statistics_seconds: additions to the sums.
        gather_seconds: of FSDP2's shards; in parallel with both.
        reduce_seconds: to add up the sums of all processes.
        host_seconds: sums to the host and back, where there are several passes.
        decompose_seconds: of the process that has most to decompose.
    """

    rates: str
    tokens: int
    batch_tokens: int
    layout: str
    why_not: str
    device_bytes: float
    host_bytes: float
    model_seconds: float
    statistics_seconds: float
    gather_seconds: float
    reduce_seconds: float
    host_seconds: float
    decompose_seconds: float

    @property
    def seconds(self) -> float:
        """Of everything, the gathering hidden as far as it can be."""
        passes = max(self.model_seconds + self.statistics_seconds, self.gather_seconds)
        return passes + self.reduce_seconds + self.host_seconds + self.decompose_seconds


def choose_layout(
    footprint: Footprint, sums: float, host_bytes: float, processes: int, rates: Rates
) -> tuple[str, str, float]:
    """How the model lies on the devices.

    Args:
        footprint: of its weights.
        sums: bytes of the largest pass.
        host_bytes: on a node.
        processes: how many.
        rates: with the memory of device and host.

    Returns:
        `whole`, `sharded` or `none`; what does not fit; and the bytes per device.
    """
    whole, shards = footprint.total + sums, footprint.sharded(processes) + sums
    if host_bytes > rates.host_capacity:
        why = "the sums of finished passes do not fit the host"
        return "none", why, whole if whole <= rates.capacity else shards
    if whole <= rates.capacity:
        return "whole", "", whole
    if processes > 1 and shards <= rates.capacity:
        return "sharded", "", shards
    return "none", "weights and sums do not fit the device", shards if processes > 1 else whole


def share_seconds(work: Sequence[Work], owners: Sequence[int], rates: Rates, *, on_host: bool = False) -> float:
    """The time of the process that has most to do.

    Args:
        work: the pieces.
        owners: the process of each.
        rates: of the device.
        on_host: done by the host.

    Returns:
        Seconds.
    """
    loads: dict[int, float] = {}
    for each, owner in zip(work, owners, strict=True):
        loads[owner] = loads.get(owner, 0.0) + each.seconds(rates, on_host=on_host)
    return max(loads.values(), default=0.0)
