"""Which layers read the same tensor, according to one forward pass that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.runtime.feed import call_model
from lora_kernels.statistics.sharing import InputIdentity
from lora_kernels.statistics.store import Target


def find_groups(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[list[str]]:
    """Names of layers that read the same tensors in all their calls, by first call; the model may be on `meta`."""
    identity = InputIdentity()
    inputs: dict[str, list[Hashable]] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if x is not None:
                inputs.setdefault(name, []).append(identity(x))

        return observe

    try:
        for target in targets:
            handles.append(target.module.register_forward_pre_hook(hook(target.name), with_kwargs=True))
        with torch.no_grad():
            (forward or call_model)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[Hashable, list[str]] = {}
    for name, sequence in inputs.items():
        groups.setdefault(tuple(sequence), []).append(name)
    return list(groups.values())
