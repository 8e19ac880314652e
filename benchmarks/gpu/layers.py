"""LoRA layers: which form of their large products, alone and in groups, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks.gpu import timing
from benchmarks.gpu.part import Run, relative_error
from lora_kernels.ops.lora_linear import forms, reference, table
from lora_kernels.ops.lora_linear.op import linear_dispatcher

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 11008), (11008, 4096))
RANKS, DROPOUTS = (16, 64, 8), (0.0, 0.05)
# n, and m of each layer: query, key and value (with fewer heads), gate and up.
GROUPS = ((4096, (4096, 1024, 1024)), (4096, (4096, 4096, 4096)), (4096, (14336, 14336)))
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
            "product": each.key.product,
            "choice": each.choice.name,
            "seconds_by_form": dict(each.seconds),
            "errors": dict(each.errors),
            "refused": dict(each.refused),
            "over_product_alone": each.seconds[each.choice.name] / each.seconds["mm"],
        }
        for each in report
    ]
    for each in products:
        print(f"  {each['product']}: {each['choice']}, {each['over_product_alone']:.3f} of the product alone")
    wrong = [name for each in report for name in each.wrong]
    return {"products": products, **({"error": f"wrong numbers: {wrong}"} if wrong else {})}


class Cublas(torch.autograd.Function):
    """The layer as hand-written passes of the library: products added into the result, no dropout, no bias.

    x, the weights and nothing else are kept; t is computed again. This is how unsloth's kernels go.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """`x W^T + s x A^T B^T`."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return torch.mm(x, weight.mT).addmm_(x @ a.mT, b.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x, A and B."""
        x, weight, a, b = ctx.saved_tensors
        u = g @ b
        grad_b = (g.mT @ (x @ a.mT)).mul_(ctx.scaling)
        grad_a = (u.mT @ x).mul_(ctx.scaling)
        grad_x = torch.mm(g, weight).addmm_(u, a, alpha=ctx.scaling)
        return grad_x, None, grad_a, grad_b, None


class _One(nn.Module):
    def __init__(self, n: int, m: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(n, m, bias=False, device=device, dtype=dtype)


def stock(run: Run, n: int, m: int, rank: int, dropout: float, wide: bool) -> Any:
    """PEFT's layer in bfloat16, its adapter in bfloat16 or (PEFT's default) in float32."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["linear"])
    model: Any = get_peft_model(_One(n, m, run.device, torch.bfloat16), config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
    layer = model.train().base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def fused(layer: Any) -> Any:
    """An accelerated copy."""
    holder = nn.Module()
    holder.linear = copy.deepcopy(layer)
    lk.accelerate(holder, strict=True, guard=False, group=False)
    return holder.linear


def _gradients(y: Any, leaves: Sequence[torch.Tensor], g: Any) -> list[torch.Tensor]:
    """Outputs and gradients, whatever keeps a graph let go."""
    grads = torch.autograd.grad(y, leaves, g)
    return [*(each.detach() for each in (y if isinstance(y, (list, tuple)) else [y])), *grads]


def _truth(
    x: torch.Tensor, members: Sequence[tuple[torch.Tensor, ...]], gs: Sequence[torch.Tensor], s: float, drops: Any
) -> list[torch.Tensor]:
    """Outputs and the gradients of x and all factors in float64."""
    leaf = x.detach().double().requires_grad_()
    factors = [[each.detach().double().requires_grad_() for each in (a, b)] for _, a, b in members]
    ys = [
        reference.lora_linear(leaf, w.double(), None, a, b, scaling=s, dropout=drop)
        for (w, _, _), (a, b), drop in zip(members, factors, drops, strict=True)
    ]
    return _gradients(ys, [leaf, *(each for pair in factors for each in pair)], [g.double() for g in gs])


def _worst(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    errors = [relative_error(one, other) for one, other in zip(found, truth, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _backward(layer: Any, x: torch.Tensor, g: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    leaves = [x, *(each for each in layer.parameters() if each.requires_grad)]
    return lambda: _gradients(layer(x), leaves, g)


def _layer_floor(run: Run, tokens: int, n: int, outputs: Sequence[int], rank: int) -> timing.Floor:
    """Forward: x, W, y; backward: g, W, x, dx. Two products of the base layer, six of rank r."""
    flops = sum(4.0 * tokens * n * m + 6.0 * tokens * rank * (n + m) for m in outputs)
    moved = 2.0 * sum(2 * tokens * m + 2 * n * m for m in outputs) + 2.0 * 3 * tokens * n
    return timing.Floor(flops, moved, run.rates)


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
    sides = {"peft": stock(run, n, m, rank, dropout, False), "peft_float32": stock(run, n, m, rank, dropout, True)}
    sides |= {"ours": fused(sides["peft"]), "ours_float32": fused(sides["peft_float32"])}
    weight = sides["peft"].base_layer.weight.detach()
    scaling = sides["peft"].scaling["default"]
    a, b = (getattr(sides["ours"], f"lora_{which}")["default"].weight for which in "AB")

    def cublas() -> list[torch.Tensor]:
        return _gradients(Cublas.apply(x, weight, a, b, scaling), [x, a, b], g)  # type: ignore[no-untyped-call]

    def base() -> list[torch.Tensor]:
        return _gradients(nn.functional.linear(x, weight), [x], g)

    calls = {name: _backward(layer, x, g) for name, layer in sides.items()}
    # Without dropout all sides have one answer (the adapters in float32 hold others, unrounded: a truth of their own).
    for layer in sides.values():
        layer.eval()
    errors: dict[str, float] = {}
    for suffix in ("", "_float32"):
        factors = [getattr(sides[f"ours{suffix}"], f"lora_{which}")["default"].weight for which in "AB"]
        truth = _truth(x, [(weight, *factors)], [g], scaling, [None])
        errors |= {name + suffix: _worst(calls[name + suffix](), truth) for name in ("peft", "ours")}
        if not suffix:
            errors["cublas"] = _worst(cublas(), truth)
    if dropout:  # with its mask, which PEFT cannot be given
        drop = lk.ops.Dropout(dropout, 1234, 5)
        truth = _truth(x, [(weight, a, b)], [g], scaling, [drop])
        y = lk.ops.lora_linear(x, weight, None, a, b, scaling=scaling, dropout=drop)
        errors["ours_dropped"] = _worst(_gradients(y, [x, a, b], g), truth)
    for layer in sides.values():
        layer.train()
    del truth
    # PEFT multiplies float32 adapters in float32, ours in bfloat16: the bar is what bfloat16 costs PEFT.
    calls["base"] = base
    if not dropout:
        calls["cublas"] = cublas
    found = run.compare(calls, errors, judge="peft", floor=_layer_floor(run, tokens, n, (m,), rank))
    if "error" not in found:
        found["forms"] = _forms(x, m, rank, dropout)
        found["peak_bytes"] = {name: timing.peak_bytes(call, run.device) for name, call in calls.items()}
    return found


def _forms(x: torch.Tensor, m: int, rank: int, dropout: float) -> dict[str, str]:
    backend = linear_dispatcher.choose("auto", x.device, x.dtype, dropout > 0)
    sizes = (x.shape[0], x.shape[1], m)
    return {
        product: forms.choose(
            product, x.device, x.dtype, sizes, rank, dropout > 0 and product == "backward", backend
        ).name
        for product in table.PRODUCTS
    }


def groups(run: Run) -> None:
    """Layers that read the same x: together, one by one, and by the library's passes."""
    cases = run.pick(GROUPS, ((48, (64, 32)),))
    tokens = run.pick(TOKENS, 96)
    run.each(
        [
            {"tokens": tokens, "n": n, "outputs": list(outputs), "rank": rank, "dropout": dropout}
            for n, outputs in cases
            for rank in run.pick((16, 64), (16,))
            for dropout in DROPOUTS
        ],
        _group,
    )


def _group(run: Run, tokens: int, n: int, outputs: list[int], rank: int, dropout: float) -> dict[str, Any]:
    x, scaling = run.normal(tokens, n).requires_grad_(), 2.0
    gs = [run.normal(tokens, m) for m in outputs]
    drops = [lk.ops.Dropout(dropout, 77, index) if dropout else None for index in range(len(outputs))]
    weights = [
        (
            run.normal(m, n, scale=n**-0.5),
            run.normal(rank, n, scale=n**-0.5).requires_grad_(),
            run.normal(m, rank, scale=0.1).requires_grad_(),
        )
        for m in outputs
    ]
    members = [lk.ops.LoraMember(w, None, a, b, scaling, drop) for (w, a, b), drop in zip(weights, drops, strict=True)]
    leaves = [x, *(factor for _, a, b in weights for factor in (a, b))]

    def ours() -> list[torch.Tensor]:
        return _gradients(lk.ops.lora_linear_group(x, members), leaves, gs)

    def alone() -> list[torch.Tensor]:
        ys = [y for each in members for y in lk.ops.lora_linear_group(x, [each])]
        return _gradients(ys, leaves, gs)

    def cublas() -> list[torch.Tensor]:
        ys = [Cublas.apply(x, *each, scaling) for each in weights]  # type: ignore[no-untyped-call]
        return _gradients(ys, leaves, gs)

    plain = _truth(x, weights, gs, scaling, [None] * len(weights)) if dropout else None
    truth = _truth(x, weights, gs, scaling, drops)
    errors = {"ours": _worst(ours(), truth), "ours_alone": _worst(alone(), truth)}
    errors["cublas"] = _worst(cublas(), truth if plain is None else plain)
    del truth, plain
    calls = {"ours": ours, "ours_alone": alone, "cublas_without_dropout": cublas}
    found = run.compare(calls, errors, judge="cublas", floor=_layer_floor(run, tokens, n, outputs, rank))
    if "error" not in found:
        found["peak_bytes"] = {name: timing.peak_bytes(call, run.device) for name, call in calls.items()}
    return found
