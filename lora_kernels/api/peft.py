"""PEFT: which layers carry an adapter, and how factors and ranks are written into it."""

from __future__ import annotations

import contextlib
import gc
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_type
from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import row_blocks, whole
from lora_kernels.adapters.experts import ExpertLayer, expert_layers, why_unseen
from lora_kernels.adapters.names import config_name, patterns
from lora_kernels.adapters.view import LoraView, lora_layers
from lora_kernels.init.factors import LoraFactors
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.statistics.store import Target


@dataclass(frozen=True)
class LoraTarget:
    """A LoRA layer of a PEFT model.

    Attributes:
        view: the layer.
        rank: r of the adapter.
        alpha: its `lora_alpha`.
        rslora: whether the scaling is `alpha / sqrt(r)` instead of `alpha / r`.
    """

    view: LoraView
    rank: int
    alpha: float
    rslora: bool

    @property
    def target(self) -> Target:
        """Name, module and features for the collector."""
        name, module = self.view
        return Target(name, module, module.in_features, module.out_features)

    @property
    def limit(self) -> int:
        """The largest rank that `B A` can have: min(m, n)."""
        return min(self.target.in_features, self.target.out_features)

    @property
    def scaling(self) -> float:
        """Scaling s, by which PEFT multiplies `B A`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraLayers:
    """All layers of one adapter.

    Attributes:
        supported: linear layers; of a parameter of experts, one for each expert, where they were asked for.
        unsupported: other LoRA layers (embeddings, convolutions, ...): name, rank, and why.
    """

    supported: tuple[LoraTarget, ...]
    unsupported: tuple[tuple[str, int, str], ...]


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model carries PEFT adapters."""
    return isinstance(getattr(model, "peft_config", None), Mapping)


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model is PEFT's own; transformers' `add_adapter` and `inject_adapter_in_model` put layers into it."""
    from peft import PeftMixedModel, PeftModel  # noqa: PLC0415  (peft is an optional dependency)

    return isinstance(model, (PeftModel, PeftMixedModel))


def places(model: nn.Module) -> Counter[int]:
    """By how many parameters each storage is held, those counted twice that two modules hold."""
    return Counter(map(_storage, (each for _, each in model.named_parameters(remove_duplicate=False))))


def _storage(parameter: torch.Tensor) -> int:
    whole = not is_sharded(parameter) and parameter.device.type != "meta"
    return parameter.untyped_storage().data_ptr() if whole else 0


def is_tied(parameter: torch.Tensor, counts: Mapping[int, int]) -> bool:
    """Whether a parameter is held by another module, too; `counts` is of `places`."""
    storage = _storage(parameter)
    return storage != 0 and counts[storage] > 1


# Why a parameter of experts is not taken apart, where one call was not made for them.
ONE_LAYER = "it is taken for one layer here, whose input is not the module's input"


def _reason_unsupported(
    view: LoraView, adapter: str, counts: Mapping[int, int], without_experts: str | None
) -> str | None:
    module = view.module
    if isinstance(module.get_base_layer(), nn.MultiheadAttention):
        return "MultiheadAttention: its factors are those of three products, of inputs that are not the module's alone"
    lora_a = module.lora_A[adapter] if adapter in module.lora_A else None  # noqa: SIM401  (older ModuleDicts have no get)
    if not isinstance(lora_a, nn.Linear) or not isinstance(module.lora_B[adapter], nn.Linear):
        return f"{type(module.get_base_layer()).__name__} base: only linear layers have an input covariance here"
    if view.parameter_name is not None:
        if without_experts is not None:
            return f"target_parameters ({view.parameter_name}): {without_experts}"
        return why_unseen(module, adapter)
    if any(is_tied(part[adapter].weight, counts) for part in (module.lora_A, module.lora_B)):
        return "its factors are those of another layer, too (ensure_weight_tying)"
    return None


def find_lora_layers(
    model: nn.Module,
    adapter: str = "default",
    *,
    allow_merged: bool = False,
    without_experts: str | None = ONE_LAYER,
) -> LoraLayers:
    """The LoRA layers of an adapter.

    Args:
        model: a PEFT model.
        adapter: the adapter's name.
        allow_merged: take layers whose base weight holds their adapters, too.
        without_experts: why parameters of experts are left out; with `None` each of their experts is a layer.

    Returns:
        The layers, in the model's order.

    Raises:
        TypeError: if the model is no PEFT model or the adapter no LoRA adapter.
        ValueError: if there is no such adapter, it has no linear layer, it is merged, or its weights are sharded.
    """
    if not is_peft_model(model):
        raise TypeError(f"model must be a PEFT model (get_peft_model), got {type(model).__name__}")
    check_type("adapter_name", adapter, str, "a name")
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if adapter not in configs:
        raise ValueError(f"adapter_name is {adapter!r}, but the model has {', '.join(map(repr, configs))}")
    if str(getattr(configs[adapter].peft_type, "value", configs[adapter].peft_type)) != "LORA":
        raise TypeError(f"adapter {adapter!r} is of type {configs[adapter].peft_type}, but must be LORA")
    supported: list[LoraTarget] = []
    unsupported: list[tuple[str, int, str]] = []
    counts = places(model)
    for view in lora_layers(model, adapter):
        (name, module), rank = view, view.rank(adapter)
        reason: str | None = "no lora_A"
        if hasattr(module, "lora_A"):
            reason = _reason_unsupported(view, adapter, counts, without_experts)
        if reason is not None:
            unsupported.append((name, rank, reason))
            continue
        if module.merged and not allow_merged:
            raise ValueError(f"layer {name} has merged adapters: call model.unmerge_adapter() first")
        if view.parameter_name is not None:
            supported += [
                LoraTarget(LoraView(expert, layer), *_numbers(view, adapter))
                for expert, layer in expert_layers(name, module).items()
            ]
            continue
        shape = tuple(module.lora_A[adapter].weight.shape)
        if shape != (rank, module.in_features):
            raise ValueError(
                f"layer {name} has lora_A of shape {shape}, but must be {(rank, module.in_features)}: sharded weights "
                "(ZeRO-3, FSDP) must be initialised before they are sharded"
            )
        supported.append(LoraTarget(view, *_numbers(view, adapter)))
    if not supported:
        raise ValueError(f"adapter {adapter!r} has no linear LoRA layer")
    return LoraLayers(tuple(supported), tuple(unsupported))


def _numbers(view: LoraView, adapter: str) -> tuple[int, float, bool]:
    return view.rank(adapter), view.alpha(adapter), view.rslora(adapter)


@contextlib.contextmanager
def _layers_disabled(model: nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415  (peft is an optional dependency)

    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer) and not each.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextlib.contextmanager
def base_model_only(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model without its adapters; a plain model as it is.

    Args:
        model: any model.

    Yields:
        Nothing.
    """
    if not is_peft_model(model):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter() if is_wrapped(model) else _layers_disabled(model):  # type: ignore[operator]
            yield
    finally:
        # PEFT makes every active adapter trainable again on the way out, also those that were frozen before.
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_untrained(layers: LoraLayers, adapter: str) -> None:
    """Refuse to overwrite an adapter that already moves the model.

    Args:
        layers: the adapter's layers.
        adapter: its name.

    Raises:
        ValueError: if a `lora_B` is not zero: it was trained, or initialised by a method that starts elsewhere.
    """
    for layer in layers.supported:
        _, b = layer.view.factors(adapter)
        bias = layer.view.module.lora_B[adapter].bias
        for kind, value in (("", b), (" bias", None if bias is None else whole(bias))):
            if value is not None and value.device.type != "meta" and bool((value != 0).any()):
                raise ValueError(
                    f"layer {layer.view.name} has a lora_B{kind} that is not zero: the adapter {adapter!r} is trained "
                    "or was initialised already; force=True overwrites it"
                )


def new_alpha(layer: LoraTarget, rank: int, *, adjust: bool) -> float:
    """The `lora_alpha` after a change of rank.

    Args:
        layer: the layer as it is.
        rank: its new rank.
        adjust: keep the scaling s as it was (PEFT's `adjust_scaling_factors`); otherwise alpha stays.

    Returns:
        The new alpha.
    """
    if not adjust or rank == layer.rank:
        return layer.alpha
    ratio = rank / layer.rank
    return layer.alpha * (math.sqrt(ratio) if layer.rslora else ratio)


def with_rank(layer: LoraTarget, rank: int, *, adjust: bool) -> LoraTarget:
    """A layer as it will be after a change of rank; see `new_alpha`."""
    return replace(layer, rank=rank, alpha=new_alpha(layer, rank, adjust=adjust))


def check_no_optimizer(parameters: Sequence[nn.Parameter], why: str) -> None:
    """Refuse to replace parameters that an optimizer already holds: it would go on to train the old, dead ones.

    Args:
        parameters: the parameters that would be replaced.
        why: what replaces them, for the message.

    Raises:
        ValueError: if a live `torch.optim.Optimizer` holds one of them.
    """
    wanted = {id(parameter) for parameter in parameters}
    if not wanted:
        return
    for candidate in gc.get_objects():
        # `type` and not `isinstance`: the latter runs user code of proxies (lazy modules, weak proxies).
        if not issubclass(type(candidate), torch.optim.Optimizer):
            continue
        for group in getattr(candidate, "param_groups", ()):
            if any(id(parameter) in wanted for parameter in group["params"]):
                raise ValueError(
                    f"an optimizer ({type(candidate).__name__}) already holds parameters that {why} would replace: "
                    "initialise first and create the optimizer afterwards, or keep the ranks (rho=1)"
                )


def replaced_parameters(layers: LoraLayers, ranks: Mapping[str, int], adapter: str) -> list[nn.Parameter]:
    """The parameters that `write` replaces for the given ranks (the others are written in place)."""
    found: list[nn.Parameter] = []
    for each in layers.supported:
        module = each.view.module
        if isinstance(module, ExpertLayer):
            continue
        pair = (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
        if ranks.get(each.view.name, each.rank) != each.rank or pair[0].device.type == "meta":
            found += pair
    return found


def _copy(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write all of a parameter in place, sharded or not."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415  (needs torch.distributed)

        # Every process holds all of the value, the same bits: no process has to send anything.
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(parameter.device, parameter.dtype), mesh, placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(value)


def _put(linear: nn.Linear, value: torch.Tensor, device: torch.device) -> None:
    """Write a weight in place where the shape allows, else as a new parameter of the same dtype and flag."""
    old = linear.weight
    if old.shape == value.shape and old.device.type != "meta":
        _copy(old, value)
        return
    where = device if old.device.type == "meta" else old.device
    linear.weight = nn.Parameter(value.to(where, old.dtype, copy=True), requires_grad=old.requires_grad)
    linear.out_features, linear.in_features = value.shape
    if linear.bias is not None and linear.bias.device.type == "meta":
        linear.bias = nn.Parameter(torch.zeros_like(linear.bias, device=where), linear.bias.requires_grad)


def _write_layer(layer: LoraTarget, factors: LoraFactors, alpha: float, adapter: str) -> None:
    module = layer.view.module
    if isinstance(module, ExpertLayer):
        module.put(adapter, factors.A, factors.B)
        return
    device = next((p.device for p in module.get_base_layer().parameters()), torch.device("cpu"))
    _put(module.lora_A[adapter], factors.A, device)
    _put(module.lora_B[adapter], factors.B, device)
    bias = module.lora_B[adapter].bias
    if bias is not None:  # lora_bias, which is part of the adapter's output
        _copy(bias, torch.zeros_like(bias) if not is_sharded(bias) else torch.zeros(bias.shape))
    if factors.rank != layer.rank:
        _set_scaling(module, adapter, factors.rank, alpha, rslora=layer.rslora)


def magnitudes(module: Any, adapter: str) -> Any:
    """The module that holds DoRA's magnitudes `(m,)` of an adapter of a linear layer, or `None`."""
    held = getattr(module, "lora_magnitude_vector", {})
    return held[adapter] if adapter in held else None  # noqa: SIM401  (a ModuleDict has no get)


def reset_magnitudes(module: Any, adapter: str) -> None:
    """Make DoRA's m the row norms of W + s B A as they are now, so that the layer computes W + s B A.

    Args:
        module: the LoRA layer; one that is not DoRA stays as it is.
        adapter: the adapter's name.
    """
    held = magnitudes(module, adapter)
    if held is None:
        return
    from lora_kernels.training.dora import row_norms  # noqa: PLC0415  (for DoRA alone)

    view = LoraView("", module)
    a, b = view.factors(adapter)
    blocks = (rows.to(a.device) for rows in row_blocks(module)())
    _copy(held.weight, row_norms(blocks, a.to(torch.float32), b.to(torch.float32), view.scaling(adapter)))
    getattr(held, "_dora_cache", {}).clear()


def _set_scaling(module: Any, adapter: str, rank: int, alpha: float, *, rslora: bool) -> None:
    module.r[adapter], module.lora_alpha[adapter], module.use_rslora[adapter] = rank, alpha, rslora
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    if isinstance(module.scaling[adapter], torch.Tensor):  # compiled code reads this very tensor
        module.scaling[adapter].fill_(scaling)
    else:
        module.scaling[adapter] = scaling


def set_rank(module: Any, adapter: str, rank: int, alpha: float, *, rslora: bool) -> None:
    """Keep the first rows of A and columns of B of a layer, with a scaling of their own.

    Args:
        module: the LoRA layer, of any kind.
        adapter: the adapter's name.
        rank: at most what the layer has.
        alpha: its `lora_alpha`.
        rslora: whether the scaling is `alpha / sqrt(r)`.
    """
    if rank < module.r[adapter]:
        a, b = module.lora_A[adapter], module.lora_B[adapter]
        factors = parts.first_ranks(a.weight.detach(), b.weight.detach(), rank, getattr(module, "num_experts", 1))
        for linear, value in zip((a, b), factors, strict=True):
            _put(linear, value, value.device)
    _set_scaling(module, adapter, rank, alpha, rslora=rslora)


def _remove(model: nn.Module, layer: LoraTarget, adapter: str) -> None:
    name, module = layer.view
    if len(module.r) > 1:  # other adapters live on this layer: only ours goes
        module.delete_adapter(adapter)
        return
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.get_base_layer())


def _matches(config: Any, name: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists  # noqa: PLC0415

    return bool(check_target_module_exists(config, name))


def _config_names(model: nn.Module, adapter: str) -> tuple[dict[str, tuple[int, float]], list[str], list[str]]:
    """Rank and alpha of an adapter's layers; the modules among them; and modules without the adapter."""
    views = lora_layers(model, adapter)
    with_adapter = {view.config_name: (view.rank(adapter), view.alpha(adapter)) for view in views}
    modules = [view.config_name for view in views if view.parameter_name is None]
    names = {name for name, _ in model.named_modules() if ".base_layer" not in name and ".lora_" not in name}
    return with_adapter, modules, [config_name(name) for name in names - {view.name for view in views}]


def update_config(model: nn.Module, adapter: str, *, removed: bool) -> None:
    """Make the adapter's config describe its layers, so that stock PEFT rebuilds them when it loads the adapter.

    Args:
        model: the PEFT model, factors written.
        adapter: the adapter's name.
        removed: whether layers lost their adapter, so that `target_modules` must name those left.
    """
    from lora_kernels.adapters.config import tidy  # noqa: PLC0415  (imports peft)

    config: Any = model.peft_config[adapter]  # type: ignore[index, union-attr, operator]
    layers, _, _ = _config_names(model, adapter)
    # Servers allocate for r, and take `lora_alpha / r` for the scaling: the largest rank, and its alpha.
    config.r = max(rank for rank, _ in layers.values())
    config.lora_alpha = next(tidy(alpha) for rank, alpha in layers.values() if rank == config.r)
    config.rank_pattern, config.alpha_pattern = patterns(layers, config)
    if removed:
        list_modules(model, adapter, config)


def list_modules(model: nn.Module, adapter: str, config: Any, *, always: bool = False) -> None:
    """Make a config name the modules that have an adapter, and no others.

    Args:
        model: the PEFT model.
        adapter: the adapter's name.
        config: changed in place.
        always: a list, also where only an expression can tell the modules from others; `exclude_modules` does then.
    """
    _, modules, without = _config_names(model, adapter)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    for names in ({name.rpartition(".")[2] for name in modules}, set(modules)):
        config.target_modules = names
        if not any(_matches(config, name) for name in without):
            return
    # Names are matched by their tails: where that is ambiguous, one regular expression matches whole names.
    if always:  # of what the list matches too much
        others = [name for name in without if _matches(config, name)]
        config.exclude_modules = "|".join(re.escape(name) for name in sorted(others))
        return
    config.target_modules = "|".join(re.escape(name) for name in sorted(modules))


def write(
    model: nn.Module,
    layers: LoraLayers,
    factors: Mapping[str, LoraFactors],
    adapter: str,
    *,
    adjust_scaling_factors: bool,
) -> None:
    """Write factors into an adapter, ranks and config included.

    Weights whose shape stays are written in place; the others become new parameters. A layer of rank 0 loses its
    adapter.

    Args:
        model: the PEFT model.
        layers: its layers, from `find_lora_layers`.
        factors: by layer name; layers without an entry stay as they are.
        adapter: the adapter's name.
        adjust_scaling_factors: see `new_alpha`.

    Raises:
        ValueError: if an optimizer holds a parameter that would be replaced, ranks of a sharded adapter would change,
            or no layer would keep an adapter.
    """
    ranks = {name: each.rank for name, each in factors.items()}
    if not any(ranks.get(each.view.name, each.rank) for each in layers.supported):
        raise ValueError("every layer would get rank 0: raise the rank, or set min_rank")
    replaced = replaced_parameters(layers, ranks, adapter)
    if any(is_sharded(each) for each in replaced):
        raise ValueError(
            "the adapter is sharded (FSDP), so its ranks cannot change: keep them (rho=1), or initialise before "
            "sharding, for instance from statistics that were collected on the sharded model"
        )
    check_no_optimizer(replaced, "the new ranks")
    removed = False
    for layer in layers.supported:
        found = factors.get(layer.view.name)
        if found is None:
            continue
        if found.rank == 0:
            _remove(model, layer, adapter)
            removed = True
            continue
        _write_layer(layer, found, new_alpha(layer, found.rank, adjust=adjust_scaling_factors), adapter)
    if removed or any(ranks.get(layer.view.name, layer.rank) != layer.rank for layer in layers.supported):
        update_config(model, adapter, removed=removed)
