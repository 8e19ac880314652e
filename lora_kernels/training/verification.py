"""`verify`: the fused layers against PEFT's own and against float64, on the user's batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from lora_kernels.reports import Printed
from lora_kernels.statistics.distributed import unwrap
from lora_kernels.statistics.feed import call_model, model_device, to_device
from lora_kernels.statistics.loss import model_loss
from lora_kernels.statistics.modes import evaluation_mode
from lora_kernels.training import grouping
from lora_kernels.training.acceleration import lora_layers, reference_mode
from lora_kernels.training.lora_layer import Adapter, FusedForward, active, base_is_fused, eager_reason

PARTS = ("y", "dx", "dA", "dB", "dc", "dm")
# An error this much larger than PEFT's is a failure.
LIMIT = 2.0
_LEEWAY = {"dc": 8.0}


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors (Frobenius, against float64) of one layer.

    Attributes:
        name: the layer.
        fused: by part (`y`, `dx`, `dA`, `dB`, and `dc` of coordinates such as LoRA-Dash's), of the fused layer.
        stock: of PEFT's.
    """

    name: str
    fused: Mapping[str, float]
    stock: Mapping[str, float]

    def ratio(self, floor: float) -> float:
        """The largest error of the fused layer over PEFT's; errors below `floor` count as it.

        The gradient of a few coordinates (`dc`) has an error that no average steadies: below 8 times that.
        """
        floors = {part: floor * _LEEWAY.get(part, 1.0) for part in self.fused}
        return max(max(self.fused[part], least) / max(self.stock[part], least) for part, least in floors.items())


@dataclass(frozen=True)
class VerifyReport(Printed):
    """What `verify` found.

    Attributes:
        layers: by layer, in the model's order.
        skipped: layers that run PEFT's own forward, and why.
        loss: the model's loss, fused and stock, or NaN.
        floor: rounding of the arithmetic's dtype: errors below it are alike.
    """

    layers: tuple[LayerErrors, ...]
    skipped: Mapping[str, str]
    loss: tuple[float, float]
    floor: float

    def __iter__(self) -> Iterator[LayerErrors]:
        """The layers."""
        return iter(self.layers)

    @property
    def ok(self) -> bool:
        """Whether no error is more than `LIMIT` times PEFT's."""
        return all(each.ratio(self.floor) <= LIMIT for each in self.layers)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table and the verdict.

        Yields:
            What rich prints.
        """
        table = Table("layer", *(f"{part}: fused / stock" for part in PARTS), "ratio", title="errors against float64")
        for each in self.layers:
            cells = [f"{each.fused[part]:.1e} / {each.stock[part]:.1e}" if part in each.fused else "" for part in PARTS]
            table.add_row(each.name, *cells, f"{each.ratio(self.floor):.2f}")
        for name, why in self.skipped.items():
            table.add_row(name, *[""] * len(PARTS), f"eager: {why}")
        yield table
        worst = max((each.ratio(self.floor) for each in self.layers), default=0.0)
        verdict = "as accurate as PEFT" if self.ok else f"LESS ACCURATE than {LIMIT:g} times PEFT's error"
        yield Text(
            f"{len(self.layers)} layers, worst ratio {worst:.2f}: {verdict}; "
            f"loss {self.loss[0]:.6g} fused, {self.loss[1]:.6g} stock"
        )


def verify(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> VerifyReport:
    """Compare every accelerated layer with PEFT's own on the inputs and output gradients that a batch gives it.

    The batch runs forward and backward through PEFT's layers; each layer, together with those that read the same
    tensor, is then run by itself, fused, by PEFT, and in float64. In evaluation mode, since two dropout masks cannot be
    compared. Where the base layer computes its own product (quantized bases), that product is taken as it is on all
    three sides. The model is left as it was.

    Args:
        model: accelerated (`lora_kernels.accelerate`).
        batch: with labels, or whatever `loss` needs; inputs and output gradients of all layers are held at once.
        forward: calls the model; by default a mapping is given as keywords.
        loss: from outputs and batch; by default the model's own.

    Returns:
        The errors by layer.

    Raises:
        TypeError: if the model or a function is none.
        ValueError: if no layer is accelerated, or the loss reaches none.
    """
    model = unwrap(model)
    for name, function in (("forward", forward), ("loss", loss)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {type(function).__name__}")
    every = lora_layers(model)
    skipped = {name: why for name, layer in every if (why := _skipped(layer)) is not None}
    layers = {name: layer for name, layer in every if name not in skipped}
    if not layers:
        raise ValueError("no layer of the model is accelerated: call lora_kernels.accelerate(model) first")
    batch = to_device(batch, model_device(model))
    grads = [(each, each.grad) for each in model.parameters()]
    try:
        with evaluation_mode(model, gradients=True):
            for each, _ in grads:
                each.grad = None
            seen, stock_loss = _observe(model, layers, batch, forward or call_model, loss or model_loss)
            fused_loss = _loss_alone(model, batch, forward or call_model, loss or model_loss)
            found = tuple(each for unit in _units(seen, layers) for each in _errors(unit))
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
    if not found:
        raise ValueError("the loss reaches no accelerated layer")
    dtype = max((pair[0].dtype for pair in seen.values()), key=lambda each: torch.finfo(each).eps)
    return VerifyReport(found, skipped, (fused_loss, stock_loss), torch.finfo(dtype).eps / 2)


def _skipped(layer: Any) -> str | None:
    if not isinstance(layer, FusedForward):
        return "not accelerated"
    stock: Any = layer
    if stock.disable_adapters or stock.merged:
        return "adapters are merged or disabled"
    return eager_reason(layer)


def _observe(
    model: nn.Module, layers: Mapping[str, Any], batch: Any, forward: Callable[..., Any], loss: Callable[..., Any]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor | None]], float]:
    """Input and output gradient of every layer (of its last call), from a pass through PEFT's own forward."""
    inputs: dict[str, torch.Tensor] = {}
    outgoing: dict[str, torch.Tensor] = {}

    def tap(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: torch.Tensor) -> None:
            inputs[name] = args[0]
            if output.requires_grad:
                output.register_hook(lambda g: outgoing.__setitem__(name, g.detach()))  # type: ignore[no-untyped-call]

        return hook

    handles = [layer.register_forward_hook(tap(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad(), reference_mode(model):
            value = loss(forward(model, batch), batch)
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (x, outgoing.get(name)) for name, x in inputs.items()}, float(value.detach())


def _loss_alone(model: nn.Module, batch: Any, forward: Callable[..., Any], loss: Callable[..., Any]) -> float:
    with torch.no_grad():
        return float(loss(forward(model, batch), batch))


def _units(
    seen: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], layers: Mapping[str, Any]
) -> list[list[tuple[str, Any, torch.Tensor, torch.Tensor]]]:
    """Layers that the loss reaches, those together that were given the same tensor one after the other."""
    units: list[list[tuple[str, Any, torch.Tensor, torch.Tensor]]] = []
    for name, (x, g) in seen.items():
        if g is None:
            continue
        if not units or units[-1][0][2] is not x:
            units.append([])
        units[-1].append((name, layers[name], x, g))
    return units


def _errors(unit: Sequence[tuple[str, Any, torch.Tensor, torch.Tensor]]) -> list[LayerErrors]:
    layers, x, gs = [each[1] for each in unit], unit[0][2].detach(), [each[3] for each in unit]
    truth = [_truth(layer, x, g) for layer, g in zip(layers, gs, strict=True)]
    for each in truth[1:]:
        truth[0]["dx"] += each["dx"]
    for each in truth[1:]:
        each["dx"] = truth[0]["dx"]
    with grouping.afresh(layers):
        fused = _run(layers, x, gs)
        if len(layers) > 1:  # once more, now that it is known that they read the same tensor
            grouping.settle(layers)
            fused = _run(layers, x, gs)
    with reference_mode(*layers):
        stock = _run(layers, x, gs)
    return [
        LayerErrors(
            name, *({part: _relative(made[i][part], truth[i][part]) for part in truth[i]} for made in (fused, stock))
        )
        for i, (name, *_) in enumerate(unit)
    ]


def _relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    size = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(found.to(torch.float64) - truth))
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def _leaves(adapter: Adapter) -> dict[str, torch.Tensor]:
    """What an adapter is made of, by the gradients' names."""
    found = {"dA": adapter.a, "dB": adapter.b}
    extension = adapter.extension
    if extension is not None and extension.left is not None and extension.coordinates is not None:
        found["dc"] = extension.coordinates
    if adapter.magnitude is not None:
        found["dm"] = adapter.magnitude
    return found


def _trained(layer: Any) -> dict[str, torch.Tensor]:
    """What gets gradients of a layer's first adapter, by the gradients' names."""
    return {part: each for part, each in _leaves(active(layer)[0]).items() if each.requires_grad}


def _run(layers: Sequence[Any], x: torch.Tensor, gs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_(True)
    trained = [_trained(layer) for layer in layers]
    wanted = [x, *(each for own in trained for each in own.values())]
    with torch.enable_grad():
        outputs = [layer(x) for layer in layers]
        found = torch.autograd.grad(outputs, wanted, [g.to(y.dtype) for y, g in zip(outputs, gs, strict=True)])
    grads, dx = iter(found[1:]), found[0]
    return [
        {"y": y.detach(), "dx": dx, **{part: next(grads) for part in own}}
        for y, own in zip(outputs, trained, strict=True)
    ]


def _truth(layer: Any, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same in float64; of a base that computes its own product, that product."""
    rows = x.to(torch.float64).requires_grad_(True)
    adapters = active(layer)
    base, wanted = layer.base_layer, {}
    with torch.enable_grad():
        if base_is_fused(layer):
            bias = None if base.bias is None else base.bias.to(torch.float64)
            y = nn.functional.linear(rows, base.weight.detach().to(torch.float64), bias)
            shift = torch.zeros((), dtype=torch.float64, device=x.device)
        else:
            start = x.clone().requires_grad_(True)
            product = base(start)
            (shift,) = torch.autograd.grad(product, start, g.to(product.dtype))
            y, shift = product.detach().to(torch.float64), shift.to(torch.float64)
        for index, each in enumerate(adapters):
            own = {part: value.detach().to(torch.float64) for part, value in _leaves(each).items()}
            if index == 0:
                wanted = {part: own[part].requires_grad_(True) for part in _trained(layer)}
            y = y + each.scaling * (rows @ own["dA"].mT @ own["dB"].mT)
            if each.bias is not None:
                y = y + each.scaling * each.bias.to(torch.float64)
            if each.extension is not None and each.extension.left is not None and each.extension.right is not None:
                left, right = each.extension.left.to(torch.float64), each.extension.right.to(torch.float64)
                y = y + (rows @ right.mT * own["dc"]) @ left.mT
            if each.magnitude is not None:
                whole = base.weight.detach().to(torch.float64) + each.scaling * own["dB"].detach() @ own["dA"].detach()
                bias = torch.zeros(()) if base.bias is None else base.bias.to(torch.float64)
                y = (y - bias) * (own["dm"] / torch.linalg.vector_norm(whole, dim=1)) + bias
        dx, *rest = torch.autograd.grad(y, [rows, *wanted.values()], g.to(torch.float64))
    return {"y": y.detach(), "dx": dx + shift, **dict(zip(wanted, rest, strict=True))}
