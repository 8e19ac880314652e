"""Which layers read the same tensor, found by one forward pass that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.runtime.feed import call_model
from lora_kernels.statistics.sharing import InputIdentity
from lora_kernels.statistics.store import Target


def find_groups(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[list[str]]:
    """Groups of layers that read the same tensor, in the order of their first call.

    Args:
        model: a model on any device, also on `meta`.
        targets: the layers.
        batch: an example, as for the collection.
        forward: called as `forward(model, batch)`.

    Returns:
        Names; layers that were not called are left out.
    """
    identity = InputIdentity()
    groups: dict[Any, list[str]] = {}
    seen: set[str] = set()
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            if x is not None and name not in seen:
                seen.add(name)
                groups.setdefault(identity(x), []).append(name)

        return observe

    try:
        for target in targets:
            handles.append(target.module.register_forward_pre_hook(hook(target.name), with_kwargs=True))
        with torch.no_grad():
            (forward or call_model)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(groups.values())
