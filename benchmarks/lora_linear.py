"""The fused LoRA layer against PEFT's, and a whole training step: `python -m benchmarks.lora_linear [--case llama]`.

Layers: forward and backward (the gradients of x, A and B), interleaved with PEFT's layer and with the base layer alone
(forward and the gradient of x), after both have given the same numbers; with the form that the large products ran in
(`lora-kernels tune` chooses; `--form` forces one). The floor of the fused layer is its FLOPs over
those of the base layer: no implementation that computes the products can be closer to the base than that.

Groups: layers that read the same input, together and one by one.

Training step: forward, backward and AdamW of all LoRA layers of a Llama, with groups and without, and the bytes that
autograd keeps for the adapters (beyond what the frozen model keeps).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import nn

import lora_kernels as lk
from benchmarks import records
from benchmarks.compare import CONSOLE, case
from lora_kernels.ops.lora_linear import forms, table
from lora_kernels.ops.lora_linear.op import linear_dispatcher

SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (2048, 512), (512, 4096))
RANKS = (8, 16, 64)
DROPOUTS = (0.0, 0.05)
TRAIN_RANK, TRAIN_DROPOUT = 16, 0.05
# Tokens, n, and m of each layer of a group: query, key and value; gate and up; all of small models.
GROUPS = (
    (2048, 1024, (1024, 256, 256)),
    (2048, 1024, (2752, 2752)),
    (2048, 2048, (2048, 512, 512)),
    (256, 384, (384, 384, 384)),
    (16, 384, (384, 384, 384)),
)


class _One(nn.Module):
    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def _pair(n: int, m: int, rank: int, dropout: float) -> tuple[Any, Any, Any]:
    """Base layer, PEFT's layer and ours, the same weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["linear"])
    stock: Any = get_peft_model(_One(n, m), config).train()  # type: ignore[arg-type]
    nn.init.normal_(stock.base_model.model.linear.lora_B["default"].weight, std=0.1)
    fused = copy.deepcopy(stock)
    lk.accelerate(fused, strict=True, guard=False)
    layers = [each.base_model.model.linear for each in (stock, fused)]
    base = copy.deepcopy(layers[0].base_layer).requires_grad_(False)
    return base, *layers


def _call(layer: Any, x: torch.Tensor, g: torch.Tensor) -> Any:
    def run() -> torch.Tensor:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        y: torch.Tensor = layer(x)
        y.backward(g)
        return y

    return run


def _check(stock: Any, fused: Any, x: torch.Tensor, g: torch.Tensor) -> float:
    """Largest relative difference of outputs and gradients, dropout off."""
    found = []
    for layer in (stock, fused):
        layer.eval()
        y = _call(layer, x, g)()
        assert x.grad is not None
        factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        found.append([y.detach(), x.grad.clone(), *(each.grad.clone() for each in factors)])
        layer.train()
    differences = [float((one - two).norm() / one.norm()) for one, two in zip(*found, strict=True)]
    return max(differences)


def _forms(x: torch.Tensor, m: int, rank: int, dropout: float) -> dict[str, str]:
    """In which form a layer's products run."""
    backend = linear_dispatcher.choose("auto", x.device, x.dtype, dropout > 0)
    sizes = (x.shape[0], x.shape[1], m)
    return {
        product: forms.choose(
            product, x.device, x.dtype, sizes, rank, dropout > 0 and product == "backward", backend
        ).name
        for product in table.PRODUCTS
    }


def layers(tokens: int, shapes: Sequence[tuple[int, int]], ranks: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Time single layers.

    Args:
        tokens: rows of x.
        shapes: n and m.
        ranks: r.
        rounds: timed calls of each.

    Returns:
        An entry per shape, rank and dropout.
    """
    found = []
    for n, m in shapes:
        x, g = torch.randn(tokens, n, requires_grad=True), torch.randn(tokens, m)
        for rank in ranks:
            for dropout in DROPOUTS:
                base, stock, fused = _pair(n, m, rank, dropout)
                difference = _check(stock, fused, x, g)
                if difference > 1e-4:
                    raise SystemExit(f"{n} -> {m}, r = {rank}: fused and stock differ by {difference:.1e}")
                calls = {"base": base, "peft": stock, "ours": fused}
                times = records.interleaved({name: _call(each, x, g) for name, each in calls.items()}, rounds)
                found.append(
                    {
                        "tokens": tokens,
                        "n": n,
                        "m": m,
                        "rank": rank,
                        "dropout": dropout,
                        "forms": _forms(x, m, rank, dropout),
                        "difference": difference,
                        "seconds": times,
                        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
                        "ours_over_base": times["ours"]["p50"] / times["base"]["p50"],
                        # t, y, u, dx, dA, dB: six products of r against two of the base layer.
                        "floor_over_base": 1 + 3 * rank * (n + m) / (2 * n * m),
                    }
                )
                CONSOLE.print(
                    f"{n:5d} -> {m:5d}  r {rank:3d}  dropout {dropout:<4}  PEFT / ours "
                    f"{found[-1]['peft_over_ours']:.2f}  ours / base {found[-1]['ours_over_base']:.2f} "
                    f"(FLOPs {found[-1]['floor_over_base']:.2f})  {' / '.join(found[-1]['forms'].values())}"
                )
    return found


def groups(cases: Sequence[tuple[int, int, Sequence[int]]], rank: int, rounds: int) -> list[dict[str, Any]]:
    """Time layers that read the same input, together and one by one.

    Args:
        cases: tokens, n and the m of each layer.
        rank: r of each.
        rounds: timed calls of each.

    Returns:
        An entry per case and dropout.
    """
    found = []
    for tokens, n, outputs in cases:
        x = torch.randn(tokens, n, requires_grad=True)
        gs = [torch.randn(tokens, m) for m in outputs]
        for dropout in DROPOUTS:
            members = [
                lk.ops.LoraMember(
                    torch.randn(m, n) / n**0.5,
                    None,
                    torch.randn(rank, n, requires_grad=True),
                    torch.randn(m, rank, requires_grad=True),
                    1.0,
                    lk.ops.Dropout(dropout, index) if dropout else None,
                )
                for index, m in enumerate(outputs)
            ]
            leaves = [x, *(factor for each in members for factor in (each.a, each.b))]

            def run(together: bool, members: Any = members, leaves: Any = leaves, x: Any = x, gs: Any = gs) -> Any:
                parts = [members] if together else [[each] for each in members]
                ys = [y for part in parts for y in lk.ops.lora_linear_group(x, part)]
                return torch.autograd.grad(ys, leaves, gs)

            pairs = zip(run(True), run(False), strict=True)
            difference = max(float((one - two).norm() / two.norm()) for one, two in pairs)
            if difference > 1e-5:
                raise SystemExit(f"{n} -> {outputs}: layers together and alone differ by {difference:.1e}")
            calls = {"together": lambda run=run: run(True), "alone": lambda run=run: run(False)}
            times = records.interleaved(calls, rounds)
            found.append(
                {
                    "tokens": tokens,
                    "n": n,
                    "m": list(outputs),
                    "rank": rank,
                    "dropout": dropout,
                    "difference": difference,
                    "seconds": times,
                    "alone_over_together": times["alone"]["p50"] / times["together"]["p50"],
                }
            )
            CONSOLE.print(
                f"{tokens:5d} x {n:5d} -> {', '.join(str(m) for m in outputs):16s} dropout {dropout:<4}  "
                f"alone / together {found[-1]['alone_over_together']:.2f}"
            )
    return found


def _saved(model: nn.Module, batch: Any) -> int:
    """Bytes that autograd keeps from a forward pass, beyond parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    known = {each.untyped_storage()._cdata for each in model.parameters()}
    total = sum(size for storage, size in kept.items() if storage not in known)
    del loss
    return total


def _step(model: Any, batch: Any) -> Any:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return run


def train(name: str, rounds: int) -> dict[str, Any]:
    """Time a training step of a model with LoRA on all linear layers.

    Args:
        name: the case of `benchmarks.compare`.
        rounds: timed steps of each side.

    Returns:
        The entry.
    """
    from peft import LoraConfig, get_peft_model

    base, batches = case(name)
    batch: Any = {**batches[0], "labels": batches[0]["input_ids"]}
    config = LoraConfig(r=TRAIN_RANK, lora_alpha=TRAIN_RANK, lora_dropout=TRAIN_DROPOUT, target_modules="all-linear")
    models: dict[str, Any] = {"peft": get_peft_model(copy.deepcopy(base), config).train()}  # type: ignore[arg-type]
    models["ours"], models["ungrouped"] = copy.deepcopy(models["peft"]), copy.deepcopy(models["peft"])
    report = lk.accelerate(models["ours"], strict=True, guard=False)
    lk.accelerate(models["ungrouped"], strict=True, guard=False, group=False)
    losses = {side: float(model.eval()(**batch).loss.detach()) for side, model in models.items()}
    for model in models.values():
        model.enable_input_require_grads()
        model.train()
    frozen: Any = base.train().requires_grad_(False)
    frozen.enable_input_require_grads()
    steps = {side: _step(model, batch) for side, model in models.items()}
    for run in steps.values():
        run()  # groups take effect after the first step
    if not lk.training.groups(models["ours"]):
        raise SystemExit("no layers were found to read the same tensor")
    saved = {side: _saved(model, batch) for side, model in {**models, "base": frozen}.items()}

    times = records.interleaved(steps, rounds)
    adapters = {side: saved[side] - saved["base"] for side in models}
    return {
        "case": name,
        "layers": len(report.layers),
        "rank": TRAIN_RANK,
        "dropout": TRAIN_DROPOUT,
        "loss": losses,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "ungrouped_over_ours": times["ungrouped"]["p50"] / times["ours"]["p50"],
        "bytes_saved_for_adapters": adapters,
        "bytes_ratio": adapters["ours"] / adapters["peft"],
    }


def show(record: dict[str, Any]) -> None:
    """Print a record."""
    table = Table(
        "tokens, n -> m", "r", "dropout", "base", "PEFT", "ours", "PEFT / ours", "ours / base", "FLOPs / base"
    )
    for each in record["layers"]:
        seconds = [f"{1e3 * each['seconds'][side]['p50']:.1f} ms" for side in ("base", "peft", "ours")]
        shape = f"{each['tokens']}, {each['n']} -> {each['m']}"
        ratios = [f"{each[key]:.2f}" for key in ("peft_over_ours", "ours_over_base", "floor_over_base")]
        table.add_row(shape, str(each["rank"]), f"{each['dropout']:g}", *seconds, *ratios)
    CONSOLE.print(table)
    step = record["step"]
    CONSOLE.print(
        f"training step ({step['case']}): PEFT {step['seconds']['peft']['p50']:.2f} s, ours "
        f"{step['seconds']['ours']['p50']:.2f} s, ratio {step['peft_over_ours']:.2f} (groups: "
        f"{step['ungrouped_over_ours']:.2f}); bytes saved for the adapters: "
        f"{step['bytes_ratio']:.2f} of PEFT's"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and write its record.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=["small", "llama"], default="small", help="model of the training step")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-rounds", type=int, default=5, help="timed training steps of each side")
    parser.add_argument("--form", default="auto", help=f"of the large products: auto, {', '.join(table.FORMS)}")
    parser.add_argument("--quick", action="store_true", help="one shape, one rank")
    parser.add_argument("--out", type=type(records.RESULTS), default=records.RESULTS, help="folder for the record")
    options = parser.parse_args(arguments)
    shapes, ranks = (SHAPES[:1], RANKS[1:2]) if options.quick else (SHAPES, RANKS)
    cases = GROUPS[-1:] if options.quick else GROUPS
    with lk.ops.use_form(options.form):
        record = {
            "layers": layers(options.tokens, shapes, ranks, options.rounds),
            "groups": groups(cases, TRAIN_RANK, options.rounds),
            "step": train(options.case, options.step_rounds),
        }
    show(record)
    CONSOLE.print(f"record: {records.save('lora_linear', record, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
