"""Finding linear layers in any model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lora_kernels._checks import check_type, repr_short
from lora_kernels.statistics.store import Target


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """`(in_features, out_features)` of an `nn.Linear` (or quantized layer) or transformers' `Conv1D`; else `None`."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def find_linear_layers(model: nn.Module, names: Iterable[str] | None = None) -> Sequence[Target]:
    """The linear layers of a model: those of the full `names` (an error if one is not), or all, in its order."""
    modules = dict(model.named_modules())
    features = {name: sizes for name, module in modules.items() if (sizes := linear_features(module)) is not None}
    if names is None and not features:
        raise ValueError(f"model ({type(model).__name__}) has no linear layer")
    if isinstance(names, (str, torch.Tensor)) or not isinstance(names, (Iterable, type(None))):
        raise TypeError(f"targets must be module names, got {type(names).__name__} {repr_short(names)}")
    chosen = list(features if names is None else names)
    for name in chosen:
        check_type("targets", name, str, "module names")
        if name not in modules:
            raise ValueError(f"targets names {name!r}, but the model has no such module")
        if name not in features:
            kind = type(modules[name]).__name__
            raise ValueError(f"targets names {name!r}, a {kind}, but must name linear layers")
    return [Target(name, modules[name], *features[name]) for name in dict.fromkeys(chosen)]


def skipped_modules(model: nn.Module) -> dict[str, str]:
    """Modules that hold matrices but are no linear layers, so that they are not observed, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        matrices = [key for key, value in module.named_parameters(recurse=False) if value.dim() >= 2]
        if not matrices or linear_features(module) is not None:
            continue
        reason = f"{', '.join(matrices)} belong to no linear layer with an input of its own"
        if isinstance(module, nn.Embedding):
            reason = "its input are indices"
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            reason = "its inputs are patches, not rows"
        reasons[name] = f"{type(module).__name__}: {reason}"
    return reasons
