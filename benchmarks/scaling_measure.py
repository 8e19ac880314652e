"""Small collections on this CPU beside what their plan says: one process, or two under torchrun.

`python -m benchmarks.scaling --measure` runs it; by itself: `torchrun --nproc-per-node 2 -m benchmarks.scaling_measure
FILE`. Counted: bytes of sums, passes, all-reductions and their bytes. Timed: passes, reduction and decomposition,
beside the least times at this machine's own rates, measured just before with as many processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.init import resolve_method
from lora_kernels.statistics import Rates

RANK, SKETCH = 8, 64
# Name, method, options of the collection.
CASES = (
    ("eva, exact", "eva", {}),
    ("eva, sketched", "eva", {"form": "sketch"}),
    ("lora_ga, sketched", "lora_ga", {"form": "sketch"}),
    ("corda", "corda", {}),
    ("lora_da", "lora_da", {}),
    ("lora_da, several passes", "lora_da", {"form": "exact", "budget": 0.4}),  # of the bytes that one pass would take
)


def model(quick: bool) -> Any:
    """A Llama with LoRA on all linear layers."""
    torch.manual_seed(0)
    sizes = (192, 640, 2) if quick else (512, 1408, 4)
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512}
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    config = LlamaConfig(**settings, **dict(zip(keys, sizes, strict=True)))
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=RANK, target_modules="all-linear"))


def batches(quick: bool, process: int) -> list[dict[str, torch.Tensor]]:
    """Whole sequences without padding, other ones for every process."""
    generator = torch.Generator().manual_seed(process)
    shape, count = ((2, 16), 3) if quick else ((4, 256), 3)
    made = [torch.randint(0, 256, shape, generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in made]


class Counter:
    """What goes through torch.distributed, and for how long the sums travel."""

    def __init__(self) -> None:
        self.reductions = self.bytes = self.objects = 0
        self.seconds = 0.0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Count while it lasts."""
        ours = lk.statistics.distributed
        real = distributed.all_reduce, distributed.all_gather_object, ours.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return real[0](tensor, *args, **kwargs)

        def all_gather_object(*args: Any, **kwargs: Any) -> Any:
            self.objects += 1
            return real[1](*args, **kwargs)

        def timed(*args: Any) -> None:
            started = time.perf_counter()
            real[2](*args)
            self.seconds += time.perf_counter() - started

        distributed.all_reduce, distributed.all_gather_object, ours.all_reduce = all_reduce, all_gather_object, timed
        try:
            yield
        finally:
            distributed.all_reduce, distributed.all_gather_object, ours.all_reduce = real


class Loader(list):  # type: ignore[type-arg]
    """Batches that count how often they are read from the start."""

    reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return super().__iter__()


def _best(call: Callable[[], Any], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measured_rates(world: int, quick: bool) -> Rates:
    """What a process reaches here while all others do the same."""
    order, size, rounds = (128, 2**18, 2) if quick else (1536, 2**25, 7)
    flops = {}
    for name, dtype in (("single", torch.float32), ("double", torch.float64)):
        a, b = (torch.randn(order, order, dtype=dtype) for _ in range(2))
        out = torch.empty(order, order, dtype=dtype)
        flops[name] = 2 * order**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds)
    source, target = torch.ones(size), torch.empty(size)
    memory = 8 * size / _best(lambda: target.copy_(source), rounds)
    link = memory
    if world > 1:
        flat = torch.ones(size // 4)
        seconds = _best(lambda: distributed.all_reduce(flat), rounds)
        link = 2 * (world - 1) / world * flat.numel() * 4 / seconds
    return Rates(
        "this CPU",
        matmul=flops["single"],
        single=flops["single"],
        double=flops["double"],
        memory=memory,
        capacity=1e12,
        link=link,
        network=link,
        host=1e18,  # nothing moves: the host is the device
        host_double=flops["double"],
        host_capacity=1e12,
        node=world,
        source="the best of several calls: copies, products of one size, an all-reduction over gloo",
    )


def _held(found: Any) -> int:
    tensors = {
        id(value): value
        for layer in found.values()
        for sums in (layer.input, layer.output)
        if sums is not None
        for value in sums.tensors().values()
    }
    return sum(each.numel() * each.element_size() for each in tensors.values())


def run_case(name: str, method: str, options: dict[str, Any], rates: Rates, world: int, quick: bool) -> dict[str, Any]:
    """One collection and its decompositions, beside their plan."""
    process = distributed.get_rank() if world > 1 else 0
    loader = Loader(batches(quick, process))
    per_step = loader[0]["input_ids"].numel()
    tokens = {"tokens": per_step * len(loader) * world, "batch_tokens": per_step}
    config = resolve_method(method)
    settings = {"sketch_size": SKETCH if not quick else 32, **options}
    peft_model = model(quick)
    if "budget" in settings:
        whole = lk.plan(peft_model, config, batch=loader[0], world_size=world, form="exact").total_bytes
        settings["budget"] = int(settings["budget"] * whole)
    plan = lk.plan(peft_model, config, batch=loader[0], world_size=world, rates=rates, rank=RANK, **tokens, **settings)
    times: dict[str, list[float]] = {"passes": [], "reduce": [], "decompose": []}
    for _ in range(1 if quick else 3):
        counter, loader.reads = Counter(), 0
        peft_model = model(quick)
        with counter.watch():
            started = time.perf_counter()
            found = lk.collect(peft_model, loader, config, progress=False, **settings, **config.collect_options)
            total = time.perf_counter() - started
        report = lk.initialize(peft_model, None, config, statistics=found, progress=False)
        times["passes"].append(total - counter.seconds)
        times["reduce"].append(counter.seconds)
        times["decompose"].append(report.seconds["decompose"])
    probes = int("budget" in settings)  # a batch is read before, to find which layers share an input
    cost = plan.cost
    assert cost is not None  # rates were given
    return {
        "case": name,
        "world": world,
        "planned": {
            "bytes": plan.total_bytes,
            "passes": plan.passes,
            "reductions": plan.messages,
            "reduced_bytes": plan.message_bytes if world > 1 else 0,
            "objects": plan.passes + 3 if world > 1 else 0,
        },
        "found": {
            "bytes": _held(found),
            "passes": loader.reads - probes,
            "reductions": counter.reductions,
            "reduced_bytes": counter.bytes,
            "objects": counter.objects,
        },
        "floor": {
            "passes": cost.model_seconds + cost.statistics_seconds,
            "reduce": cost.reduce_seconds,
            "decompose": cost.decompose_seconds,
        },
        "seconds": {part: statistics.median(values[1:] or values) for part, values in times.items()},
    }


def main() -> None:
    """Measure, and write one JSON file (by the first process)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, once: for the counts alone")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")
    rates = measured_rates(world, options.quick)
    rows = [run_case(*case, rates, world, options.quick) for case in CASES]
    size = sum(each.numel() for each in model(options.quick).parameters())
    if world == 1 or distributed.get_rank() == 0:
        options.out.write_text(json.dumps({"parameters": size, "rates": asdict(rates), "rows": rows}))
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
