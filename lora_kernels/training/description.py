"""What a LoRA layer of PEFT's is at the moment: its active adapters, its base, and whether the fused op can run it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels._checks import FLOATS
from lora_kernels.adapters.parts import Extension, tied
from lora_kernels.adapters.view import stock_class
from lora_kernels.ops._backend import requested
from lora_kernels.ops.lora_linear import op as lora_op
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.training import dora

# A library that replaces these for all layers expects its own to be called.
LINEAR_FORWARD, DROPOUT_FORWARD = nn.Linear.forward, nn.Dropout.forward


class Adapter(NamedTuple):
    """An active adapter of a layer."""

    name: str  # the adapter's name
    a: torch.Tensor  # A `(r, n)`
    b: torch.Tensor  # B `(m, r)`
    bias: torch.Tensor | None  # that of B `(m,)`, or `None`
    scaling: float  # s
    p: float  # the dropout of its input, 0 outside of training
    frozen: bool  # whether nothing of it is trained
    extension: Extension  # what its variant adds
    magnitude: torch.Tensor | None = None  # DoRA's `(m,)`, or `None`

    def start(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """The frozen pair that cancels what the adapter started from: A0, B0 and its (negative) scaling."""
        if self.extension.start is None:
            return None
        a0, b0, sign = self.extension.start
        return a0, b0, sign * self.scaling

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, with the directions as more rank where they fit: `[A; V^T]` and `[B, U diag(c) / s]`."""
        coordinates, left, right, _ = self.extension
        if coordinates is None:
            return self.a, self.b
        if left is None or right is None:
            return self.a, tied(self.b, coordinates)
        if not self._stacks:
            return self.a, self.b
        columns = left.to(coordinates.dtype) * (coordinates / self.scaling)
        return torch.cat((self.a, right)), torch.cat((self.b, columns), 1)

    def directions(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`V^T` and `U diag(c)` where they do not fit into `factors`, being neither dropped nor scaled."""
        coordinates, left, right, _ = self.extension
        if coordinates is None or left is None or right is None or self._stacks:
            return None
        return right, left.to(coordinates.dtype) * coordinates

    @property
    def _stacks(self) -> bool:
        return self.p == 0 and self.scaling != 0


def is_replaced(module: nn.Module) -> bool:
    """Whether calling a module does more than its class does: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_patched(layer: Any) -> bool:
    """Whether a library has put a forward of its own into PEFT's class."""
    forward: Any = stock_class(layer).forward  # type: ignore[attr-defined]
    return not forward.__module__.startswith("peft.") or hasattr(forward, "__wrapped__")


def is_whole(weight: Any, gathered: bool) -> bool:
    """Whether a weight is no shard when its layer runs, given whether FSDP2 gathers it before."""
    # Of two meshes one may be that of tensor parallelism, whose shards stay shards.
    return not is_sharded(weight) or (gathered and weight.device_mesh.ndim == 1)


def plain_linear(module: Any, gathered: bool = False) -> bool:
    """Whether a module is `torch.nn.Linear` as torch has it, with a weight that is a matrix of floats."""
    # Of a base layer: whether its product is part of the fused op.
    if type(module) is not nn.Linear or is_replaced(module) or nn.Linear.forward is not LINEAR_FORWARD:
        return False
    if "parametrizations" in module._modules or not is_whole(module.weight, gathered):
        return False
    weight = module.weight
    return (type(weight) in (nn.Parameter, torch.Tensor) or is_sharded(weight)) and weight.dtype in FLOATS


def eager_reason(layer: Any, *, gathered: bool = False, training: bool | None = None) -> str | None:
    """Why a LoRA layer has to run PEFT's own forward as it is now, in words, or `None`."""
    # `gathered`: FSDP2 gathers its shards before it runs. `training`: whether dropout is active; `None` as it is now.
    factors, others, dropouts = layer.lora_A, layer.lora_B, layer.lora_dropout  # modules look their parts up slowly
    if not (names := [name for name in layer.active_adapters if name in factors]):
        return "no active adapter"
    if not torch.compiler.is_compiling() and is_patched(layer):
        return f"the forward of PEFT's {stock_class(layer).__name__} is replaced"
    for name in names:
        variant = layer.lora_variant.get(name)
        if dora.magnitude(layer, name) is not None:
            if (reason := dora.refusal(layer, name, names)) is not None:
                return f"adapter {name!r} is {reason}"
        elif variant is not None and not hasattr(variant, "fused"):
            return f"adapter {name!r} is a variant ({getattr(variant, '__name__', type(variant).__name__)})"
        a, dropout = factors[name], dropouts[name]
        if not plain_linear(a, gathered) or not plain_linear(others[name], gathered) or a.bias is not None:
            return f"the factors of adapter {name!r} are sharded, hooked into or no plain linear layers"
        if type(dropout) not in (nn.Identity, nn.Dropout) or is_replaced(dropout):
            return f"adapter {name!r} has a {type(dropout).__name__} that is hooked into, or no plain dropout"
        if nn.Dropout.forward is not DROPOUT_FORWARD:
            return "torch.nn.Dropout.forward is replaced"
        if isinstance(layer.scaling[name], torch.Tensor):
            return f"the scaling of adapter {name!r} is a tensor, which can change in place"
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and (dropout.training if training is None else training):
            if dropout.p >= 1:
                return f"adapter {name!r} drops everything"
            if (reason := _slow_dropout(a.weight)) is not None:
                return reason
    return None


def _slow_dropout(weight: torch.Tensor) -> str | None:
    """Why dropout would be slower fused than in PEFT's own forward, where no kernel can make its mask."""
    if weight.device.type == "meta" or requested() == "torch":
        return None
    reasons = lora_op.layer.explain(weight.device, weight.dtype, True)
    if weight.dtype == torch.float64 or any(reasons[name] is None for name in ("triton", "cpp")):
        return None
    return f"dropout needs a kernel ({reasons['cpp' if weight.device.type == 'cpu' else 'triton']})"


def active(layer: Any) -> list[Adapter]:
    """The active adapters, at least one, of a LoRA layer without an `eager_reason`; those that are trained first."""
    adapters, factors, others, dropouts = [], layer.lora_A, layer.lora_B, layer.lora_dropout
    for name in layer.active_adapters:
        if name not in factors:
            continue
        a, other, dropout = factors[name].weight, others[name], dropouts[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        variant = layer.lora_variant.get(name)
        magnitude = dora.magnitude(layer, name)
        if magnitude is not None and not layer.training:
            p = 0.0  # PEFT's DoRA asks the layer, too
        extension = Extension(None) if variant is None or magnitude is not None else variant.fused(layer, name)
        trained = a.requires_grad or other.weight.requires_grad
        if extension.coordinates is not None:
            trained = trained or extension.coordinates.requires_grad
        adapters.append(
            Adapter(name, a, other.weight, other.bias, float(layer.scaling[name]), p, not trained, extension, magnitude)
        )
    return adapters if len(adapters) == 1 else sorted(adapters, key=lambda adapter: adapter.frozen)
