"""`accelerate` and `restore`: every LoRA layer of a model on the fused path, or a reason why not."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from lora_kernels.adapters.experts import chain_of
from lora_kernels.adapters.view import LoraView, lora_layers, stock_class
from lora_kernels.reports import Layers, Report, Table, short_name
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import unwrap
from lora_kernels.training import dora
from lora_kernels.training.description import eager_reason, plain_linear
from lora_kernels.training.experts import OUTER, experts_reason
from lora_kernels.training.guard import Guard
from lora_kernels.training.lora_layer import FusedForward, class_of, is_experts, supported

PATHS = ("fused", "delta", "eager")


@dataclass(frozen=True)
class LayerPath:
    """How one LoRA layer runs.

    Attributes:
        name: the layer's name in the model.
        kind: its class in PEFT.
        path: `fused` (base product and adapter in one op), `delta` (the base layer computes its own product, the
            adapter is fused), or `eager` (PEFT's own forward).
        reason: why it is not `fused`.
    """

    name: str
    kind: str
    path: str
    reason: str = ""


@dataclass(frozen=True)
class AccelerateReport(Report, Layers[LayerPath]):
    """What `accelerate` did.

    Attributes:
        layers: one entry per LoRA layer, in the model's order.
    """

    text_width: ClassVar[int] = 140

    layers: tuple[LayerPath, ...]

    def summary(self) -> str:
        """One line: how many layers run on which path, and why not fused."""
        counts = Counter(layer.path for layer in self.layers)
        paths = ", ".join(f"{counts[path]} {path}" for path in PATHS if counts[path])
        reasons = Counter(layer.reason for layer in self.layers if layer.path == "eager")
        why = "".join(f"; eager: {reason} ({count})" for reason, count in reasons.items())
        return f"{len(self.layers)} LoRA layers: {paths}{why}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", "kind", "path", "reason", title="accelerated LoRA layers")
        for layer in self.layers:
            table.add_row(short_name(layer.name), layer.kind, layer.path, layer.reason)
        yield table
        yield Text(self.summary())


def _gathered(model: nn.Module) -> set[str]:
    """The LoRA layers that are inside of a unit of FSDP2: before they run, their weights are gathered."""
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415  (slow to import)

    units = [f"{name}." if name else "" for name, unit in unwrap(model).named_modules() if isinstance(unit, FSDPModule)]
    return {name for name, _ in lora_layers(model) if f"{name}.".startswith(tuple(units))}


def _path(name: str, layer: Any, gathered: bool) -> LayerPath:
    kind = stock_class(layer)
    if kind not in supported():
        return LayerPath(name, kind.__name__, "eager", f"no fused form of {kind.__name__}")
    if is_experts(kind):
        reason = experts_reason(layer, gathered=gathered)
        computes = f"the experts ({type(chain_of(layer)[-1].base_layer).__name__}) compute their own products"
    else:
        reason = eager_reason(layer, gathered=gathered, training=True)
        if reason is None and plain_linear(layer.base_layer, gathered):
            return LayerPath(name, kind.__name__, "fused")
        computes = f"the base layer ({type(layer.base_layer).__name__}) computes its own product"
    return LayerPath(name, kind.__name__, "eager" if reason else "delta", reason or computes)


def _paths(layers: Sequence[LoraView], gathered: set[str]) -> tuple[LayerPath, ...]:
    paths: dict[str, LayerPath] = {}
    for name, layer in layers:
        path, outer = _path(name, layer, name in gathered), paths.get(name.removesuffix(".base_layer"))
        # Of nested wrappers the outer ones come first, and run as one with those inside.
        if outer is not None and outer.path == "eager" != path.path and is_experts(stock_class(layer)):
            path = LayerPath(name, path.kind, "eager", OUTER)
        paths[name] = path
    return tuple(paths.values())


def accelerate(model: nn.Module, *, strict: bool = False, guard: bool = True) -> AccelerateReport:
    """Run the LoRA layers of a PEFT model through the fused op, forward and backward.

    The class of a layer becomes a subclass of its own; parameters, saved adapters and everything PEFT does with the
    layer (several adapters, merging, disabling, mixed batches, variants) stay as they are. Call it before or after
    wrapping in DDP or FSDP2 and before `torch.compile`. In mixed precision products are in the dtype of the
    activations with float32 sums, where PEFT casts them up to that of the adapter.

    Args:
        model: with PEFT's LoRA layers.
        strict: raise where a layer would run PEFT's own forward, before anything is changed; and where the first
            backward pass gives an adapter nothing to learn from.
        guard: look at the first backward pass: an adapter whose factors both get gradients that are zero, missing or
            not finite is reported (`RuntimeWarning`, or with `strict` an error).

    Returns:
        The path of every layer, and why.

    Raises:
        TypeError: if it is no model.
        ValueError: if the model has no LoRA layer, if DoRA would divide by the norm of a row of zeros, or with
            `strict`, naming the layers.
    """
    if not (layers := lora_layers(model)):
        raise ValueError("model has no LoRA layer: make it with peft.get_peft_model first")
    gathered = _gathered(model)
    report = AccelerateReport(_paths(layers, gathered))
    eager = [layer for layer in report if layer.path == "eager"]
    if strict and eager:
        raise ValueError(f"{len(eager)} layers would not be accelerated (first: {eager[0].name}: {eager[0].reason})")
    if eager:
        warnings.warn(report.summary(), RuntimeWarning, stacklevel=2)
    kinds = supported()
    for name, layer in layers:
        whole = not any(is_sharded(parameter) or parameter.is_meta for parameter in layer.parameters())
        for adapter in layer.active_adapters if whole and type(layer) in kinds else ():
            if adapter in layer.lora_A and dora.magnitude(layer, adapter) is not None:
                dora.check(layer, adapter, name)
    for (_, layer), path in zip(layers, report, strict=True):
        if type(layer) in kinds:  # also those that are eager now: a variant may be deactivated
            layer.__class__ = class_of(type(layer))
        if isinstance(layer, FusedForward):
            layer.__dict__["_eager_reason"] = path.reason if path.path == "eager" else None
    if guard:
        Guard.watch(unwrap(model), layers, strict=strict)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`.

    Args:
        model: the model.

    Returns:
        How many layers went back to PEFT's own class.

    Raises:
        TypeError: if it is no model.
    """
    Guard.stop(unwrap(model))
    count = 0
    for _, layer in lora_layers(model):
        if isinstance(layer, FusedForward):
            for name in ("fused", "_prepared", "_eager_reason"):
                layer.__dict__.pop(name, None)
            layer.__class__ = stock_class(layer)
            count += 1
    return count


@contextlib.contextmanager
def reference_mode(*models: nn.Module) -> Iterator[None]:
    """Run PEFT's own forward for a while: for second derivatives, say, which the fused op does not have.

    Args:
        models: accelerated models, or parts of them; layers that are not accelerated are left alone. Without any, all
            models, in all threads.

    Yields:
        Nothing.

    Raises:
        TypeError: if one is no model.
    """
    layers: list[Any] = [
        layer for model in models for _, layer in lora_layers(model) if isinstance(layer, FusedForward)
    ]
    with contextlib.ExitStack() as undo:
        for target in layers if models else [FusedForward]:
            if "fused" in vars(target):
                undo.callback(setattr, target, "fused", target.fused)
            else:
                undo.callback(delattr, target, "fused")
            target.fused = False
        yield
