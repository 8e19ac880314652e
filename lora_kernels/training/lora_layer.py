"""The fused forward of PEFT's LoRA layers.

A layer is accelerated by changing its class to a subclass of its own: parameters, their names, configs and saved files
stay what they were. Wherever PEFT does more than `base(x) + s B A drop(x)`, its own forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_kernels.ops import Dropout, lora_delta, lora_linear
from lora_kernels.statistics.modes import is_sharded

# PEFT's layers whose forward is `base(x) + s B A drop(x)`, by class name.
KINDS = ("Linear", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Adapter:
    """An active adapter of a layer.

    Attributes:
        a: A `(r, n)`.
        b: B `(m, r)`.
        bias: that of B `(m,)`, or `None`.
        scaling: s.
        p: dropout of its input.
        frozen: whether neither factor is trained.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    p: float
    frozen: bool


class FusedForward:
    """The forward of an accelerated layer; mixed into a subclass of the layer's own class."""

    fused = True  # reference_mode sets it to False on a layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's, fused where possible.

        Args:
            x: `(..., n)`.
            args: further arguments of the base layer: PEFT's forward takes the call.
            kwargs: likewise, and PEFT's own, such as `adapter_names`.

        Returns:
            `(..., m)`.
        """
        layer: Any = self
        if (
            args
            or kwargs
            or not self.fused
            or layer.disable_adapters
            or layer.merged
            or eager_reason(layer) is not None
        ):
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        return _forward(layer, x, active(layer))


def class_of(kind: type) -> type:
    """The accelerated subclass of a layer's class; the same one every time, so that layers can be pickled.

    Args:
        kind: a class of PEFT's.

    Returns:
        The class.
    """
    name = f"Fused{kind.__name__}"
    made: type | None = globals().get(name)
    if made is None:
        made = type(name, (FusedForward, kind), {"__module__": __name__, "__doc__": f"{kind.__name__}, accelerated."})
        globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    # A pickled layer names its class, which this process may not have made yet.
    if name.startswith("Fused"):
        for kind in supported():
            if name == f"Fused{kind.__name__}":
                return class_of(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def supported() -> tuple[type, ...]:
    """PEFT's classes that can be accelerated, as far as this PEFT and its backends have them."""
    from peft.tuners import lora  # noqa: PLC0415  (peft is an optional dependency)
    from peft.tuners.lora import torchao  # noqa: PLC0415

    found = [getattr(where, name, None) for where in (lora, torchao) for name in KINDS]
    return tuple(dict.fromkeys(each for each in found if isinstance(each, type)))


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _FORWARD_HOOKS)


def _plain_linear(module: Any) -> bool:
    return type(module) is nn.Linear and not _hooked(module) and not is_sharded(module.weight)


def base_is_fused(layer: Any) -> bool:
    """Whether the base product is part of the fused op: a plain linear layer that nobody hooks into."""
    base = layer.base_layer
    if not _plain_linear(base) or hasattr(base, "parametrizations"):
        return False
    return type(base.weight) in (nn.Parameter, torch.Tensor) and base.weight.is_floating_point()


def eager_reason(layer: Any) -> str | None:
    """Why a layer has to run PEFT's own forward as it is now, or `None`.

    Args:
        layer: a LoRA layer.

    Returns:
        The reason, in words.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return "no active adapter"
    for name in names:
        if name in layer.lora_variant:
            variant = layer.lora_variant[name]
            return f"adapter {name!r} is a variant ({getattr(variant, '__name__', type(variant).__name__)})"
        if not _plain_linear(layer.lora_A[name]) or not _plain_linear(layer.lora_B[name]):
            return f"the factors of adapter {name!r} are sharded, hooked into or no linear layers"
        if type(layer.lora_dropout[name]) not in (nn.Identity, nn.Dropout):
            return f"adapter {name!r} has a {type(layer.lora_dropout[name]).__name__}"
        if not layer.lora_A[name].weight.is_floating_point() or layer.lora_A[name].bias is not None:
            return f"adapter {name!r} has factors of an unknown kind"
    return None


def active(layer: Any) -> list[Adapter]:
    """The active adapters of a layer, those that are trained first.

    Args:
        layer: a LoRA layer without an `eager_reason`.

    Returns:
        At least one.
    """
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[name].weight, layer.lora_B[name], layer.lora_dropout[name]
        p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        frozen = not (a.requires_grad or b.weight.requires_grad)
        found.append(Adapter(a, b.weight, b.bias, layer.scaling[name], p, frozen))
    return sorted(found, key=lambda each: each.frozen)


def _forward(layer: Any, x: torch.Tensor, adapters: list[Adapter]) -> torch.Tensor:
    first, rest = adapters[0], adapters[1:]
    # A frozen adapter without dropout (the counterpart of a start away from zero) is more rank of the same products.
    extra = next((each for each in rest if each.frozen and each.p == 0), None)
    frozen = None if extra is None else (extra.a, extra.b, extra.scaling)
    base = layer.base_layer
    autocast = torch.is_autocast_enabled(x.device.type)
    if base_is_fused(layer) and (x.dtype == base.weight.dtype or autocast):
        bias = base.bias if first.bias is None else _sum(base.bias, first.bias, first.scaling)
        y = lora_linear(
            x, base.weight, bias, first.a, first.b, scaling=first.scaling, dropout=_draw(first, x), extra=frozen
        )
    else:
        y = base(x)
        y = _added(y, x, first, frozen)
    for each in rest:
        if each is not extra:
            y = _added(y, x, each, None)
        elif each.bias is not None:
            y = y + each.scaling * each.bias.to(y.dtype)
    return y


def _sum(bias: torch.Tensor | None, more: torch.Tensor, scaling: float) -> torch.Tensor:
    scaled = scaling * more
    return scaled if bias is None else (bias + scaled).to(bias.dtype)


def _draw(adapter: Adapter, x: torch.Tensor) -> Dropout | None:
    return None if adapter.p == 0 else Dropout.draw(adapter.p, device=x.device)


def _added(
    y: torch.Tensor, x: torch.Tensor, adapter: Adapter, extra: tuple[torch.Tensor, torch.Tensor, float] | None
) -> torch.Tensor:
    dtype = y.dtype
    y = lora_delta(y, x, adapter.a, adapter.b, scaling=adapter.scaling, dropout=_draw(adapter, x), extra=extra)
    if adapter.bias is not None:
        y = y + adapter.scaling * adapter.bias.to(y.dtype)
    return y.to(dtype)
