"""The fused forward of PEFT's LoRA layers.

A layer is accelerated by changing its class to a subclass of its own: parameters, their names, configs and saved files
stay what they were. Wherever PEFT does more than `base(x) + s B A drop(x)`, its own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.ops import Dropout, LoraMember, lora_delta, lora_linear_group
from lora_kernels.statistics.modes import is_sharded
from lora_kernels.training import dora, grouping
from lora_kernels.training.extension import Extension, tied

# PEFT's layers whose forward is `base(x) + s B A drop(x)`, by class name.
KINDS = ("Linear", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")


class Adapter(NamedTuple):
    """An active adapter of a layer.

    Attributes:
        a: A `(r, n)`.
        b: B `(m, r)`.
        bias: that of B `(m,)`, or `None`.
        scaling: s.
        p: dropout of its input.
        frozen: whether nothing of it is trained.
        extension: what its variant adds, or `None`.
        magnitude: DoRA's `(m,)`, or `None`.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    p: float
    frozen: bool
    extension: Extension | None = None
    magnitude: torch.Tensor | None = None

    def product(self) -> Adapter:
        """The same without an extension, as far as it fits into one product.

        Undropped, an extension is more rank: `[A; V^T]` and `[B, U diag(c) / s]`.
        """
        if self.extension is None:
            return self
        coordinates, left, right = self.extension
        if left is None or right is None:
            return self._replace(b=tied(self.b, coordinates), extension=None)
        if not self._stacks:
            return self._replace(extension=None)
        columns = left.to(coordinates.dtype) * (coordinates / self.scaling)
        return self._replace(a=torch.cat((self.a, right)), b=torch.cat((self.b, columns), 1), extension=None)

    def more(self) -> list[Adapter]:
        """What `product` has left out: an extension that must be by itself, if any."""
        if self.extension is None or self._stacks:
            return []
        coordinates, left, right = self.extension
        if left is None or right is None:
            return []
        return [Adapter(right, left.to(coordinates.dtype) * coordinates, None, 1.0, 0.0, self.frozen)]

    @property
    def _stacks(self) -> bool:
        return self.p == 0 and self.scaling != 0


class FusedForward:
    """The forward of an accelerated layer; mixed into a subclass of the layer's own class."""

    fused = True  # reference_mode sets it to False on a layer
    grouped = True  # whether it may be computed along with layers that read the same tensor

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
        if args or kwargs or not runs_fused(layer):
            result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        return _forward(layer, x)


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
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _whole(weight: Any, gathered: bool) -> bool:
    # Of two meshes one may be that of tensor parallelism, whose shards stay shards.
    return not is_sharded(weight) or (gathered and weight.device_mesh.ndim == 1)


def _plain_linear(module: Any, gathered: bool) -> bool:
    return type(module) is nn.Linear and not _hooked(module) and _whole(module.weight, gathered)


def base_is_fused(layer: Any, *, gathered: bool = False) -> bool:
    """Whether the base product is part of the fused op: a plain linear layer that nobody hooks into.

    Args:
        layer: a LoRA layer.
        gathered: see `eager_reason`.

    Returns:
        True if so.
    """
    base = layer.base_layer
    if not _plain_linear(base, gathered) or "parametrizations" in base._modules:
        return False
    weight, kinds = base.weight, (nn.Parameter, torch.Tensor)
    return (type(weight) in kinds or is_sharded(weight)) and weight.is_floating_point()


def eager_reason(layer: Any, *, gathered: bool = False) -> str | None:
    """Why a layer has to run PEFT's own forward as it is now, or `None`.

    Args:
        layer: a LoRA layer.
        gathered: whether FSDP2 gathers the layer's shards before it runs.

    Returns:
        The reason, in words.
    """
    factors, others, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout  # modules look their parts up slowly
    names = [name for name in layer.active_adapters if name in factors]
    if not names:
        return "no active adapter"
    for name in names:
        variant = layer.lora_variant.get(name)
        if dora.magnitude(layer, name) is not None:
            reason = dora.refusal(layer, name, names, base_is_fused(layer, gathered=gathered))
            if reason is not None:
                return f"adapter {name!r} is {reason}"
        elif variant is not None and not hasattr(variant, "fused"):
            return f"adapter {name!r} is a variant ({getattr(variant, '__name__', type(variant).__name__)})"
        a = factors[name]
        if not _plain_linear(a, gathered) or not _plain_linear(others[name], gathered):
            return f"the factors of adapter {name!r} are sharded, hooked into or no linear layers"
        if type(dropouts[name]) not in (nn.Identity, nn.Dropout):
            return f"adapter {name!r} has a {type(dropouts[name]).__name__}"
        if not a.weight.is_floating_point() or a.bias is not None:
            return f"adapter {name!r} has factors of an unknown kind"
    return None


def active(layer: Any) -> list[Adapter]:
    """The active adapters of a layer, those that are trained first.

    Args:
        layer: a LoRA layer without an `eager_reason`.

    Returns:
        At least one.
    """
    found, factors, others, dropouts = [], layer.lora_A, layer.lora_B, layer.lora_dropout
    for name in layer.active_adapters:
        if name not in factors:
            continue
        a, other, dropout = factors[name].weight, others[name], dropouts[name]
        b = other.weight
        p = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        variant = layer.lora_variant.get(name)
        magnitude = dora.magnitude(layer, name)
        extension = None if variant is None or magnitude is not None else variant.fused(layer, name)
        trained = a.requires_grad or b.requires_grad
        trained = trained or (extension is not None and extension.coordinates.requires_grad)
        found.append(Adapter(a, b, other.bias, layer.scaling[name], p, not trained, extension, magnitude))
    return found if len(found) == 1 else sorted(found, key=lambda each: each.frozen)


def runs_fused(layer: Any) -> bool:
    """Whether a layer, as it is now, runs the fused op.

    Args:
        layer: a LoRA layer.

    Returns:
        False if PEFT's own forward is to run.
    """
    accelerated = isinstance(layer, FusedForward) and layer.fused
    plain = accelerated and not layer.disable_adapters and not layer.merged  # type: ignore[attr-defined]
    return plain and eager_reason(layer) is None


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    adapters = active(layer)
    y = None
    if layer.grouped and grouping.applies(x):
        y = grouping.taken(layer, x, lambda: _key(layer, x, adapters))
        if y is None:
            others = grouping.followers(layer)
            if others and all(runs_fused(each) and each.grouped for each in others):
                y = _as_one(x, (layer, *others))
            else:
                grouping.learn(layer, x)
    if y is None:
        (y,) = _computed(x, (_member(layer, x, adapters),))
    if adapters[0].magnitude is not None:  # of a layer with no other adapter
        return dora.scaled(y, layer, adapters[0])
    extra = _counterpart(adapters)
    if extra is not None:
        y = _biased(y, extra)
    for each in _rest(adapters):
        delta = lora_delta(y, x, each.a, each.b, scaling=each.scaling, dropout=_draw(each, x))
        y = _biased(delta, each).to(y.dtype)
    return y


def _as_one(x: torch.Tensor, layers: Sequence[Any]) -> torch.Tensor:
    """The first layer's output; those of the others are put down for them."""
    found = [active(each) for each in layers]
    keys = [_key(each, x, adapters) for each, adapters in zip(layers, found, strict=True)]
    outputs = _computed(x, [_member(each, x, adapters) for each, adapters in zip(layers, found, strict=True)])
    for layer, key, y in zip(layers[1:], keys[1:], outputs[1:], strict=True):
        grouping.put_down(layers[0], layer, x, key, y)
    return outputs[0]


def _computed(x: torch.Tensor, members: Sequence[LoraMember]) -> list[torch.Tensor]:
    outputs = lora_linear_group(x, members)
    # Where a base layer makes its own product, its dtype is the layer's.
    return [
        y if each.weight is not None or each.start is None else y.to(each.start.dtype)
        for y, each in zip(outputs, members, strict=True)
    ]


def _counterpart(adapters: list[Adapter]) -> Adapter | None:
    """A frozen adapter without dropout (of a start away from zero): more rank of the same products."""
    return next((each for each in adapters[1:] if each.frozen and each.p == 0), None)


def _rest(adapters: list[Adapter]) -> list[Adapter]:
    """All that the first product of a layer leaves out, products only."""
    extra, found = _counterpart(adapters), adapters[0].more()
    for each in adapters[1:]:
        found += each.more() if each is extra else [each.product(), *each.more()]
    return found


def _key(layer: Any, x: torch.Tensor, adapters: list[Adapter]) -> tuple[Any, ...]:
    """All that a layer's output depends on besides x and the values of its tensors."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    numbers = (
        value
        for each in adapters
        for value in (each.a, each.b, each.bias, each.scaling, each.p, each.frozen, each.magnitude)
    )
    extensions = (value for each in adapters if each.extension is not None for value in each.extension)
    return cast, layer.base_layer, *numbers, *extensions


def _member(layer: Any, x: torch.Tensor, adapters: list[Adapter]) -> LoraMember:
    """What the fused op is to compute for a layer: its first adapter, and what is frozen beside it."""
    first, extra, base, weight = adapters[0].product(), _counterpart(adapters), layer.base_layer, None
    extra = None if extra is None else extra.product()
    frozen = None if extra is None else (extra.a, extra.b, extra.scaling)
    if base_is_fused(layer):
        weight = base.weight
        weight = weight if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type) else None
    if weight is None:
        start = _biased(base(x), first)
    elif first.magnitude is not None:
        start = None
    else:
        start = base.bias if first.bias is None else _sum(base.bias, first.bias, first.scaling)
    return LoraMember(weight, start, first.a, first.b, first.scaling, _draw(first, x), frozen)


def _sum(bias: torch.Tensor | None, more: torch.Tensor, scaling: float) -> torch.Tensor:
    scaled = scaling * more
    return scaled if bias is None else (bias + scaled).to(bias.dtype)


def _draw(adapter: Adapter, x: torch.Tensor) -> Dropout | None:
    return None if adapter.p == 0 else Dropout.draw(adapter.p, device=x.device)


def _biased(y: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    return y if adapter.bias is None else y + adapter.scaling * adapter.bias.to(y.dtype)
