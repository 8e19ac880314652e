"""LoRA layers as PEFT makes them, accelerated, compiled, and written by hand; for any device and dtype."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks.rates import Floor, Rates

PEERS = {"peft": "PEFT", "compiled": "torch.compile of PEFT", "hand_written": "hand-written addmm"}


class _One(nn.Module):
    def __init__(self, n: int, m: int, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(n, m, bias=bias, device=device, dtype=dtype)


def stock(
    n: int,
    m: int,
    rank: int,
    dropout: float,
    device: torch.device,
    dtype: torch.dtype,
    *,
    wide: bool = False,
    bias: bool = False,
    dora: bool = False,
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
        bias: whether the base layer has one.
        dora: whether it is a DoRA layer.

    Returns:
        The layer.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=["linear"], use_dora=dora)
    model: Any = get_peft_model(_One(n, m, bias, device, dtype), config, autocast_adapter_dtype=wide)  # type: ignore[arg-type]
    layer = model.train().base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer


def adapted(base: nn.Module, rank: int, dropout: float) -> Any:
    """PEFT's model on a copy of `base`: adapters on all linear layers, their B not zero.

    With B = 0 the gradient of A would say nothing.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules="all-linear")
    model: Any = get_peft_model(shared_copy(base), config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def shared_copy(module: Any) -> Any:
    """A copy with the frozen parameters of the original: what all sides only read is in memory once."""
    frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, frozen)


def fused(layer: Any) -> Any:
    """An accelerated copy."""
    holder = nn.Module()
    holder.linear = shared_copy(layer)
    lk.accelerate(holder, strict=True, guard=False)
    return holder.linear


def compiled(module: Any) -> Any:
    """`torch.compile` of a copy; the caller ends its life with `torch._dynamo.reset()`.

    As one graph: a compiler that gives up would time PEFT's own code under another name.
    """
    torch._dynamo.reset()
    return torch.compile(shared_copy(module), fullgraph=True, dynamic=False)


class HandWritten(torch.autograd.Function):
    """The layer as hand-written passes of the library: products added into the result.

    Of the tensors of the size of x one is kept, and t is computed again. So go unsloth's and liger's kernels, which
    take no dropout. With dropout, the product of the adapter has an input of its own, made by torch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """`x W^T + bias + s d A^T B^T`, where d is x without dropout."""
        source = x if dropped is None else dropped
        ctx.save_for_backward(source, weight, a, b)
        ctx.scaling, ctx.one_input = scaling, dropped is None
        y = torch.mm(x, weight.mT) if bias is None else torch.addmm(bias, x, weight.mT)
        return y.addmm_(source @ a.mT, b.mT, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Of x, d, the bias, A and B."""
        source, weight, a, b = ctx.saved_tensors
        u = g @ b
        grad_b = (g.mT @ (source @ a.mT)).mul_(ctx.scaling)
        grad_a = (u.mT @ source).mul_(ctx.scaling)
        grad_bias = g.sum(0) if ctx.needs_input_grad[3] else None
        grad_x = torch.mm(g, weight) if ctx.needs_input_grad[0] else None
        if not ctx.one_input:
            grad_d = (u @ a).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
            return grad_x, grad_d, None, grad_bias, grad_a, grad_b, None
        if grad_x is not None:
            grad_x.addmm_(u, a, alpha=ctx.scaling)
        return grad_x, None, None, grad_bias, grad_a, grad_b, None


def _hand_written_forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    drop, scaling = self.lora_dropout["default"], self.scaling["default"]
    flat = x.flatten(0, -2)
    dropped = drop(flat) if self.training and isinstance(drop, nn.Dropout) else None
    a, b = (getattr(self, f"lora_{which}")["default"].weight.to(x.dtype) for which in "AB")
    bias, more = self.base_layer.bias, self.lora_B["default"].bias
    if more is not None:  # of B itself: a bias like the layer's
        bias = scaling * more if bias is None else bias + scaling * more
    bias = None if bias is None else bias.to(x.dtype)
    y: torch.Tensor = HandWritten.apply(flat, dropped, self.base_layer.weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
    return y.unflatten(0, x.shape[:-1])


def hand_written(module: Any) -> Any:
    """A copy of a layer, or of a model, whose LoRA layers run `HandWritten`."""
    model = shared_copy(module)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.forward = types.MethodType(_hand_written_forward, layer)
    return model


def gradients(y: Any, leaves: Sequence[torch.Tensor], g: Any) -> list[torch.Tensor]:
    """Outputs and gradients, whatever keeps a graph let go."""
    grads = torch.autograd.grad(y, leaves, g)
    return [*(output.detach() for output in (y if isinstance(y, (list, tuple)) else [y])), *grads]


def both_ways(layer: Any, x: torch.Tensor, g: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A call of a layer forward and backward: its output and the gradients of x and of what is trained."""
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: gradients(layer(x), leaves, g)


def floor(rates: Rates | None, tokens: int, n: int, m: int, rank: int, dtype: torch.dtype) -> Floor:
    """Of a layer, forward and backward: two products of the base layer, six of rank r.

    Forward reads x and W and writes y; backward reads g, W and x and writes dx.
    """
    flops = 4.0 * tokens * n * m + 6.0 * tokens * rank * (n + m)
    moved = dtype.itemsize * (2.0 * tokens * m + 2.0 * n * m + 3.0 * tokens * n)
    return Floor(flops, moved, rates, str(dtype).removeprefix("torch."))


Answer = tuple[float, list[torch.Tensor]]


def answers(sides: Mapping[str, Any], batch: Any, *, training: bool = False) -> dict[str, Answer]:
    """Per model, its loss and the gradients of its adapters; dropout is off but in `training`."""
    results = {}
    for name, model in sides.items():
        model.train(training)
        loss = model(**batch).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        results[name] = float(loss.detach()), list(torch.autograd.grad(loss, trained))
        model.train()
    return results


def deviations(one: Answer, two: Answer) -> list[float]:
    """Relative differences of two answers: of the losses, then of each gradient."""
    gradients = (relative(mine, theirs) for mine, theirs in zip(one[1], two[1], strict=True))
    return [abs(one[0] - two[0]) / abs(two[0]), *gradients]


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    """Norm of the difference over that of the second, in float64."""
    one, two = one.double(), two.double()
    return float((one - two).norm() / two.norm())


def largest(values: Iterable[float]) -> float:
    """The largest; NaN if one is NaN, which `max` may pass over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def trainer(model: Any, batch: Any) -> Callable[[], None]:
    """A training step: forward, backward and AdamW of what is trained."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step
