"""A LoRA layer of any of PEFT's classes, and the only scan for them."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.adapters.base_weight import whole
from lora_kernels.adapters.names import config_name
from lora_kernels.runtime.processes import unwrap

# The first whose layers store per adapter whether it is rank-stabilized, which a change of rank needs.
MINIMUM = (0, 18)


class LoraView(NamedTuple):
    """A LoRA layer of a model."""

    name: str  # in the model
    module: Any  # PEFT's layer, accelerated or not

    @property
    def config_name(self) -> str:
        """The name that the keys of a config's patterns are matched with."""
        return config_name(self.name, self.module)

    @property
    def parameter_name(self) -> str | None:
        """The parameter (such as one of many experts) that it adapts, if that is not a linear layer's weight."""
        return getattr(self.module, "parameter_name", None)

    def rank(self, adapter: str) -> int:
        """Rank of an adapter."""
        return self.module.r[adapter]  # type: ignore[no-any-return]

    def alpha(self, adapter: str) -> float:
        """Its `lora_alpha`."""
        return _number(self.module.lora_alpha[adapter])

    def rslora(self, adapter: str) -> bool:
        """Whether its scaling is `alpha / sqrt(r)` instead of `alpha / r`."""
        return bool(self.module.use_rslora.get(adapter, False))

    def scaling(self, adapter: str) -> float:
        """The current scaling s, by which PEFT multiplies `B A`."""
        return _number(self.module.scaling[adapter])

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(r, n)` and B `(m, r)`, detached; shards are gathered (all processes must call)."""
        return whole(self.module.lora_A[adapter].weight), whole(self.module.lora_B[adapter].weight)


def _number(value: Any) -> float:
    """A Python number; PEFT stores one-element tensors for hot-swapping."""
    return value.item() if hasattr(value, "item") else value  # type: ignore[no-any-return]


@functools.cache
def require_peft() -> None:
    """Raise an ImportError if PEFT is missing or too old, before it is used."""
    needed = ".".join(map(str, MINIMUM))
    module = sys.modules.get("peft")
    try:
        installed = getattr(module, "__version__", None) or importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"peft is not installed, but lora_kernels needs peft>={needed} for this: pip install 'lora_kernels[peft]'"
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and tuple(map(int, numbers.groups())) < MINIMUM:
        what = f"peft {installed} is installed, but lora_kernels needs peft>={needed}"
        raise ImportError(f"{what}: pip install --upgrade peft")


def lora_layers(model: nn.Module, adapter: str | None = None) -> list[LoraView]:
    """The LoRA layers of a model, of all kinds and in its order; with an adapter's name, those that have it."""
    require_peft()
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415  (peft is an optional dependency)

    return [
        LoraView(name, module)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.r)
    ]


def stock_class(layer: Any) -> type:
    """PEFT's class of a LoRA layer, accelerated or not."""
    return next(kind for kind in type(layer).__mro__ if not kind.__module__.startswith("lora_kernels."))
