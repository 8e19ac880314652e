"""LoRA layers: which form of their large products, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import lora_layers
from benchmarks.gpu import timing
from benchmarks.gpu.part import Run, relative_error
from benchmarks.lora_layers import gradients
from lora_kernels.ops.lora_linear import forms, reference, table
from lora_kernels.ops.lora_linear.op import layer as layer_op

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 11008), (11008, 4096))
RANKS, DROPOUTS = (16, 64, 8), (0.0, 0.05)
TINY = ((48, 64), (64, 48))


def tune(run: Run) -> None:
    """Write `tuned.json` for these shapes, without dropout and then with it."""
    shapes = run.pick(SHAPES, TINY[:1])
    run.each([{"n": n, "m": m, "dropout": drops} for drops in (False, True) for n, m in shapes], _tuned)
    run.record["note"] = "tuned.json can be committed as lora_kernels/ops/lora_linear/tuned.json"


def _tuned(run: Run, n: int, m: int, dropout: bool) -> dict[str, Any]:
    report = lk.tune(
        [(n, m)], tokens=run.pick(TOKENS, 64), rank=16, dtype=torch.bfloat16, dropout=dropout, device=run.device,
        rounds=run.pick(20, 2), out=run.folder / "tuned.json",
    )  # fmt: skip
    products = [
        {
            "product": product.key.product,
            "choice": product.choice.name,
            "seconds_by_form": dict(product.seconds),
            "errors": dict(product.errors),
            "refused": dict(product.refused),
            "over_product_alone": product.seconds[product.choice.name] / product.seconds["mm"],
        }
        for product in report
    ]
    for product in products:
        print(f"  {product['product']}: {product['choice']}, {product['over_product_alone']:.3f} of the product alone")
    wrong = [name for product in report for name in product.wrong]
    return {"products": products, **({"error": f"wrong numbers: {wrong}"} if wrong else {})}


def _used_forms(x: torch.Tensor, m: int, rank: int, dropout: float) -> dict[str, str]:
    """In which form our layer's large products run."""
    backend = layer_op.choose("auto", x.device, x.dtype, dropout > 0)
    sizes = (x.shape[0], x.shape[1], m)
    return {
        product: forms.choose(
            product, x.device, x.dtype, sizes, rank, dropout > 0 and product == "backward", backend
        ).name
        for product in table.PRODUCTS
    }


def _truth(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, g: torch.Tensor, s: float, drop: Any
) -> list[torch.Tensor]:
    """Output and the gradients of x, A and B in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    y = reference.lora_linear(leaves[0], weight.double(), None, *leaves[1:], scaling=s, dropout=drop)
    return gradients(y, leaves, g.double())


def worst(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest relative error; NaN if one is."""
    errors = [relative_error(one, other) for one, other in zip(found, truth, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def layers(run: Run) -> None:
    """PEFT's layer with both kinds of adapters, the library's passes, and ours."""
    shapes, tokens = run.pick(SHAPES, TINY), run.pick(TOKENS, 96)
    ranks, drops = run.pick(RANKS, RANKS[:1]), DROPOUTS
    run.each(
        [
            {"tokens": tokens, "n": n, "m": m, "rank": rank, "dropout": dropout}
            for rank in ranks
            for n, m in shapes
            for dropout in drops
        ],
        _layer,
    )


def _layer(run: Run, tokens: int, n: int, m: int, rank: int, dropout: float) -> dict[str, Any]:
    x, g = run.normal(tokens, n).requires_grad_(), run.normal(tokens, m)
    sides = {
        name: lora_layers.stock(n, m, rank, dropout, run.device, torch.bfloat16, wide=wide)
        for name, wide in (("peft", False), ("peft_float32", True))
    }
    sides |= {name.replace("peft", "ours"): lora_layers.fused(layer) for name, layer in sides.items()}
    sides["hand_written"] = lora_layers.hand_written(sides["peft"])
    weight = sides["peft"].base_layer.weight.detach()
    scaling = sides["peft"].scaling["default"]
    a, b = (getattr(sides["ours"], f"lora_{which}")["default"].weight for which in "AB")

    def base() -> list[torch.Tensor]:
        return gradients(nn.functional.linear(x, weight), [x], g)

    calls = {name: lora_layers.both_ways(layer, x, g) for name, layer in sides.items()}
    # Without dropout all sides have one answer (the adapters in float32 hold others, unrounded: a truth of their own).
    for layer in sides.values():
        layer.eval()
    errors: dict[str, float] = {}
    for suffix in ("", "_float32"):
        factors = [getattr(sides[f"ours{suffix}"], f"lora_{which}")["default"].weight for which in "AB"]
        truth = _truth(x, weight, *factors, g, scaling, None)
        errors |= {name + suffix: worst(calls[name + suffix](), truth) for name in ("peft", "ours")}
        if not suffix:
            errors["hand_written"] = worst(calls["hand_written"](), truth)
    if dropout:  # with its mask, which PEFT cannot be given
        drop = lk.ops.Dropout(dropout, 1234, 5)
        truth = _truth(x, weight, a, b, g, scaling, drop)
        y = lk.ops.lora_linear(x, weight, None, a, b, scaling=scaling, dropout=drop)
        errors["ours_dropped"] = worst(gradients(y, [x, a, b], g), truth)
    for layer in sides.values():
        layer.train()
    del truth
    # PEFT multiplies float32 adapters in float32, ours in bfloat16: the bar is what bfloat16 costs PEFT.
    calls["base"] = base
    entry = run.compare(calls, errors, judge="peft", floor=lora_layers.floor(run.rates, tokens, n, m, rank, x.dtype))
    if "error" not in entry:
        entry["forms"] = _used_forms(x, m, rank, dropout)
        entry["peak_bytes"] = {name: timing.peak_bytes(call, run.device) for name, call in calls.items()}
    return entry
