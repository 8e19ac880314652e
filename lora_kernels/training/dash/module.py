"""What LoRA-Dash adds to one adapter of one layer: `y += sum_i c_i u_i (v_i^T x)`, and how PEFT's layer computes it.

PEFT hands forward, merging and unmerging of an adapter over to what stands in `layer.lora_variant[adapter]`; DoRA lives
there, and so does `DashVariant`. Parameters and buffers lie in `layer.lora_dash[adapter]`, so that PEFT saves, loads,
moves, activates and deletes them with the adapter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lora_kernels.training.extension import Extension, tied

ATTRIBUTE = "lora_dash"


class DashDirections(nn.Module):
    """Coordinates of one adapter of one layer, and the directions they belong to.

    Attributes:
        coordinates: c `(k,)`, trained; zero until the switch.
        left: the `u_i` `(m, k)`, frozen; zero until the switch.
        right: the `v_i^T` `(k, n)` likewise.
        steps: optimizer steps counted so far.
        launched: whether the switch has been made.
    """

    coordinates: nn.Parameter
    left: torch.Tensor
    right: torch.Tensor

    def __init__(self, k: int, weight_a: torch.Tensor, weight_b: torch.Tensor) -> None:
        """Zeros, of the dtype and on the device of the adapter's factors `(r, n)` and `(m, r)`."""
        super().__init__()
        self.coordinates = nn.Parameter(weight_a.new_zeros(k), requires_grad=weight_a.requires_grad)
        self.register_buffer("left", weight_b.new_zeros(weight_b.shape[0], k))
        self.register_buffer("right", weight_a.new_zeros(k, weight_a.shape[1]))
        self.steps, self.launched = 0, False

    def get_extra_state(self) -> torch.Tensor:
        """Steps and switch, which are saved and loaded with the tensors."""
        return torch.tensor([self.steps, int(self.launched)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over what was loaded."""
        self.steps, launched = (int(each) for each in state.tolist())
        self.launched = bool(launched)

    def extension(self) -> Extension:
        """The part that is added."""
        return Extension(self.coordinates, self.left, self.right) if self.launched else Extension(self.coordinates)

    @torch.no_grad()
    def launch(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Take directions, at coordinates of zero: the function stays what it was.

        Args:
            left: `(m, k)`.
            right: `(k, n)`.
        """
        self.left.copy_(left)
        self.right.copy_(right)
        self.coordinates.zero_()
        self.launched = True


class DashVariant:
    """PEFT's `LoraVariant` interface (it asks for nothing but these methods), and the one of the fused forward."""

    def supports_lora_conversion(self) -> bool:
        """Yes: `get_delta_weight` of the layer has the directions."""
        return True

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the directions are there before the variant is."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """`result + s B A drop(x) + sum_i c_i u_i (v_i^T x)`: the last neither scaled nor dropped."""
        coordinates, left, right, _ = module.lora_dash[active_adapter].extension()
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if left is None:
            hidden = tied(hidden, coordinates)
        result = result + module.lora_B[active_adapter](hidden) * module.scaling[active_adapter]
        if left is not None:
            left, right = left.to(coordinates.dtype), right.to(coordinates.dtype)
            result = result + nn.functional.linear(nn.functional.linear(x, right) * coordinates, left)
        return result

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter, a new tensor."""
        return orig_weight + _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """The same in place."""
        orig_weight.data += _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the adapter."""
        return orig_weight.data - _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def fused(module: Any, adapter: str) -> Extension:
        """What the fused forward adds (see `training.extension`)."""
        found: Extension = module.lora_dash[adapter].extension()
        return found


def _delta_like(weight: torch.Tensor, layer: Any, adapter: str) -> torch.Tensor:
    if not weight.is_floating_point():  # casting the sum to it would leave nothing of the adapter
        raise ValueError(f"a base weight of {weight.dtype} cannot take an adapter up: merge on an unquantized base")
    delta: torch.Tensor = layer.get_delta_weight(adapter)
    return delta.to(weight.dtype)


def delta_weight(layer: Any, adapter: str) -> torch.Tensor:
    """`get_delta_weight` of a layer that has directions: all that merging, unmerging and conversion see of an adapter.

    Args:
        layer: the LoRA layer.
        adapter: an adapter of it, with directions or without.

    Returns:
        `s B A + U diag(c) V^T`, transposed as the base weight is.
    """
    delta: torch.Tensor = type(layer).get_delta_weight(layer, adapter)
    if adapter not in layer.lora_dash:
        return delta
    coordinates, left, right, _ = layer.lora_dash[adapter].extension()
    if left is None:
        return delta
    wide = torch.promote_types(left.dtype, torch.float32)
    more = (left.to(wide) * coordinates.to(wide)) @ right.to(wide)
    more = more.mT if getattr(layer, "fan_in_fan_out", False) else more
    both: torch.Tensor = delta.to(wide) + more
    return both.to(delta.dtype)


def add(layer: Any, adapter: str, k: int) -> DashDirections:
    """Give an adapter of a layer its coordinates.

    Args:
        layer: a PEFT LoRA layer.
        adapter: the adapter's name.
        k: how many.

    Returns:
        What was added.
    """
    if not hasattr(layer, ATTRIBUTE):
        setattr(layer, ATTRIBUTE, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, ATTRIBUTE)
        # On the instance: some layers merge by this method alone and do not ask a variant.
        layer.get_delta_weight = functools.partial(delta_weight, layer)
    made = DashDirections(k, layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach())
    made.coordinates.requires_grad_(layer.lora_A[adapter].weight.requires_grad)
    layer.lora_dash[adapter] = made
    layer.lora_dash.train(layer.training)
    layer.lora_variant[adapter] = DashVariant()
    return made


def remove(layer: Any, adapter: str) -> None:
    """Undo `add`.

    Args:
        layer: the LoRA layer.
        adapter: the adapter's name.
    """
    if adapter in layer.lora_dash:
        del layer.lora_dash[adapter]
        layer.lora_variant.pop(adapter, None)
    if not len(layer.lora_dash):
        delattr(layer, ATTRIBUTE)
        layer.adapter_layer_names = tuple(name for name in layer.adapter_layer_names if name != ATTRIBUTE)
        del layer.get_delta_weight


def directions(layer: Any, adapter: str) -> DashDirections | None:
    """What `add` gave an adapter of a layer, or `None`."""
    found = getattr(layer, ATTRIBUTE, {})
    made: DashDirections | None = found[adapter] if adapter in found else None  # noqa: SIM401  (a ModuleDict)
    return made
