"""The fused LoRA layer, forward and backward, against PEFT's, `torch.compile` of PEFT's, and hand-written passes.

Beside them the base layer alone (its forward and the gradient of its input). `floor_over_base` is the FLOPs of the
layer over those of the base layer: no implementation that computes the products can be closer to the base than that.
`groups`: layers that read the same input, together and one by one. `call`: a layer so small that only the cost of
calling it is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import lora_layers, records
from benchmarks.rates import here
from benchmarks.subject import Row, Subject
from lora_kernels.ops.lora_linear import table

SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (2048, 512), (512, 4096))
RANKS, DROPOUTS, RANK = (8, 16, 64), (0.0, 0.05), 16
# Tokens, n, and m of each layer of a group: query, key and value; gate and up; all of small models.
GROUPS = (
    (2048, 1024, (1024, 256, 256)),
    (2048, 1024, (2752, 2752)),
    (2048, 2048, (2048, 512, 512)),
    (256, 384, (384, 384, 384)),
    (16, 384, (384, 384, 384)),
)
CALL_TOKENS, CALL_SIZE, CALL_ROUNDS = 8, 64, 301
PEERS = {"peft": "PEFT", "compiled": "torch.compile of PEFT", "hand_written": "hand-written addmm"}
# PEFT over ours, without dropout and with it.
TARGETS = {0.0: 1.15, 0.05: 1.4}
BOUND = 1e-4


def _differences(sides: Mapping[str, Any], x: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    """Per side, the largest relative difference of outputs and gradients from PEFT's, dropout off."""
    found = {}
    for name, layer in sides.items():
        layer.eval()
        found[name] = lora_layers.both_ways(layer, x, g)()
        layer.train()
    return {
        name: max(float((one - two).norm() / two.norm()) for one, two in zip(each, found["peft"], strict=True))
        for name, each in found.items()
        if name != "peft"
    }


def layer(tokens: int, n: int, m: int, rank: int, dropout: float, rounds: int, compiler: bool) -> dict[str, Any]:
    """Check and time one layer.

    Args:
        tokens: rows of x.
        n: inputs.
        m: outputs.
        rank: of the adapter.
        dropout: of its input.
        rounds: timed calls of each side.
        compiler: whether `torch.compile` takes part; its compilations are not timed.

    Returns:
        An entry.

    Raises:
        SystemExit: if a side gives other numbers than PEFT's.
    """
    x, g = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
    stock = lora_layers.stock(n, m, rank, dropout, x.device, x.dtype)
    sides = {"peft": stock, "hand_written": lora_layers.hand_written(stock), "ours": lora_layers.fused(stock)}
    if compiler:
        sides["compiled"] = lora_layers.compiled(stock)
    differences = _differences(sides, x, g)
    if not max(differences.values()) <= BOUND:
        raise SystemExit(f"{n} -> {m}, r = {rank}: relative differences from PEFT's numbers {differences}")
    weight = stock.base_layer.weight.detach()
    calls = {"base": lambda: lora_layers.gradients(nn.functional.linear(x, weight), [x], g)}
    calls |= {name: lora_layers.both_ways(each, x, g) for name, each in sides.items()}
    times = records.interleaved(calls, rounds)
    if compiler:
        torch._dynamo.reset()
    return {
        "tokens": tokens,
        "n": n,
        "m": m,
        "rank": rank,
        "dropout": dropout,
        "forms": lora_layers.used_forms(x, m, rank, dropout),
        "differences": differences,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "ours_over_base": times["ours"]["p50"] / times["base"]["p50"],
        # t, y, u, dx, dA, dB: six products of r against two of the base layer.
        "floor_over_base": 1 + 3 * rank * (n + m) / (2 * n * m),
        "floor": lora_layers.floor(here(), tokens, n, (m,), rank, x.dtype).record(),
    }


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """All shapes, ranks and both kinds of dropout."""
    shapes, ranks = (SHAPES[:1], RANKS[1:2]) if options.quick else (SHAPES, RANKS)
    found = []
    with lk.ops.use_form(options.form):
        for n, m in shapes:
            for rank in ranks:
                for dropout in DROPOUTS:
                    each = layer(options.tokens, n, m, rank, dropout, options.rounds, options.compile)
                    found.append(each)
                    records.CONSOLE.print(f"{_named(each)}: PEFT / ours {each['peft_over_ours']:.2f}")
    return {"entries": found}


def call(options: argparse.Namespace) -> dict[str, Any]:
    """A layer whose numbers are done in no time: what a call costs in Python."""
    rounds = 21 if options.quick else CALL_ROUNDS
    sizes = (CALL_TOKENS, CALL_SIZE, CALL_SIZE, RANKS[0])
    return {"entries": [layer(*sizes, dropout, rounds, options.compile) for dropout in DROPOUTS]}


def group(tokens: int, n: int, outputs: Sequence[int], rank: int, dropout: float, rounds: int) -> dict[str, Any]:
    """Check and time layers that read the same input, together and one by one.

    Args:
        tokens: rows of x.
        n: inputs.
        outputs: of each layer.
        rank: of each.
        dropout: of their inputs.
        rounds: timed calls of each side.

    Returns:
        An entry.

    Raises:
        SystemExit: if both ways give different numbers.
    """
    x = torch.randn(tokens, n, requires_grad=True)
    gs = [torch.randn(tokens, m) for m in outputs]
    members, leaves = lora_layers.group(x, outputs, rank, dropout)

    def run(together: bool) -> list[torch.Tensor]:
        parts = [members] if together else [[each] for each in members]
        return lora_layers.gradients([y for part in parts for y in lk.ops.lora_linear_group(x, part)], leaves, gs)

    difference = max(float((one - two).norm() / two.norm()) for one, two in zip(run(True), run(False), strict=True))
    if not difference <= 1e-5:
        raise SystemExit(f"{n} -> {outputs}: layers together and alone differ by {difference:.1e}")
    times = records.interleaved({"together": lambda: run(True), "alone": lambda: run(False)}, rounds)
    return {
        "tokens": tokens,
        "n": n,
        "m": list(outputs),
        "rank": rank,
        "dropout": dropout,
        "difference": difference,
        "seconds": times,
        "alone_over_together": times["alone"]["p50"] / times["together"]["p50"],
        "floor": lora_layers.floor(here(), tokens, n, outputs, rank, x.dtype).record(),
    }


def groups(options: argparse.Namespace) -> dict[str, Any]:
    """All groups."""
    cases = GROUPS[-1:] if options.quick else GROUPS
    return {"entries": [group(*case, RANK, dropout, options.rounds) for case in cases for dropout in DROPOUTS]}


def _named(each: Mapping[str, Any]) -> str:
    outputs = "/".join(str(m) for m in each["m"]) if isinstance(each["m"], list) else each["m"]
    return f"{each['tokens']} x {each['n']} -> {outputs}, r = {each['rank']}, dropout {each['dropout']:g}"


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Each layer against each peer; each group against its layers one by one."""
    found = []
    for each in entry["entries"]:
        times, floor = each["seconds"], each.get("floor", {}).get("seconds")
        name, about = _named(each), f"dropout {each['dropout']:g}"
        small = each["n"] == CALL_SIZE
        if "together" in times:
            found.append(Row(name, "one by one", times["together"]["p50"], times["alone"]["p50"], floor, group=about))
        for side, peer in PEERS.items():
            if side in times:
                target = TARGETS[each["dropout"]] if side == "peft" and not small else None
                found.append(Row(name, peer, times["ours"]["p50"], times[side]["p50"], floor, target, about))
    return found


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=2048, help="of `layers`")
    parser.add_argument("--form", default="auto", help=f"of the large products: auto, {', '.join(table.FORMS)}")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


SUBJECT = Subject(
    name="linear",
    about="The fused LoRA layer against PEFT's, torch.compile of PEFT's and hand-written passes; outputs and all "
    "gradients must be PEFT's.",
    cases={"layers": layers, "groups": groups, "call": call},
    rows=rows,
    full=("layers", "groups", "call"),
    quick=("layers", "groups", "call"),
    table=("layers", "call"),
    rounds=9,
    options=_options,
)
