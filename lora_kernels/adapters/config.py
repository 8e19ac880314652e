"""The config of an adapter with parts, and what it saves. Needs PEFT."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import LoraConfig
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.folders import MARK, OWN, WEIGHTS, join_file
from lora_kernels.adapters.names import config_name, patterns
from lora_kernels.adapters.view import lora_layers

# What the config keeps of a layer: the layer's own containers, which are up to date.
_KEPT = ("r", "lora_alpha", "use_rslora", parts.START, parts.DASH, "parameter_name", "num_experts")


@dataclass
class PartsLoraConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's config of an adapter that may have parts (`adapters.parts`); set up by `describe`."""

    # It saves the config of the stock adapter that `save_pretrained` writes, with all parts joined. `auto_mapping`,
    # which PEFT keeps but does not read, tells `lora_kernels.load` how to separate them.

    def __post_init__(self) -> None:
        """A config without layers, also for `dataclasses.replace`."""
        super().__post_init__()
        self.prepare()

    def prepare(self) -> None:
        """Set attributes that are not fields, since fields are saved."""
        self.adapter = ""
        self.entries: dict[str, SimpleNamespace] = {}
        self.dash: dict[str, Any] | None = None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, for the joined adapter; tensors that PEFT wrote unjoined (of shards) are joined in the file."""
        stock, mark = self.joined()
        mapping = kwargs.pop("auto_mapping_dict", None) or stock.auto_mapping or {}
        if mark is not None:
            mapping = {**mapping, MARK: mark}
        LoraConfig.save_pretrained(stock, save_directory, auto_mapping_dict=mapping or None, **kwargs)
        if mark is not None and (Path(save_directory) / WEIGHTS).is_file():
            layers, own = self.layers(), self.adapter
            scalings = {
                name: (parts.nominal_scaling(entry, own), getattr(entry, "num_experts", 1)) for name, entry in layers
            }
            join_file(Path(save_directory) / WEIGHTS, scalings)

    def layers(self) -> list[tuple[str, SimpleNamespace]]:
        """The layers that have the adapter."""
        return [(name, entry) for name, entry in self.entries.items() if self.adapter in entry.r]

    def joined(self) -> tuple[LoraConfig, dict[str, Any] | None]:
        """The config of the joined adapter, and the mark to separate it (`None` if nothing is joined)."""
        stock = plain_config(self)
        starts = any(parts.start(entry, self.adapter) is not None for _, entry in self.layers())
        if not starts and self.dash is None:
            return stock, None
        mark = {name: getattr(self, name) for name in OWN} | {"start": starts, "dash": self.dash}
        shapes = {}
        for name, entry in self.layers():
            start, dash = parts.start(entry, self.adapter), parts.directions(entry, self.adapter)
            rank = entry.r[self.adapter] + (0 if start is None else start.rank)
            rank += dash.coordinates.numel() if dash is not None and dash.launched else 0
            shapes[config_name(name, entry)] = (rank, tidy(parts.nominal_scaling(entry, self.adapter) * rank))
        stock.use_rslora = False
        set_ranks(stock, shapes)
        return stock, mark


def plain_config(config: LoraConfig) -> LoraConfig:
    """A copy of a config, of PEFT's own class and without our mark."""
    stock = copy.copy(config)
    stock.auto_mapping = {key: value for key, value in (stock.auto_mapping or {}).items() if key != MARK} or None
    if isinstance(stock, PartsLoraConfig):
        _forget(stock)
    return stock


def _forget(config: LoraConfig) -> None:
    for name in ("adapter", "entries", "dash"):
        config.__dict__.pop(name, None)
    config.__class__ = LoraConfig


def tidy(alpha: float) -> float:
    """A whole number as an integer, the declared type of `lora_alpha`."""
    return int(alpha) if alpha == int(alpha) else alpha


def set_ranks(config: LoraConfig, shapes: dict[str, tuple[int, float]]) -> None:
    """Set the ranks and alphas of a config, given by `config_name`."""
    # Servers allocate for r, and take `lora_alpha / r` for the scaling: the largest rank, and its alpha.
    config.r = max(rank for rank, _ in shapes.values())
    config.lora_alpha = next(tidy(alpha) for rank, alpha in shapes.values() if rank == config.r)
    config.rank_pattern, config.alpha_pattern = patterns(shapes, config)


def check(config: Any) -> None:
    """Raise a TypeError if an adapter's config is of another class than `LoraConfig` or `PartsLoraConfig`."""
    if type(config) not in (LoraConfig, PartsLoraConfig):
        raise TypeError(f"the adapter's config is a {type(config).__name__}, but must be peft's LoraConfig")


def changed_base(config: LoraConfig) -> str | None:
    """Why the base weights under an adapter are not those of the unmodified model, or `None`."""
    if getattr(config, "mutated", False):
        return 'base="mutate" has subtracted its start from the base weights'
    start = str(config.init_lora_weights).lower()
    if start.startswith(("pissa", "corda", "olora", "loftq", "lora_ga")):
        return f"PEFT's init_lora_weights={config.init_lora_weights!r} has changed the base weights"
    return None


def describe(model: nn.Module, adapter: str) -> PartsLoraConfig:
    """Let the layers of an adapter carry parts, and its config, the same object, describe them when it is saved."""
    config: Any = model.peft_config[adapter]  # type: ignore[index, union-attr, operator]
    check(config)
    if type(config) is LoraConfig:
        config.__class__ = PartsLoraConfig
        config.prepare()
    config.adapter, config.entries = adapter, {}
    for view in lora_layers(model, adapter):
        module = view.module
        if parts.refusal(module, adapter) is None:
            parts.carry(module)
        kept = {name: getattr(module, name) for name in _KEPT if hasattr(module, name)}
        config.entries[view.name] = SimpleNamespace(**kept)
    model.base_model.add_weighted_adapter = functools.partial(_add_weighted_adapter, model.base_model)  # type: ignore[union-attr]
    described: PartsLoraConfig = config
    return described


def _add_weighted_adapter(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    **kwargs: Any,
) -> None:
    """PEFT's, which combines A and B alone unless it decomposes the whole products."""
    whole = combination_type.endswith("svd") and len(adapters) > 1
    configs = (tuner.peft_config.get(name) for name in adapters)
    if not whole and any(isinstance(config, PartsLoraConfig) and config.joined()[1] is not None for config in configs):
        raise ValueError(
            f"combination_type is {combination_type!r} for {len(adapters)} adapters, and one has more than A and B, "
            'but must be "svd" or another that ends in it, for several adapters; or export the adapter and load that'
        )
    type(tuner).add_weighted_adapter(tuner, adapters, weights, adapter_name, combination_type, **kwargs)


def tidy_up(model: nn.Module, adapter: str) -> None:
    """After parts were added or removed, make configs and layers without parts PEFT's own again."""
    config: Any = model.peft_config.get(adapter)  # type: ignore[union-attr, operator]
    if isinstance(config, PartsLoraConfig) and config.joined()[1] is None:
        _forget(config)
    if not any(isinstance(other, PartsLoraConfig) for other in model.peft_config.values()):  # type: ignore[union-attr, operator]
        for module in model.modules():
            parts.drop(module)
        vars(model.base_model).pop("add_weighted_adapter", None)
    parts.ignore_buffers(model)
