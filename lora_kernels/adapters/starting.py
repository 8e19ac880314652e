"""Whether an adapter may be given a start of its own, and taking that start off the model's function again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import PLAIN, weight_kind, why_unreadable
from lora_kernels.adapters.experts import ExpertLayer
from lora_kernels.adapters.layers import AdapterLayer, AdapterLayers, check_untrained, find_lora_layers, is_tied, places
from lora_kernels.adapters.view import LoraView
from lora_kernels.runtime.modes import is_sharded


def startable_layers(model: nn.Module, adapter: str, *, force: bool, without_experts: str | None) -> AdapterLayers:
    """The layers of an adapter that may be given a start; those too narrow for their rank are among the unsupported."""
    # A ValueError if the adapter is trained (`force` allows that, except over trained biases of the base), has
    # coordinates, changed base weights or offloaded factors, or no layer that is wide enough.
    from lora_kernels.adapters.config import changed_base  # noqa: PLC0415  (imports peft)

    layers = find_lora_layers(model, adapter, without_experts=without_experts)
    if any(parts.directions(layer.module, adapter) is not None for layer in layers.supported):
        raise ValueError(f"adapter {adapter!r} has LoRA-Dash's coordinates: initialise first, attach afterwards")
    factors = {layer.name: carrier(layer).lora_A[adapter] for layer in layers.supported}
    offloaded = [name for name, factor in factors.items() if hasattr(factor, "_hf_hook") and factor.weight.is_meta]
    if offloaded:
        raise ValueError(
            f"the factors of layer {', '.join(offloaded)} are on the meta device, offloaded by accelerate, which would "
            "put the old values back: initialise before the model is offloaded"
        )
    if force:
        _check_biases(model, layers, adapter)
    else:
        check_untrained(layers, adapter)
    layers = _wide_enough(layers)
    if (reason := changed_base(_config(model, adapter))) is not None:
        raise ValueError(
            f"adapter {adapter!r} cannot start again: {reason}, which would stay changed; make the model anew, with "
            "init_lora_weights=True"
        )
    return layers


def _config(model: nn.Module, adapter: str) -> Any:
    return model.peft_config[adapter]  # type: ignore[index, union-attr, operator]


def _wide_enough(layers: AdapterLayers) -> AdapterLayers:
    """The layers, those whose rank exceeds min(m, n) (heads, routers, gates) among the unsupported ones."""
    narrow = [layer for layer in layers.supported if layer.rank > min(layer.shape)]
    if len(narrow) == len(layers.supported):
        names = ", ".join(f"{layer.name} (r = {layer.rank}, min(m, n) = {min(layer.shape)})" for layer in narrow)
        raise ValueError(
            "no layer has room for its rank, which must be at most min(m, n): lower r or set ranks by rank_pattern, "
            f"or leave layers out by exclude_modules: {names}"
        )
    why = "rank {} exceeds min(m, n) = {}: it keeps its values (rank_pattern gives it a rank of its own)"
    reasons = [(layer.name, layer.rank, why.format(layer.rank, min(layer.shape))) for layer in narrow]
    wide = tuple(layer for layer in layers.supported if layer not in narrow)
    return replace(layers, supported=wide, unsupported=(*reasons, *layers.unsupported))


def _check_biases(model: nn.Module, layers: AdapterLayers, adapter: str) -> None:
    """Refuse to overwrite a trained adapter whose `bias=` trained biases of the base, whose old values are lost."""
    config = _config(model, adapter)
    if config.bias == "none":
        return
    if config.bias == "all":
        names = [name for name, _ in model.named_parameters() if name.endswith("bias") and ".lora_" not in name]
    else:
        bases = {layer.name: layer.module.get_base_layer() for layer in layers.supported}
        names = [f"{name}.bias" for name, base in bases.items() if getattr(base, "bias", None) is not None]
    if not names:
        return
    try:
        check_untrained(layers, adapter)
    except ValueError as error:
        raise ValueError(
            f"adapter {adapter!r} cannot start again: it was trained with bias={config.bias!r}, and what {names[0]} "
            f"was before ({len(names)} such) is not known; make the model anew"
        ) from error


def check_readable(layers: Iterable[AdapterLayer]) -> None:
    """Raise a ValueError if base weights cannot be read, naming all such layers."""
    reasons = {layer.name: why_unreadable(layer.module) for layer in layers}
    if bad := {name: why for name, why in reasons.items() if why is not None}:
        raise ValueError(
            f"the base weight of layer {', '.join(bad)} cannot be read: {'; '.join(dict.fromkeys(bad.values()))} "
            "(exclude_modules leaves layers out; eva, lora_ga and lora_one read no base weight)"
        )


def check_not_sharded(layers: Iterable[AdapterLayer], method: str) -> None:
    """Raise a ValueError if a base weight is sharded: processes share the layers out, but gather a shard together."""
    for layer in layers:
        weight = getattr(layer.module.get_base_layer(), "weight", None)
        if weight is not None and is_sharded(weight):
            raise ValueError(
                f"the base weight of layer {layer.name} is sharded (FSDP), and {method} reads it: initialise "
                "before sharding, for instance from statistics that were collected on the sharded model"
            )


def check_offset(model: nn.Module, layers: AdapterLayers, adapter: str, base: str) -> None:
    """Raise a ValueError if a start away from zero could not be subtracted from the function again (see `take_off`)."""
    from lora_kernels.adapters.config import check  # noqa: PLC0415  (imports peft)

    config = _config(model, adapter)
    check(config)
    if config.use_dora:
        raise ValueError(f"adapter {adapter!r} uses DoRA, which cannot start away from zero and keep the function")
    counts = places(model)
    for layer in layers.supported:
        if (reason := parts.refusal(carrier(layer), adapter)) is not None:
            raise ValueError(f"layer {layer.name} cannot start away from zero and keep the function: {reason}")
        if base == "mutate" and weight_kind(layer.module) != PLAIN:
            raise ValueError(
                f"layer {layer.name} has a quantized base, or one whose weight is no plain tensor: only "
                'base="intact" is possible'
            )
        if base == "mutate" and is_tied(layer.module.get_base_layer().weight, counts):
            raise ValueError(
                f'layer {layer.name} has a base weight that another layer has, too: only base="intact" is possible'
            )


def carrier(layer: AdapterLayer) -> Any:
    """The layer of PEFT that carries a frozen start: of an expert, the one for all experts of its parameter."""
    return layer.module.wrapper if isinstance(layer.module, ExpertLayer) else layer.module


@torch.no_grad()
def take_off(module: Any, adapter: str, base: str) -> None:
    """Subtract `s B A` of a layer as it is now: by a frozen copy (`intact`), or from the base weight (`mutate`)."""
    if base == "intact":
        parts.add_start(module, adapter, *(factor.clone() for factor in LoraView("", module).factors(adapter)))
    else:
        weight, delta = module.get_base_layer().weight, module.get_delta_weight(adapter)
        weight.copy_(weight.to(delta.dtype) - delta)
