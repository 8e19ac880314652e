"""Small collections on this CPU beside what their plan says: one process, or two under torchrun.

`python -m benchmarks.scaling --measure` runs it; by itself: `torchrun --nproc-per-node 2 -m benchmarks.scaling_measure
FILE`. Counted: bytes of sums, passes, all-reductions, their bytes, and small messages.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.init import resolve_method

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
    """What goes through torch.distributed."""

    def __init__(self) -> None:
        self.reductions = self.bytes = self.objects = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Count while it lasts."""
        real = distributed.all_reduce, distributed.all_gather_object

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return real[0](tensor, *args, **kwargs)

        def all_gather_object(*args: Any, **kwargs: Any) -> Any:
            self.objects += 1
            return real[1](*args, **kwargs)

        distributed.all_reduce, distributed.all_gather_object = all_reduce, all_gather_object
        try:
            yield
        finally:
            distributed.all_reduce, distributed.all_gather_object = real


class Loader(list):  # type: ignore[type-arg]
    """Batches that count how often they are read from the start."""

    reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return super().__iter__()


def _held(found: Any) -> int:
    tensors = {
        id(value): value
        for layer in found.values()
        for sums in layer.sums.values()
        for value in sums.tensors().values()
    }
    return sum(each.numel() * each.element_size() for each in tensors.values())


def run_case(name: str, method: str, options: dict[str, Any], world: int, quick: bool) -> dict[str, Any]:
    """One collection, beside its plan."""
    loader = Loader(batches(quick, distributed.get_rank() if world > 1 else 0))
    config = resolve_method(method)
    settings = {"sketch_size": SKETCH if not quick else 32, **options}
    peft_model = model(quick)
    if "budget" in settings:
        whole = lk.plan(peft_model, config, batch=loader[0], world_size=world, form="exact").total_bytes
        settings["budget"] = int(settings["budget"] * whole)
    plan = lk.plan(peft_model, config, batch=loader[0], world_size=world, **settings)
    counter = Counter()
    with counter.watch():
        statistics = lk.collect(peft_model, loader, config, progress=False, **settings, **config.collect_options)
    probes = int("budget" in settings)  # a batch is read before, to find which layers share an input
    return {
        "case": name,
        "world": world,
        "planned": {
            "bytes": plan.total_bytes,
            "passes": plan.passes,
            "reductions": plan.messages,
            "reduced_bytes": plan.message_bytes if world > 1 else 0,
            # Eight of a collection, one of a pass, and two of the forward pass before a plan with a budget.
            "objects": plan.passes + 8 + 2 * probes if world > 1 else 0,
        },
        "found": {
            "bytes": _held(statistics),
            "passes": loader.reads - probes,
            "reductions": counter.reductions,
            "reduced_bytes": counter.bytes,
            "objects": counter.objects,
        },
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
    rows = [run_case(*case, world, options.quick) for case in CASES]
    size = sum(each.numel() for each in model(options.quick).parameters())
    if world == 1 or distributed.get_rank() == 0:
        options.out.write_text(json.dumps({"parameters": size, "rows": rows}))
    if world > 1:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
