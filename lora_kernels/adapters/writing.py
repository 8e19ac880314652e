"""Writing factors and ranks into an adapter, and the config that describes them to stock PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.experts import ExpertLayer
from lora_kernels.adapters.layers import AdapterLayer, AdapterLayers
from lora_kernels.adapters.names import config_name, scaling_of
from lora_kernels.adapters.view import lora_layers
from lora_kernels.runtime.modes import is_sharded

# A `(r, n)` and B `(m, r)` of one layer.
Factors = tuple[torch.Tensor, torch.Tensor]


def copy_whole(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write all of a parameter in place, sharded or not."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (needs torch.distributed)

        # Every process holds all of the value, the same bits: no process has to send anything.
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(parameter.device, parameter.dtype), mesh, placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(value)


def _put(linear: nn.Linear, value: torch.Tensor, device: torch.device) -> None:
    """Write a weight (one on the meta device to `device`); the object stays, so that an earlier optimizer trains it."""
    weight = linear.weight
    if weight.device.type == "meta":
        linear.weight = nn.Parameter(value.to(device, weight.dtype, copy=True), requires_grad=weight.requires_grad)
        if linear.bias is not None and linear.bias.device.type == "meta":
            linear.bias = nn.Parameter(torch.zeros_like(linear.bias, device=device), linear.bias.requires_grad)
    elif weight.shape == value.shape:
        copy_whole(weight, value)
    else:
        weight.grad = None
        # By way of another dtype, so that autograd forgets the old shape, which a live graph would keep.
        dtype = weight.dtype
        weight.data = value.to(weight.device, torch.float32 if dtype == torch.float64 else torch.float64)
        weight.data = value.to(weight.device, dtype, copy=True)
    linear.out_features, linear.in_features = value.shape


def _write_layer(layer: AdapterLayer, factors: Factors, adapter: str, *, adjust: bool) -> None:
    module, (a, b) = layer.module, factors
    if isinstance(module, ExpertLayer):
        module.put(adapter, a, b)
        return
    device = next((parameter.device for parameter in module.get_base_layer().parameters()), torch.device("cpu"))
    _put(module.lora_A[adapter], a, device)
    _put(module.lora_B[adapter], b, device)
    bias = module.lora_B[adapter].bias
    if bias is not None:  # lora_bias, which is part of the adapter's output
        copy_whole(bias, torch.zeros_like(bias) if not is_sharded(bias) else torch.zeros(bias.shape))
    if len(a) != layer.rank:
        new = layer.with_rank(len(a), adjust=adjust)
        _set_scaling(module, adapter, new.rank, new.alpha, rslora=new.rslora)


def _set_scaling(module: Any, adapter: str, rank: int, alpha: float, *, rslora: bool) -> None:
    module.r[adapter], module.lora_alpha[adapter], module.use_rslora[adapter] = rank, alpha, rslora
    scaling = scaling_of(alpha, rank, rslora)
    if isinstance(module.scaling[adapter], torch.Tensor):  # compiled code reads this very tensor
        module.scaling[adapter].fill_(scaling)
    else:
        module.scaling[adapter] = scaling


def set_rank(module: Any, adapter: str, rank: int, alpha: float, *, rslora: bool) -> None:
    """Keep the first `rank` rows of A and columns of B of a layer of any kind, with a scaling of their own."""
    if rank < module.r[adapter]:
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        experts = getattr(module, "num_experts", 1)
        factors = parts.some_ranks(a.weight.detach(), b.weight.detach(), slice(rank), experts)
        for linear, value in zip((a, b), factors, strict=True):
            _put(linear, value, value.device)
    _set_scaling(module, adapter, rank, alpha, rslora=rslora)


def list_modules(model: nn.Module, adapter: str, config: Any, *, always: bool = False) -> None:
    """Make a config name the modules that have an adapter, and no others."""
    # `always`: a list, also where only an expression can tell the modules from others; `exclude_modules` does then.
    from peft.tuners.tuners_utils import check_target_module_exists as matches  # noqa: PLC0415

    views = lora_layers(model, adapter)
    modules = [view.config_name for view in views if view.parameter_name is None]
    names = {name for name, _ in model.named_modules() if ".base_layer" not in name and ".lora_" not in name}
    without = [config_name(name) for name in names - {view.name for view in views}]
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    for targets in ({name.rpartition(".")[2] for name in modules}, set(modules)):
        config.target_modules = targets
        if not any(matches(config, name) for name in without):
            return
    # Names are matched by their tails: where that is ambiguous, one regular expression matches whole names.
    if always:  # of what the list matches too much
        others = [name for name in without if matches(config, name)]
        config.exclude_modules = "|".join(re.escape(name) for name in sorted(others))
        return
    config.target_modules = "|".join(re.escape(name) for name in sorted(modules))


def write(
    model: nn.Module,
    layers: AdapterLayers,
    factors: Mapping[str, Factors],
    adapter: str,
    *,
    adjust_scaling_factors: bool,
) -> None:
    """Write factors into an adapter, ranks and config included; layers without an entry stay, rank 0 removes one."""
    # A ValueError, before anything is written, if ranks of a sharded adapter would change or no layer would keep one.
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    if not any(ranks.get(layer.name, layer.rank) for layer in layers.supported):
        raise ValueError("every layer would get rank 0: raise the rank, or set min_rank")
    written = [layer for layer in layers.supported if layer.name in factors]
    changed = [layer for layer in written if ranks[layer.name] != layer.rank]
    if any(is_sharded(layer.module.lora_A[adapter].weight) for layer in changed):
        raise ValueError(
            "the adapter is sharded (FSDP), so its ranks cannot change: keep them (rho=1), or initialise before "
            "sharding, for instance from statistics that were collected on the sharded model"
        )
    for layer in written:
        if ranks[layer.name] == 0 and len(layer.module.r) > 1:  # other adapters live on this layer
            layer.module.delete_adapter(adapter)
        elif ranks[layer.name] == 0:
            model.set_submodule(layer.name, layer.module.get_base_layer())
        else:
            _write_layer(layer, factors[layer.name], adapter, adjust=adjust_scaling_factors)
    if changed:  # the config describes the layers, so that stock PEFT rebuilds them when it loads the adapter
        from lora_kernels.adapters.config import set_ranks  # noqa: PLC0415  (imports peft)

        config: Any = model.peft_config[adapter]  # type: ignore[index, union-attr, operator]
        views = lora_layers(model, adapter)
        set_ranks(config, {view.config_name: (view.rank(adapter), view.alpha(adapter)) for view in views})
        if 0 in ranks.values():
            list_modules(model, adapter, config)
