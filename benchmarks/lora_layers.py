"""LoRA layers as PEFT makes them, accelerated, compiled, and written by hand; for any device and dtype."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks.rates import Floor, Rates
from lora_kernels.ops.lora_linear import forms, table
from lora_kernels.ops.lora_linear.op import linear_dispatcher


class _One(nn.Module):
    def __init__(self, n: int, m: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(n, m, bias=False, device=device, dtype=dtype)


def stock(
    n: int, m: int, rank: int, dropout: float, device: torch.device, dtype: torch.dtype, wide: bool = False
) -> Any:
    """PEFT's layer, in training, its B no longer zero.

    Args:
        n: inputs.
        m: outputs.
        rank: of the adapter.
        dropout: of its input.
        device: where.
        dtype: of the base layer.
        wide: whether the adapter is float32 (PEFT's default) instead of `dtype`.

    Returns:
        The layer.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["linear"])
    model: Any = get_peft_model(_One(n, m, device, dtype), config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
    layer = model.train().base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def fused(layer: Any) -> Any:
    """An accelerated copy."""
    holder = nn.Module()
    holder.linear = copy.deepcopy(layer)
    lk.accelerate(holder, strict=True, guard=False, group=False)
    return holder.linear


def compiled(module: Any) -> Any:
    """`torch.compile` of a copy; the caller ends its life with `torch._dynamo.reset()`.

    As one graph: a compiler that gives up would time PEFT's own code under another name.
    """
    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=False)


class HandWritten(torch.autograd.Function):
    """The layer as hand-written passes of the library: products added into the result, no bias.

    Of the tensors of the size of x one is kept, and t is computed again. So go unsloth's and liger's kernels, which
    take no dropout. With dropout, the product of the adapter has an input of its own, made by torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """`x W^T + s d A^T B^T`, where d is x without dropout."""
        source = x if dropped is None else dropped
        ctx.save_for_backward(source, weight, a, b)
        ctx.scaling, ctx.one_input = scaling, dropped is None
        return torch.mm(x, weight.mT).addmm_(source @ a.mT, b.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x, d, A and B."""
        source, weight, a, b = ctx.saved_tensors
        u = g @ b
        grad_b = (g.mT @ (source @ a.mT)).mul_(ctx.scaling)
        grad_a = (u.mT @ source).mul_(ctx.scaling)
        grad_x = torch.mm(g, weight)
        if ctx.one_input:
            return grad_x.addmm_(u, a, alpha=ctx.scaling), None, None, grad_a, grad_b, None
        return grad_x, (u @ a).mul_(ctx.scaling), None, grad_a, grad_b, None


def _hand_written_forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    drop = self.lora_dropout["default"]
    flat = x.flatten(0, -2)
    dropped = drop(flat) if self.training and isinstance(drop, nn.Dropout) else None
    a, b = (getattr(self, f"lora_{which}")["default"].weight.to(x.dtype) for which in "AB")
    inputs = (flat, dropped, self.base_layer.weight, a, b, self.scaling["default"])
    y: torch.Tensor = HandWritten.apply(*inputs)  # type: ignore[no-untyped-call]
    return y.unflatten(0, x.shape[:-1])


def hand_written(module: Any) -> Any:
    """A copy of a layer, or of a model, whose LoRA layers run `HandWritten`."""
    found = copy.deepcopy(module)
    for layer in found.modules():
        if hasattr(layer, "lora_A"):
            if layer.base_layer.bias is not None:
                raise ValueError("layer with a bias: the hand-written passes have none")
            layer.forward = types.MethodType(_hand_written_forward, layer)
    return found


def gradients(y: Any, leaves: Sequence[torch.Tensor], g: Any) -> list[torch.Tensor]:
    """Outputs and gradients, whatever keeps a graph let go."""
    grads = torch.autograd.grad(y, leaves, g)
    return [*(each.detach() for each in (y if isinstance(y, (list, tuple)) else [y])), *grads]


def both_ways(layer: Any, x: torch.Tensor, g: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A call of a layer forward and backward: its output and the gradients of x and of what is trained."""
    leaves = [x, *(each for each in layer.parameters() if each.requires_grad)]
    return lambda: gradients(layer(x), leaves, g)


def used_forms(x: torch.Tensor, m: int, rank: int, dropout: float) -> dict[str, str]:
    """In which form our layer's large products run."""
    backend = linear_dispatcher.choose("auto", x.device, x.dtype, dropout > 0)
    sizes = (x.shape[0], x.shape[1], m)
    return {
        product: forms.choose(
            product, x.device, x.dtype, sizes, rank, dropout > 0 and product == "backward", backend
        ).name
        for product in table.PRODUCTS
    }


def floor(rates: Rates | None, tokens: int, n: int, outputs: Sequence[int], rank: int, dtype: torch.dtype) -> Floor:
    """Of layers on one input, forward and backward: two products of each base layer, six of rank r.

    Forward reads x and W and writes y; backward reads g, W and x and writes dx.
    """
    flops = sum(4.0 * tokens * n * m + 6.0 * tokens * rank * (n + m) for m in outputs)
    moved = dtype.itemsize * (sum(2.0 * tokens * m + 2.0 * n * m for m in outputs) + 3.0 * tokens * n)
    return Floor(flops, moved, rates, str(dtype).removeprefix("torch."))


def trainer(model: Any, batch: Any) -> Callable[[], None]:
    """A training step: forward, backward and AdamW of what is trained."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def group(
    x: torch.Tensor, outputs: Sequence[int], rank: int, dropout: float, scaling: float = 2.0
) -> tuple[list[lk.ops.LoraMember], list[torch.Tensor]]:
    """Layers that read the same input.

    Args:
        x: `(tokens, n)`.
        outputs: of each layer.
        rank: of each.
        dropout: of their inputs.
        scaling: of each.

    Returns:
        The members, and what gets gradients: x, and the factors of each.
    """
    n = x.shape[1]

    def normal(*size: int, scale: float) -> torch.Tensor:
        return (torch.randn(*size, device=x.device) * scale).to(x.dtype)

    members = [
        lk.ops.LoraMember(
            normal(m, n, scale=n**-0.5),
            None,
            normal(rank, n, scale=n**-0.5).requires_grad_(),
            normal(m, rank, scale=0.1).requires_grad_(),
            scaling,
            lk.ops.Dropout(dropout, 77, index) if dropout else None,
        )
        for index, m in enumerate(outputs)
    ]
    return members, [x, *(factor for each in members for factor in (each.a, each.b))]
