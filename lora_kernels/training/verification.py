"""`verify`: the fused layers against PEFT's own and against float64, on the user's batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from lora_kernels.adapters.base_weight import dense_weight
from lora_kernels.adapters.view import lora_layers
from lora_kernels.reports import Layers, Report, Table, short_name
from lora_kernels.runtime.feed import call_model, model_device, to_device
from lora_kernels.runtime.loss import model_loss
from lora_kernels.runtime.modes import evaluation_mode
from lora_kernels.runtime.processes import unwrap
from lora_kernels.training.acceleration import reference_mode
from lora_kernels.training.description import Adapter, active, eager_reason, plain_linear
from lora_kernels.training.experts import FusedExperts, experts_reason
from lora_kernels.training.lora_layer import FusedForward

PARTS = ("y", "dx", "dA", "dB", "dc", "dm")
# An error this much larger than PEFT's is a failure.
LIMIT = 2.0


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors (Frobenius, against float64) of one layer, the worst of its calls.

    Attributes:
        name: the layer.
        fused: by part (`y`, `dx`, `dA`, `dB`, `dc` of coordinates such as LoRA-Dash's, `dm` of DoRA's magnitudes), of
            the fused layer.
        stock: of PEFT's.
        floors: by part, what rounding alone may amount to: errors below it are alike.
    """

    name: str
    fused: Mapping[str, float]
    stock: Mapping[str, float]
    floors: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """The largest error of the fused layer over PEFT's; errors below the floor count as it."""
        return max(max(self.fused[part], floor) / max(self.stock[part], floor) for part, floor in self.floors.items())


@dataclass(frozen=True)
class VerifyReport(Report, Layers[LayerErrors]):
    """The result of `verify`.

    Attributes:
        layers: by layer, in the model's order.
        skipped: layers that run PEFT's own forward, and why.
        loss: the model's loss, fused and stock.
    """

    layers: tuple[LayerErrors, ...]
    skipped: Mapping[str, str]
    loss: tuple[float, float]

    @property
    def ok(self) -> bool:
        """Whether no layer is less accurate than `LIMIT` times PEFT's."""
        return all(layer.ratio <= LIMIT for layer in self.layers)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = [part for part in PARTS if any(part in layer.fused for layer in self.layers)]
        table = Table("layer", *(f"{part}: fused / stock" for part in shown), "ratio", title="errors against float64")
        for layer in self.layers:
            pairs = ((layer.fused.get(part), layer.stock.get(part)) for part in shown)
            cells = ["" if fused is None else f"{fused:.1e} / {stock:.1e}" for fused, stock in pairs]
            table.add_row(short_name(layer.name), *cells, f"{layer.ratio:.2f}")
        for name, reason in self.skipped.items():
            table.add_row(short_name(name), *[""] * len(shown), f"eager: {reason}")
        yield table
        worst = max((layer.ratio for layer in self.layers), default=0.0)
        verdict = "as accurate as PEFT" if self.ok else f"LESS ACCURATE than {LIMIT:g} times PEFT's error"
        yield Text(
            f"{len(self.layers)} layers, worst ratio {worst:.2f}: {verdict}; "
            f"loss {self.loss[0]:.6g} fused, {self.loss[1]:.6g} stock"
        )


class _Call:
    """One call of a layer as the model makes it: input, gradient of the output, and autocast's dtype."""

    def __init__(self, x: torch.Tensor) -> None:
        kind = x.device.type
        self.x, self.g = x.detach(), torch.empty(0)
        self.cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def receive(self, g: torch.Tensor) -> None:
        self.g = g.detach()

    def autocast(self, *, enabled: bool = True) -> torch.autocast:
        """The state of autocast at the call, or none."""
        return torch.autocast(self.x.device.type, dtype=self.cast, enabled=enabled and self.cast is not None)


def verify(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
) -> VerifyReport:
    """Compare every accelerated layer with PEFT's own on the inputs and output gradients that a batch gives it.

    The batch runs forward and backward through PEFT's layers; every call of a layer is then repeated by itself,
    fused, by PEFT, and in float64, under the autocast that it had. In evaluation mode: two dropout masks cannot be
    compared. Where the base layer computes its own product (quantized bases), all three
    sides use that product. The model is left as it was.

    Args:
        model: accelerated (`lora_kernels.accelerate`).
        batch: with labels, or whatever `loss` needs; inputs and output gradients of all layers are held at once.
        forward: calls the model; by default a mapping is given as keywords.
        loss: from outputs and batch; by default the model's own.

    Raises:
        TypeError: if the model is not a module, or `forward` or `loss` is not callable.
        ValueError: if no layer is accelerated, none runs fused as it is now, or the loss reaches none.
    """
    model = unwrap(model)
    for name, function in (("forward", forward), ("loss", loss)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {type(function).__name__}")
    every = lora_layers(model)
    if not any(isinstance(layer, FusedForward) for _, layer in every):
        raise ValueError("no layer of the model is accelerated: call lora_kernels.accelerate(model) first")
    batch = to_device(batch, model_device(model))
    with contextlib.ExitStack() as undo:
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        undo.enter_context(evaluation_mode(model, gradients=True))
        skipped = {name: reason for name, layer in every if (reason := _skipped(layer)) is not None}
        if not (layers := {name: layer for name, layer in every if name not in skipped}):
            name, reason = next(iter(skipped.items()))
            raise ValueError(
                f"all {len(skipped)} LoRA layers run PEFT's own forward as they are now, so there is nothing to "
                f"compare (first: {name}: {reason})"
            )
        calls, stock_loss = _observe(model, layers, batch, forward or call_model, loss or model_loss)
        with torch.no_grad():
            fused_loss = float((loss or model_loss)((forward or call_model)(model, batch), batch))
        errors = tuple(_errors(name, layers[name], of_layer) for name, of_layer in calls.items())
    if not errors:
        raise ValueError("the loss reaches no accelerated layer")
    return VerifyReport(errors, skipped, (fused_loss, stock_loss))


def _skipped(layer: Any) -> str | None:
    if not isinstance(layer, FusedForward):
        return "not accelerated"
    if layer.disable_adapters or layer.merged:  # type: ignore[attr-defined]
        return "adapters are merged or disabled"
    if isinstance(layer, FusedExperts):
        return experts_reason(layer) or "experts are compared by the loss alone"
    return eager_reason(layer)


def _observe(
    model: nn.Module, layers: Mapping[str, Any], batch: Any, forward: Callable[..., Any], loss: Callable[..., Any]
) -> tuple[dict[str, list[_Call]], float]:
    """The calls of every layer that the loss reaches, from a pass through PEFT's own forward."""
    calls: dict[str, list[_Call]] = {name: [] for name in layers}

    def tap(name: str, _module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        if len(args) == 1 and not kwargs and output.requires_grad:  # other calls run PEFT's own forward
            call = _Call(args[0])
            output.register_hook(call.receive)  # type: ignore[no-untyped-call]
            calls[name].append(call)

    with contextlib.ExitStack() as hooks, torch.enable_grad(), reference_mode(model):
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(tap, name), with_kwargs=True))
        value = loss(forward(model, batch), batch)
        value.backward()
    reached = {name: [call for call in of_layer if call.g.numel()] for name, of_layer in calls.items()}
    return {name: of_layer for name, of_layer in reached.items() if of_layer}, float(value.detach())


def _errors(name: str, layer: Any, calls: Sequence[_Call]) -> LayerErrors:
    """The worst call of a layer."""
    every = []
    for call in calls:
        truth, fused = _truth(layer, call), _run(layer, call)
        with reference_mode(layer):
            stock = _run(layer, call)
        errors = [{part: _relative(side[part], truth[part]) for part in truth} for side in (fused, stock)]
        floors = {part: _floor(call, part, truth[part]) for part in truth}
        every.append(LayerErrors(name, errors[0], errors[1], floors))
    return max(every, key=lambda errors: errors.ratio)


def _relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    size = float(torch.linalg.vector_norm(truth))
    error = float(torch.linalg.vector_norm(value.to(torch.float64) - truth))
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def _floor(call: _Call, part: str, truth: torch.Tensor) -> float:
    """The relative error that rounding allows: of the numbers, and of the float32 sums it comes from."""
    # The mean of few roundings may lie above the usual by as much again over the root of their number.
    dtype = call.x.dtype if call.cast is None else call.cast
    tokens, outputs, inputs = call.x.shape[:-1].numel(), call.g.shape[-1], call.x.shape[-1]
    length = {"y": inputs, "dx": outputs}.get(part, tokens)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return torch.finfo(dtype).eps / 2 * (1 + 2 / math.sqrt(max(truth.numel(), 1))) + wide / 2 * math.sqrt(length)


def _leaves(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by the gradients' names."""
    leaves, extension = {"dA": adapter.a, "dB": adapter.b}, adapter.extension
    if extension.left is not None and extension.coordinates is not None:
        leaves["dc"] = extension.coordinates
    if adapter.magnitude is not None:
        leaves["dm"] = adapter.magnitude
    return leaves


def _trained(layer: Any) -> dict[str, torch.Tensor]:
    """What gets gradients of a layer's first adapter, by the gradients' names."""
    return {part: leaf for part, leaf in _leaves(active(layer)[0]).items() if leaf.requires_grad}


def _run(layer: Any, call: _Call) -> dict[str, torch.Tensor]:
    x, trained = call.x.clone().requires_grad_(True), _trained(layer)
    with torch.enable_grad():
        with call.autocast():
            y = layer(x)
        dx, *grads = torch.autograd.grad(y, [x, *trained.values()], call.g.to(y.dtype))
    return {"y": y.detach(), "dx": dx, **dict(zip(trained, grads, strict=True))}


def _truth(layer: Any, call: _Call) -> dict[str, torch.Tensor]:
    """The same in float64; of a base that computes its own product, that product."""
    x, adapters = call.x, active(layer)
    rows = x.to(torch.float64).requires_grad_(True)
    leaves = [{part: leaf.detach().double() for part, leaf in _leaves(adapter).items()} for adapter in adapters]
    wanted = {part: leaves[0][part].requires_grad_(True) for part in _trained(layer)}
    base = layer.base_layer
    bias = None if getattr(base, "bias", None) is None else base.bias.detach().to(torch.float64)
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        scale = None
        if adapters[0].magnitude is not None:  # DoRA's `m / |W + s B A|`, `(m,)`; the norm counts as a constant
            update = adapters[0].scaling * (leaves[0]["dB"] @ leaves[0]["dA"]).detach()
            scale = leaves[0]["dm"] / torch.linalg.vector_norm(dense_weight(layer).to(torch.float64) + update, dim=1)
        if plain_linear(base):
            y = nn.functional.linear(rows, base.weight.detach().to(torch.float64), bias)
        else:
            with call.autocast():
                product = base(rows.to(x.dtype))
            y = product.to(torch.float64)
        for adapter, own in zip(adapters, leaves, strict=True):
            y = y + _delta(rows, adapter, own)
        if scale is not None:
            y = y * scale if bias is None else (y - bias) * scale + bias
        dx, *rest = torch.autograd.grad(y, [rows, *wanted.values()], call.g.to(torch.float64))
    return {"y": y.detach(), "dx": dx, **dict(zip(wanted, rest, strict=True))}


def _delta(rows: torch.Tensor, adapter: Adapter, own: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an adapter adds, in float64."""
    delta = adapter.scaling * (rows @ own["dA"].mT @ own["dB"].mT)
    if adapter.bias is not None:
        delta = delta + adapter.scaling * adapter.bias.to(torch.float64)
    _, left, right, _ = adapter.extension
    if left is not None and right is not None:
        left, right = left.to(torch.float64), right.to(torch.float64)
        delta = delta + (rows @ right.mT * own["dc"]) @ left.mT
    if (start := adapter.start()) is not None:
        a0, b0, scaling = start
        delta = delta + scaling * (rows @ a0.to(torch.float64).mT @ b0.to(torch.float64).mT)
    return delta
