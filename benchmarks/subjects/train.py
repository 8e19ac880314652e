"""A whole training step of a Llama with LoRA on all linear layers: forward, backward and AdamW.

Ours with groups and without, PEFT's layers, `torch.compile` of PEFT's model, and PEFT's layers by hand-written passes;
and the bytes that autograd keeps for the adapters, beyond what the frozen model keeps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import lora_layers, models, records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject

RANK, DROPOUT = 16, 0.05
PEERS = {"peft": "PEFT", "compiled": "torch.compile of PEFT", "hand_written": "hand-written addmm"}
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
    known = {each.untyped_storage()._cdata for each in model.parameters()}
    total = sum(size for storage, size in kept.items() if storage not in known)
    del loss
    return total


def _check(sides: Mapping[str, Any], batch: Any) -> dict[str, float]:
    """Per side, the relative differences of its loss and of all adapters' gradients from PEFT's, dropout off."""
    found: dict[str, Any] = {}
    for name, model in sides.items():
        model.eval()
        loss = model(**batch).loss
        loss.backward()
        factors = [each for each in model.parameters() if each.requires_grad]
        found[name] = float(loss.detach()), torch.cat([each.grad.flatten() for each in factors])
        model.zero_grad()
        model.train()
    truth = found.pop("peft")
    return {
        name: max(abs(loss - truth[0]) / truth[0], float((gradient - truth[1]).norm() / truth[1].norm()))
        for name, (loss, gradient) in found.items()
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time a training step.

    Args:
        name: the case.
        options: of the command line.

    Returns:
        The entry.

    Raises:
        SystemExit: if a side gives other numbers than PEFT's, or no layers were found to read the same tensor.
    """
    from peft import LoraConfig, get_peft_model

    base, batches = models.case(name)
    batch: Any = {**batches[0], "labels": batches[0]["input_ids"]}
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=DROPOUT, target_modules="all-linear")
    stock: Any = get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]
    for parameter_name, each in stock.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(each, std=0.02)  # with B = 0 the gradient of A says nothing
    sides = {"peft": stock, "hand_written": lora_layers.hand_written(stock)}
    sides |= {"ours": copy.deepcopy(stock), "ungrouped": copy.deepcopy(stock)}
    report = lk.accelerate(sides["ours"], strict=True, guard=False)
    lk.accelerate(sides["ungrouped"], strict=True, guard=False, group=False)
    if options.compile:
        sides["compiled"] = lora_layers.compiled(stock)
    differences = _check(sides, batch)
    if not max(differences.values()) <= BOUND:
        raise SystemExit(f"relative differences from PEFT's numbers: {differences}")
    steps = {side: lora_layers.trainer(model, batch) for side, model in sides.items()}
    for run in steps.values():
        run()  # groups take effect after the first step
    if not lk.training.groups(sides["ours"]):
        raise SystemExit("no layers were found to read the same tensor")
    frozen: Any = base.train().requires_grad_(False)
    saved = {side: _saved(model, batch) for side, model in {**sides, "frozen": frozen}.items() if side != "compiled"}
    adapters = {side: kept - saved["frozen"] for side, kept in saved.items() if side != "frozen"}
    times = records.interleaved(steps, options.rounds)
    if options.compile:
        torch._dynamo.reset()
    # Of the frozen layers, the head among them, forward and the gradient of the input; six products of rank r each.
    tokens = batch["input_ids"].numel()
    frozen_work = models.work(base, [batch]).forward + 2.0 * tokens * base.lm_head.weight.numel()  # type: ignore[union-attr, operator]
    sizes = [sum(base.get_submodule(each).weight.shape) for each in models.targets(base)]  # type: ignore[union-attr, misc, arg-type]
    work = 2 * frozen_work + 6.0 * tokens * RANK * sum(sizes)
    return {
        "layers": len(report.layers),
        "rank": RANK,
        "dropout": DROPOUT,
        "differences": differences,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "ungrouped_over_ours": times["ungrouped"]["p50"] / times["ours"]["p50"],
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
    """Groups and bytes."""
    return [
        f"of that by groups: {entry['ungrouped_over_ours']:.2f}; bytes kept for the adapters: "
        f"{entry['bytes_ratio']:.2f} of PEFT's"
    ]


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
