"""A run of LoRA-Dash: coordinates added, steps counted, the switch."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import whole
from lora_kernels.adapters.parts import Directions
from lora_kernels.adapters.view import LoraView, lora_layers, stock_class
from lora_kernels.linalg import core_basis
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.training.dash import optimizer as optimizers
from lora_kernels.training.dash import selection
from lora_kernels.training.dash.report import DashLayer, DashReport, launched
from lora_kernels.training.dash.settings import DashSettings
from lora_kernels.training.lora_layer import KINDS


@dataclass
class DashRun:
    """LoRA-Dash on one adapter of a model; made by `LoraDash.attach`.

    Attributes:
        config: the settings.
        model: the model.
        adapter: the adapter's name.
        layers: by name, those that have coordinates.
        refused: by name, why others have none.
    """

    config: DashSettings
    model: nn.Module
    adapter: str
    layers: dict[str, Any]
    refused: dict[str, str]
    _chosen: dict[str, DashLayer] = field(default_factory=dict)

    def directions(self) -> dict[str, Directions]:
        """By layer, its coordinates and directions."""
        found = {name: parts.directions(layer, self.adapter) for name, layer in self.layers.items()}
        return {name: each for name, each in found.items() if each is not None}

    @property
    def steps(self) -> int:
        """Optimizer steps counted, also before a resumption."""
        return max((each.steps for each in self.directions().values()), default=0)

    @property
    def launched(self) -> bool:
        """Whether the switch has been made."""
        return any(each.launched for each in self.directions().values())

    def coordinates(self) -> list[nn.Parameter]:
        """The coordinates of all layers."""
        return [each.coordinates for each in self.directions().values()]

    def join(self, optimizer: Any) -> None:
        """Give the coordinates to an optimizer that was made without them, in the group of the adapter's factors.

        Call it before the optimizer loads a state; `step` does it at the switch.

        Args:
            optimizer: of the adapter's factors.

        Raises:
            TypeError: if it is no optimizer.
            ValueError: if it holds none of the factors.
        """
        optimizers.check(optimizer, self._factors())
        optimizers.hold(optimizer, self.coordinates(), self._factors())

    def step(self, optimizer: Any) -> bool:
        """Count an optimizer step, and make the switch when it is time; call it after every `optimizer.step()`.

        A step that accelerate's optimizer left out (gradients still accumulating, or an overflow) is not counted. All
        processes must call it.

        Args:
            optimizer: whose state of the coordinates starts anew at the switch. If it does not hold them, they join the
                parameter group of the adapter's factors then.

        Returns:
            Whether this call made the switch.

        Raises:
            ValueError: if the factors of a layer are not finite at the switch, or the optimizer has no parameter of
                the adapter.
        """
        if self.launched or optimizers.was_left_out(optimizer):
            return False
        steps = self.steps + 1
        for each in self.directions().values():
            each.steps = steps
        if steps < self.config.pre_launch:
            return False
        self.launch(optimizer)
        return True

    @without_autocast()
    def launch(self, optimizer: Any, *, progress: bool = True) -> DashReport:
        """Make the switch now: find the directions, and let the optimizer start afresh on the coordinates.

        The processes of a distributed run share the layers out, and all hold the same bits.

        Args:
            optimizer: as for `step`.
            progress: show a bar over the layers.

        Returns:
            What was chosen.

        Raises:
            ValueError: as for `step`, or if the switch was made already, or an adapter is merged.
        """
        if self.launched:
            raise ValueError(f"adapter {self.adapter!r} has its directions already")
        self._check_unmerged()
        optimizers.check(optimizer, self._factors())
        compute = functools.partial(
            selection.select, k=self.config.k, epsilon=self.config.epsilon, cache=self.config.cache_dir
        )
        found = selection.for_layers(self.layers, compute, self.adapter, progress=progress)
        for name, each in self.directions().items():
            each.launch(found[name].left, found[name].right)
            self._chosen[name] = launched(name, found[name])
        optimizers.start_afresh(optimizer, self.coordinates(), self._factors())
        still = [name for name, each in self._chosen.items() if each.reason]
        if still:
            warnings.warn(
                f"{len(still)} adapters have changed nothing before the switch (first: {still[0]}): their directions "
                "are arbitrary",
                RuntimeWarning,
                stacklevel=2,
            )
        return self.report()

    def prepare(self, *, progress: bool = True) -> None:
        """Decompose the base weights now, into `cache_dir`, so that the switch does not have to wait for it.

        Args:
            progress: show a bar over the layers.

        Raises:
            ValueError: if there is no `cache_dir`: all bases together take more memory than the model.
        """
        if self.config.cache_dir is None:
            raise ValueError("cache_dir is None, but must be a folder: the decompositions take more than the model")
        self._check_unmerged()
        cache = self.config.cache_dir

        def keep(weight: torch.Tensor, _factors: Any) -> None:
            core_basis(weight, cache)

        selection.for_layers(self.layers, keep, self.adapter, progress=progress)

    def report(self) -> DashReport:
        """Where every LoRA layer of the adapter stands; it prints as a table."""
        entries = [DashLayer(name, "refused", why) for name, why in self.refused.items()]
        for name, each in self.directions().items():
            entries.append(self._chosen.get(name, DashLayer(name, "launched" if each.launched else "waiting")))
        order = {name: number for number, (name, _) in enumerate(lora_layers(self.model))}
        entries.sort(key=lambda entry: order.get(entry.name, len(order)))
        return DashReport(tuple(entries), self.steps, self.config.pre_launch)

    def detach(self, *, force: bool = False) -> None:
        """Take coordinates and directions off the model, which is then plain LoRA again.

        Args:
            force: also if coordinates are not zero, so that the function changes. (To keep it, write it with
                `lora_kernels.export`, or merge it.)

        Raises:
            ValueError: if coordinates are not zero, without `force`.
        """
        from lora_kernels.adapters.config import tidy_up  # noqa: PLC0415  (imports peft)

        moved = [name for name, each in self.directions().items() if bool(whole(each.coordinates).any())]
        if moved and not force:
            raise ValueError(
                f"{len(moved)} layers have coordinates that are not zero (first: {moved[0]}): export or merge the "
                "adapter to keep them, or detach with force=True"
            )
        self._check_unmerged()
        for layer in self.layers.values():
            parts.remove(layer, self.adapter, parts.DASH)
        config: Any = self.model.peft_config.get(self.adapter)  # type: ignore[union-attr, operator]
        if config is not None:
            config.dash = None
        tidy_up(self.model, self.adapter)
        self._chosen.clear()

    def _factors(self) -> list[nn.Parameter]:
        """A and B of all layers."""
        return [part[self.adapter].weight for layer in self.layers.values() for part in (layer.lora_A, layer.lora_B)]

    def _check_unmerged(self) -> None:
        for name, layer in self.layers.items():
            if layer.merged:
                raise ValueError(f"layer {name} has merged adapters: call model.unmerge_adapter() first")


def begin(model: nn.Module, config: DashSettings) -> DashRun:
    """See `LoraDash.attach`."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is wrapped in DistributedDataParallel, which averages no gradient of a parameter that comes later: "
            "attach before wrapping"
        )
    every = lora_layers(model)
    if not every:
        raise ValueError("model has no LoRA layer: make it with peft.get_peft_model first")
    adapter = _adapter(model, every, config.adapter_name)
    layers: dict[str, Any] = dict(lora_layers(model, adapter))
    refused = {name: why for name, layer in layers.items() if (why := _refusal(layer, adapter, config.k)) is not None}
    layers = {name: layer for name, layer in layers.items() if name not in refused}
    if not layers:
        first = next(iter(refused.items()), None)
        raise ValueError(f"no layer of adapter {adapter!r} can have coordinates" + (f" (first: {first})" * bool(first)))
    for name, layer in layers.items():
        _check_layer(name, layer, adapter, config.k)
    if refused:
        name, why = next(iter(refused.items()))
        message = f"{len(refused)} LoRA layers get no coordinates (first: {name}: {why})"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    from lora_kernels.adapters.config import describe  # noqa: PLC0415  (imports peft)

    describe(model, adapter).dash = {"k": config.k, "pre_launch": config.pre_launch, "epsilon": config.epsilon}
    for layer in layers.values():
        if parts.directions(layer, adapter) is None:
            parts.add_directions(layer, adapter, config.k)
    parts.ignore_buffers(model)
    if config.cache_dir is not None:  # also after a change of directory
        config = replace(config, cache_dir=os.path.abspath(config.cache_dir))
    return DashRun(config, model, adapter, layers, refused)


def _adapter(model: nn.Module, layers: list[LoraView], name: str | None) -> str:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise ValueError(f"model ({type(model).__name__}) has no peft_config: pass the PEFT model itself")
    if name is None:
        active = list(dict.fromkeys(each for _, layer in layers for each in layer.active_adapters if each in layer.r))
        if len(active) != 1:
            raise ValueError(f"adapter_name is None, but must be one of the active adapters {active}")
        return str(active[0])
    if name not in configs:
        raise ValueError(f"adapter_name is {name!r}, but the model has {', '.join(map(repr, configs))}")
    return name


def _refusal(layer: Any, adapter: str, k: int) -> str | None:
    if stock_class(layer).__name__ not in KINDS:
        return f"a {stock_class(layer).__name__} layer: only linear layers have core directions here"
    limit = min(layer.in_features, layer.out_features)
    if k > limit:
        return f"k is {k}, but it has only min(m, n) = {limit} core directions"
    return parts.refusal(layer, adapter)


def _check_layer(name: str, layer: Any, adapter: str, k: int) -> None:
    weight = layer.lora_A[adapter].weight
    if is_sharded(weight) or weight.shape != (layer.r[adapter], layer.in_features):
        raise ValueError(f"layer {name} has a sharded adapter: attach before sharding (FSDP2; ZeRO-3 is not supported)")
    if weight.device.type == "meta":
        raise ValueError(f"layer {name} is on the meta device: attach after its weights are loaded")
    if layer.merged:
        raise ValueError(f"layer {name} has merged adapters: call model.unmerge_adapter() first")
    there = parts.directions(layer, adapter)
    if there is not None and there.coordinates.numel() != k:
        raise ValueError(f"k is {k}, but layer {name} has {there.coordinates.numel()} coordinates already")
