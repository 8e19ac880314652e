"""A whole training step of a Llama with LoRA on all linear layers: forward, backward and AdamW.

Ours, PEFT's layers, `torch.compile` of PEFT's model, and PEFT's layers by hand-written passes; and the bytes
that autograd keeps for the adapters, beyond what the frozen model keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import lora_layers, models, records
from benchmarks.lora_layers import PEERS
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject

RANK, DROPOUT = 16, 0.05
TARGETS = {"peft": 1.2}
BOUND = 1e-4


def _saved(model: Any, batch: Any) -> int:
    """Bytes that autograd keeps from a forward pass whose first tensor has a gradient, beyond parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    model.enable_input_require_grads()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    model.disable_input_require_grads()
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    total = sum(size for storage, size in kept.items() if storage not in known)
    del loss
    return total


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a training step.

    Args:
        name: the case.
        options: of the command line.

    Returns:
        The entry.

    Raises:
        SystemExit: if a side gives other numbers than PEFT's.
    """
    base, batches = models.case(name)
    batch: Any = {**batches[0], "labels": batches[0]["input_ids"]}
    stock = lora_layers.adapted(base.requires_grad_(False), RANK, DROPOUT)
    sides = {"peft": stock, "hand_written": lora_layers.hand_written(stock), "ours": lora_layers.shared_copy(stock)}
    report = lk.accelerate(sides["ours"], strict=True, guard=False)
    if options.compile:
        sides["compiled"] = lora_layers.compiled(stock)
    answers = lora_layers.answers(sides, batch)
    truth = answers.pop("peft")
    differences = {side: lora_layers.largest(lora_layers.deviations(item, truth)) for side, item in answers.items()}
    if not lora_layers.largest(differences.values()) <= BOUND:
        raise SystemExit(f"relative differences from PEFT's numbers: {differences}")
    steps = {side: lora_layers.trainer(model, batch) for side, model in sides.items()}
    frozen: Any = base.train()
    saved = {side: _saved(model, batch) for side, model in {**sides, "frozen": frozen}.items() if side != "compiled"}
    adapters = {side: kept - saved["frozen"] for side, kept in saved.items() if side != "frozen"}
    times = records.interleaved(steps, options.rounds)
    if options.compile:
        torch._dynamo.reset()
    # Of the frozen layers, the head among them, forward and the gradient of the input; six products of rank r each.
    tokens = batch["input_ids"].numel()
    frozen_work = models.work(base, [batch]).forward + 2.0 * tokens * base.lm_head.weight.numel()  # type: ignore[union-attr, operator]
    sizes = [sum(base.get_submodule(item).weight.shape) for item in models.targets(base)]  # type: ignore[union-attr, misc, arg-type]
    work = 2 * frozen_work + 6.0 * tokens * RANK * sum(sizes)
    return {
        "layers": len(report.layers),
        "rank": RANK,
        "dropout": DROPOUT,
        "differences": differences,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "bytes_saved_for_adapters": adapters,
        "bytes_ratio": adapters["ours"] / adapters["peft"],
        "floor": Floor(work, 0.0, here(), "float32").record(),
    }


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Against each peer."""
    times, floor = entry["seconds"], entry.get("floor", {}).get("seconds")
    what = f"training step, r = {entry['rank']}, dropout {entry['dropout']:g}"
    return [
        Row(what, peer, times["ours"]["p50"], times[side]["p50"], floor, TARGETS.get(side))
        for side, peer in PEERS.items()
        if side in times
    ]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Bytes."""
    return [f"bytes kept for the adapters: {entry['bytes_ratio']:.2f} of PEFT's"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


SUBJECT = Subject(
    name="train",
    about="A whole training step of a Llama with LoRA on all linear layers, against PEFT, torch.compile of PEFT's "
    "model and hand-written passes; the loss and all gradients must be PEFT's.",
    cases={name: partial(measure, name) for name in models.LLAMAS},
    rows=rows,
    notes=notes,
    full=("llama",),
    quick=("tiny",),
    options=_options,
)
