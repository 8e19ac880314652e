"""LoRA-Dash: coordinates along the directions of the base weight that the task changes most."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn
from tqdm import tqdm

from lora_kernels._checks import check_range
from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import check_readable, dense_weight, whole
from lora_kernels.adapters.parts import Directions
from lora_kernels.adapters.view import lora_layers, stock_class
from lora_kernels.linalg.basis import Selection, changed_most, core_basis
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.reports import Layers, Report, Table, short_name
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import raise_together, rank, share_out, world_size
from lora_kernels.training.lora_layer import KINDS

# A and B of an adapter `(r, n)`, `(m, r)`, and its scaling.
Factors = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True, kw_only=True)
class DashLayer:
    """One LoRA layer.

    Attributes:
        name: the layer's name in the model.
        status: `waiting` for the switch, `launched`, or `refused`.
        reason: why it is refused, or a note.
        rates: largest and smallest change rate among the selected directions.
        sigma: largest and smallest of their singular values, as fractions of the weight's largest.
        share: of the adapter's squared change along all core directions, the fraction along the selected ones.
    """

    name: str
    status: Literal["waiting", "launched", "refused"]
    reason: str = ""
    rates: tuple[float, float] | None = None
    sigma: tuple[float, float] | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class DashReport(Report, Layers[DashLayer]):
    """The state of a run of LoRA-Dash.

    Attributes:
        layers: one entry per LoRA layer of the adapter, in the model's order.
        steps: optimizer steps counted.
        pre_launch: the step of the switch.
    """

    layers: tuple[DashLayer, ...]
    steps: int
    pre_launch: int

    def summary(self) -> str:
        """One line: the number of layers by status, and why some are refused."""
        counts = Counter(layer.status for layer in self.layers)
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        reasons = Counter(layer.reason for layer in self.layers if layer.status == "refused")
        why = "".join(f"; refused: {reason} ({count})" for reason, count in reasons.items())
        return f"LoRA-Dash, step {self.steps} (switch at {self.pre_launch}): {states}{why}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", "status", "change rates", "singular values", "share", "note", title="LoRA-Dash")
        for layer in self.layers:
            rates = "" if layer.rates is None else f"{layer.rates[0]:.1e} to {layer.rates[1]:.1e}"
            sigma = "" if layer.sigma is None else f"{layer.sigma[0]:.1e} to {layer.sigma[1]:.1e}"
            share = "" if layer.share is None else f"{100 * layer.share:.0f} %"
            table.add_row(short_name(layer.name), layer.status, rates, sigma, share, layer.reason)
        yield table
        yield Text(self.summary())


@dataclass(frozen=True)
class LoraDash:
    """LoRA-Dash (arXiv 2409.01035): train LoRA, then also coordinates along task-specific directions.

    After `pre_launch` optimizer steps, per layer with base weight `W = U diag(sigma) V^T` and adapter `s B A`, the k
    core directions with the largest change rates `|u_i^T (s B A) v_i| / (sigma_i + eps)` are frozen, and
    `y += sum_i c_i u_i (v_i^T x)` is trained beside A and B. The coordinates start at zero, so that the function does
    not jump; they are not multiplied by s (so `set_scale` leaves them alone), and x is not dropped.

        run = lk.LoraDash(k=8).attach(model)      # before the optimizer, and before DDP or FSDP2
        for batch in loader:
            ...
            optimizer.step()
            run.step(optimizer)

    With transformers' Trainer: `callbacks=[lk.api.LoraDashCallback(lk.LoraDash(k=8))]`.

    Args:
        k: directions per layer.
        pre_launch: optimizer steps before the switch.
        epsilon: eps, in units of the largest singular value of W. It bounds what a direction gains from being one that
            W has nothing of.
        adapter_name: the adapter; by default the active one.
        cache_dir: folder for the decompositions of the base weights, or `None`. They do not depend on data:
            `run.prepare()` makes them before training. `TaskDirections(cache=...)` reads and writes the same files.

    Raises:
        TypeError: if a value is of a wrong type.
        ValueError: if one is out of range.
    """

    k: int = 8
    pre_launch: int = 100
    epsilon: float = 1e-6
    adapter_name: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        check_range("k", self.k, low=1, integer=True)
        check_range("pre_launch", self.pre_launch, low=1, integer=True)
        check_range("epsilon", self.epsilon, low=0.0)
        if math.isinf(self.epsilon):
            raise ValueError(f"epsilon is {self.epsilon!r}, but must be finite")

    def attach(self, model: nn.Module) -> DashRun:
        """Give the layers of an adapter their coordinates, zero and without directions yet.

        Call it before the optimizer is created and before the model is wrapped in DDP or FSDP2, so that both know the
        parameters from the start. A model that has coordinates already (from `lora_kernels.load`, for example)
        resumes from them.

        Args:
            model: a PEFT model with LoRA layers.

        Returns:
            The run; its `report()` names every layer, also those that have no core directions.

        Raises:
            TypeError: if the adapter's config is not a plain `LoraConfig`.
            ValueError: if the model is wrapped, sharded or merged, has no such adapter or several active ones, no
                layer with k core directions, or coordinates of another number.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "model is wrapped in DistributedDataParallel, which averages no gradient of a parameter that comes "
                "later: attach before wrapping"
            )
        if not lora_layers(model):
            raise ValueError("model has no LoRA layer: create it with peft.get_peft_model first")
        adapter = _adapter(model, self.adapter_name)
        layers: dict[str, Any] = dict(lora_layers(model, adapter))
        refused = {name: why for name, layer in layers.items() if (why := _refusal(layer, adapter, self.k)) is not None}
        layers = {name: layer for name, layer in layers.items() if name not in refused}
        if not layers:
            first = f" (first: {next(iter(refused.items()))})" if refused else ""
            raise ValueError(f"no layer of adapter {adapter!r} can have coordinates{first}")
        for name, layer in layers.items():
            _check_layer(name, layer, adapter, self.k)
        _check_unmerged(layers)
        if refused:
            name, why = next(iter(refused.items()))
            message = f"{len(refused)} LoRA layers get no coordinates (first: {name}: {why})"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        from lora_kernels.adapters.config import describe  # noqa: PLC0415  (imports peft)

        describe(model, adapter).dash = {"k": self.k, "pre_launch": self.pre_launch, "epsilon": self.epsilon}
        for layer in layers.values():
            if parts.directions(layer, adapter) is None:
                parts.add_directions(layer, adapter, self.k)
        parts.ignore_buffers(model)
        # An absolute folder stays the same after a change of directory.
        cache = None if self.cache_dir is None else os.path.abspath(self.cache_dir)
        return DashRun(replace(self, cache_dir=cache), model, adapter, layers, refused)


@dataclass
class DashRun:
    """LoRA-Dash on one adapter of a model; see `LoraDash.attach`.

    Attributes:
        config: the settings.
        model: the model.
        adapter: the adapter's name.
        layers: by name, those that have coordinates.
        refused: by name, why others have none.
    """

    config: LoraDash
    model: nn.Module
    adapter: str
    layers: dict[str, Any]
    refused: dict[str, str]
    _launched: dict[str, DashLayer] = field(default_factory=dict)

    def directions(self) -> dict[str, Directions]:
        """By layer, its coordinates and directions."""
        by_layer = ((name, parts.directions(layer, self.adapter)) for name, layer in self.layers.items())
        return {name: directions for name, directions in by_layer if directions is not None}

    @property
    def steps(self) -> int:
        """Optimizer steps counted, also before a resumption."""
        return max((directions.steps for directions in self.directions().values()), default=0)

    @property
    def launched(self) -> bool:
        """Whether the switch is over."""
        return any(directions.launched for directions in self.directions().values())

    def coordinates(self) -> list[nn.Parameter]:
        """The coordinates of all layers."""
        return [directions.coordinates for directions in self.directions().values()]

    def join(self, optimizer: Any) -> None:
        """Add the coordinates to an optimizer that was created without them, in the group of the adapter's factors.

        Call it before the optimizer loads a state; `step` does it at the switch.

        Args:
            optimizer: of the adapter's factors.

        Raises:
            TypeError: if it is not an optimizer.
            ValueError: if it holds none of the factors.
        """
        factors = self._group(optimizer)
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [value for value in self.coordinates() if id(value) not in ids and value.requires_grad]
        # Not as a group of their own: a learning rate schedule that exists already would not know it.
        if "param_names" in factors:  # an optimizer of named parameters expects names
            factors["param_names"] += [f"lora_dash.{index}" for index in range(len(missing))]
        factors["params"] += missing

    def step(self, optimizer: Any) -> bool:
        """Count an optimizer step, and switch when `pre_launch` is reached; call it after every `optimizer.step()`.

        A step that accelerate's optimizer skipped (gradients still accumulating, or an overflow) is not counted. All
        processes must call it.

        Args:
            optimizer: its state of the coordinates is reset at the switch. Coordinates that it does not hold yet are
                then added to the parameter group of the adapter's factors.

        Returns:
            Whether this call switched.

        Raises:
            ValueError: if the factors of a layer are not finite at the switch, or the optimizer has no parameter of
                the adapter.
        """
        gradients = getattr(optimizer, "gradient_state", None)  # of accelerate's optimizer
        accumulates = gradients is not None and not gradients.sync_gradients
        if self.launched or accumulates or getattr(optimizer, "step_was_skipped", False):
            return False
        steps = self.steps + 1
        for directions in self.directions().values():
            directions.steps = steps
        if steps < self.config.pre_launch:
            return False
        self.launch(optimizer)
        return True

    @without_autocast()
    def launch(self, optimizer: Any, *, progress: bool = True) -> DashReport:
        """Switch now: select the directions, and reset the optimizer's state of the coordinates.

        Processes share the layers out; all get the same bits.

        Args:
            optimizer: as for `step`.
            progress: show a bar over the layers.

        Raises:
            ValueError: as for `step`, or if the directions are selected already, or an adapter is merged.
        """
        if self.launched:
            raise ValueError(f"adapter {self.adapter!r} has its directions already")
        _check_unmerged(self.layers)
        self._group(optimizer)
        k, epsilon, cache = self.config.k, self.config.epsilon, self.config.cache_dir

        def compute(weight: torch.Tensor, factors: list[Factors]) -> Selection:
            return select(weight, factors, k, epsilon, cache)

        selections = _for_layers(self.layers, compute, self.adapter, progress=progress)
        for name, directions in self.directions().items():
            directions.launch(selections[name].left, selections[name].right)
            self._launched[name] = _launched(name, selections[name])
        self.join(optimizer)
        for coordinates in self.coordinates():  # so that Adam corrects its moments from this step on
            optimizer.state.pop(coordinates, None)
        if unchanged := [name for name, entry in self._launched.items() if entry.reason]:
            message = f"{len(unchanged)} adapters have changed nothing before the switch (first: {unchanged[0]})"
            warnings.warn(f"{message}: their directions are arbitrary", RuntimeWarning, stacklevel=2)
        return self.report()

    def prepare(self, *, progress: bool = True) -> None:
        """Decompose the base weights now, so that the switch is fast; a ValueError without a `cache_dir` for them."""
        if self.config.cache_dir is None:
            raise ValueError("cache_dir is None, but must be a folder: the decompositions take more than the model")
        _check_unmerged(self.layers)
        cache = self.config.cache_dir

        def keep(weight: torch.Tensor, _factors: Any) -> None:
            core_basis(weight, cache)

        _for_layers(self.layers, keep, self.adapter, progress=progress)

    def report(self) -> DashReport:
        """Where every LoRA layer of the adapter stands; it prints as a table."""
        entries = [DashLayer(name=name, status="refused", reason=why) for name, why in self.refused.items()]
        for name, directions in self.directions().items():
            entry = DashLayer(name=name, status="launched" if directions.launched else "waiting")
            entries.append(self._launched.get(name, entry))
        order = {name: number for number, (name, _) in enumerate(lora_layers(self.model))}
        entries.sort(key=lambda entry: order.get(entry.name, len(order)))
        return DashReport(layers=tuple(entries), steps=self.steps, pre_launch=self.config.pre_launch)

    def detach(self, *, force: bool = False) -> None:
        """Remove coordinates and directions from the model, which is then plain LoRA again.

        Args:
            force: also if coordinates are not zero, so that the function changes. (To keep it, save it with
                `lora_kernels.export`, or merge it.)

        Raises:
            ValueError: if coordinates are not zero, without `force`.
        """
        from lora_kernels.adapters.config import tidy_up  # noqa: PLC0415  (imports peft)

        nonzero = [name for name, part in self.directions().items() if bool(whole(part.coordinates).any())]
        if nonzero and not force:
            raise ValueError(
                f"{len(nonzero)} layers have coordinates that are not zero (first: {nonzero[0]}): export or merge the "
                "adapter to keep them, or detach with force=True"
            )
        _check_unmerged(self.layers)
        for layer in self.layers.values():
            parts.remove(layer, self.adapter, parts.DASH)
        config: Any = self.model.peft_config.get(self.adapter)  # type: ignore[union-attr, operator]
        if config is not None:
            config.dash = None
        tidy_up(self.model, self.adapter)
        self._launched.clear()

    def _group(self, optimizer: Any) -> dict[str, Any]:
        """The parameter group of an optimizer that holds the adapter's factors."""
        if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "add_param_group"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        factors = (part[self.adapter] for layer in self.layers.values() for part in (layer.lora_A, layer.lora_B))
        ids = {id(factor.weight) for factor in factors}
        for group in optimizer.param_groups:
            if not ids.isdisjoint(map(id, group["params"])):
                return group  # type: ignore[no-any-return]
        raise ValueError(
            "the optimizer holds no factor of the adapter (another model's optimizer, or one that keeps flat shards, "
            "as ZeRO's do, which is not supported)"
        )


def _check_unmerged(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"layer {name} has merged adapters: call model.unmerge_adapter() first")


def _launched(name: str, selection: Selection) -> DashLayer:
    """The entry of a layer that has its directions."""
    rates = float(selection.rates[0]), float(selection.rates[-1])
    scale = selection.largest if selection.largest > 0 else 1.0
    sigma = float(selection.sigma.max()) / scale, float(selection.sigma.min()) / scale
    note = "" if rates[0] > 0 else "the adapter has changed nothing: the directions are arbitrary"
    return DashLayer(name=name, status="launched", reason=note, rates=rates, sigma=sigma, share=selection.share)


def _adapter(model: nn.Module, name: str | None) -> str:
    """The adapter's name: the one given, or that of the only active adapter."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise ValueError(f"model ({type(model).__name__}) has no peft_config: pass the PEFT model itself")
    if name is None:
        layers = [layer for _, layer in lora_layers(model)]
        active = list(dict.fromkeys(key for layer in layers for key in layer.active_adapters if key in layer.r))
        if len(active) != 1:
            raise ValueError(f"adapter_name is None, but must be one of the active adapters {active}")
        return str(active[0])
    if name not in configs:
        raise ValueError(f"adapter_name is {name!r}, but the model has {', '.join(map(repr, configs))}")
    return name


def _refusal(layer: Any, adapter: str, k: int) -> str | None:
    if stock_class(layer).__name__ not in KINDS:
        return f"a {stock_class(layer).__name__} layer: only linear layers are supported"
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
    directions = parts.directions(layer, adapter)
    if directions is not None and directions.coordinates.numel() != k:
        raise ValueError(f"k is {k}, but layer {name} has {directions.coordinates.numel()} coordinates already")


def along_directions(u: torch.Tensor, vh: torch.Tensor, factors: Iterable[Factors]) -> torch.Tensor:
    """`u_i^T (sum s B A) v_i` `(q,)` in float64, of u `(m, q)` and vh `(q, n)`, without forming a product `B A`."""
    wide = torch.float64
    u, vh = u.to(wide), vh.to(wide)
    changes = torch.zeros(u.shape[1], dtype=wide, device=u.device)
    for a, b, scaling in factors:
        changes += scaling * ((u.mT @ b.to(wide)) * (vh @ a.to(wide).mT)).sum(1)
    return changes


def select(weight: torch.Tensor, factors: Iterable[Factors], k: int, epsilon: float, cache: str | None) -> Selection:
    """The k core directions of W `(m, n)` that the sum of products `s B A` changes most."""
    factors = list(factors)
    if not all(bool(torch.isfinite(factor).all()) for a, b, _ in factors for factor in (a, b)):
        raise ValueError("the factors of the adapter hold NaN or infinite entries")
    u, s, vh = core_basis(weight, cache)
    return changed_most((u, s, vh), along_directions(u, vh, factors), k, epsilon)


def _factors_of(layer: Any, adapter: str) -> list[Factors]:
    """The adapter's change: its own product, and minus that of its frozen start; whole where they are sharded."""
    scaling, frozen = layer.scaling[adapter], parts.start(layer, adapter)
    factors = [(whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight), scaling)]
    return factors if frozen is None else [*factors, (frozen.a, frozen.b, frozen.sign * scaling)]


def _for_layers(layers: Mapping[str, Any], compute: Any, adapter: str, *, progress: bool) -> dict[str, Any]:
    """By layer, the result of `compute(weight, factors)`; processes share the layers out, and all get all results."""
    # A `ValueError` of `compute` is raised with the layer's name; a failure on another process is a `RuntimeError`.
    results: dict[str, Any] = {}
    error: Exception | None = None
    names = list(layers)
    for name in names:  # on all processes alike, before they share the work out
        check_readable(layers[name], name)
    hidden = not progress or rank() > 0
    for number, name in enumerate(tqdm(names, desc="core directions", unit="layer", disable=hidden, leave=False)):
        layer = layers[name]
        mine = number % world_size() == rank()
        gathered = any(is_sharded(parameter) for parameter in layer.parameters())  # by all processes together
        if not mine and not gathered:
            continue
        weight, factors = dense_weight(layer), _factors_of(layer, adapter)
        if not mine or error is not None:
            continue
        try:
            results[name] = compute(weight, factors)
        except Exception as caught:
            error = ValueError(f"layer {name}: {caught}") if isinstance(caught, ValueError) else caught
    raise_together(error)
    device = next(iter(layers.values())).lora_A[adapter].weight.device
    return share_out(names, results.__getitem__, device)
