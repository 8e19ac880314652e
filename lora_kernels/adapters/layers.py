"""Which layers of a PEFT model carry an adapter, and with which rank and alpha."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_type
from lora_kernels.adapters.base_weight import whole
from lora_kernels.adapters.experts import PRODUCTS, ExpertLayer, expert_layers, why_unseen
from lora_kernels.adapters.names import scaling_of
from lora_kernels.adapters.view import LoraView, lora_layers
from lora_kernels.runtime.modes import is_sharded
from lora_kernels.runtime.processes import unwrap


@dataclass(frozen=True)
class AdapterLayer:
    """A linear layer of one adapter: the layer, and rank, `lora_alpha` and rsLoRA flag of the adapter."""

    name: str  # in the model
    module: Any  # PEFT's layer
    rank: int
    alpha: float
    rslora: bool

    @property
    def view(self) -> LoraView:
        """The layer with all of its adapters."""
        return LoraView(self.name, self.module)

    @property
    def parameter(self) -> str | None:
        """Of a single expert, the name of the parameter of all experts."""
        return self.name.rpartition(".")[0] if isinstance(self.module, ExpertLayer) else None

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`, outputs and inputs."""
        return self.module.out_features, self.module.in_features

    @property
    def scaling(self) -> float:
        """Scaling s, by which PEFT multiplies `B A`."""
        return scaling_of(self.alpha, self.rank, self.rslora)

    def with_rank(self, rank: int, *, adjust: bool) -> AdapterLayer:
        """The layer after a change of rank; `adjust` keeps the scaling (PEFT's `adjust_scaling_factors`), not alpha."""
        if not adjust or rank == self.rank:
            return replace(self, rank=rank)
        ratio = rank / self.rank
        return replace(self, rank=rank, alpha=self.alpha * (math.sqrt(ratio) if self.rslora else ratio))


@dataclass(frozen=True)
class AdapterLayers:
    """All layers of one adapter: linear ones, single experts where asked for, and others as name, rank and reason."""

    supported: tuple[AdapterLayer, ...]
    unsupported: tuple[tuple[str, int, str], ...]


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model carries PEFT adapters."""
    return isinstance(getattr(model, "peft_config", None), Mapping)


def is_wrapped(model: nn.Module) -> bool:
    """Whether the model is PEFT's own; transformers' `add_adapter` and `inject_adapter_in_model` put layers into it."""
    from peft import PeftMixedModel, PeftModel  # noqa: PLC0415  (peft is an optional dependency)

    return isinstance(model, (PeftModel, PeftMixedModel))


def places(model: nn.Module) -> Counter[int]:
    """The number of parameters that use a storage; one that two modules hold counts twice."""
    return Counter(_storage(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))


def _storage(parameter: torch.Tensor) -> int:
    has_storage = not is_sharded(parameter) and parameter.device.type != "meta"
    return parameter.untyped_storage().data_ptr() if has_storage else 0


def is_tied(parameter: torch.Tensor, counts: Mapping[int, int]) -> bool:
    """Whether a parameter is held by another module, too; `counts` is of `places`."""
    storage = _storage(parameter)
    return storage != 0 and counts[storage] > 1


_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # which PEFT converts
# Why the experts of a parameter are left out, where the caller does not ask for them.
_ONE_LAYER = "its input is not the module's input"


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


def left_out_by_peft(model: nn.Module, adapter: str) -> str | None:
    """Which linear layers have no adapter because PEFT (from 0.20) takes their names for those of experts, in words."""
    # Its conversion of `target_modules` for mixtures makes `gate_proj`, `up_proj` and `down_proj` (`w1` to `w3`)
    # parameters of experts wherever they are: shared experts and dense layers are left out.
    parameters: set[str] = set(model.peft_config[adapter].target_parameters or ())  # type: ignore[index, union-attr, operator]
    if not parameters.intersection(PRODUCTS):
        return None  # (those that a user names have the path of their module)
    adapted = {view.name for view in lora_layers(model, adapter)}
    names = [
        name
        for name, module in unwrap(model).named_modules()
        if isinstance(module, nn.Linear) and name not in adapted and name.rpartition(".")[2] in _OF_EXPERTS
    ]
    if not names:
        return None
    return (
        f"{len(names)} linear layers have no adapter (first: {names[0]}): PEFT takes gate_proj, up_proj and down_proj "
        "for experts in this model, wherever they are"
    )


def find_lora_layers(
    model: nn.Module,
    adapter: str = "default",
    *,
    allow_merged: bool = False,
    without_experts: str | None = _ONE_LAYER,
    allow_none: bool = False,
) -> AdapterLayers:
    """The LoRA layers of an adapter, in the model's order; `allow_merged`: also those that are merged."""
    # `without_experts` says why parameters of experts are left out; with `None` their experts are layers.
    # `allow_none`: layers that are not supported may be all that there is. An error says what is wrong with the model,
    # the adapter or its weights.
    if not is_peft_model(model):
        raise TypeError(f"model must be a PEFT model (get_peft_model), got {type(model).__name__}")
    check_type("adapter_name", adapter, str, "a name")
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if adapter not in configs:
        raise ValueError(f"adapter_name is {adapter!r}, but the model has {', '.join(map(repr, configs))}")
    if str(getattr(configs[adapter].peft_type, "value", configs[adapter].peft_type)) != "LORA":
        raise TypeError(f"adapter {adapter!r} is of type {configs[adapter].peft_type}, but must be LORA")
    supported: list[AdapterLayer] = []
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
        numbers = rank, view.alpha(adapter), view.rslora(adapter)
        if view.parameter_name is not None:
            experts = expert_layers(name, module)
            supported += [AdapterLayer(expert, layer, *numbers) for expert, layer in experts.items()]
            continue
        shape = tuple(module.lora_A[adapter].weight.shape)
        if shape != (rank, module.in_features):
            raise ValueError(
                f"layer {name} has lora_A of shape {shape}, but must be {(rank, module.in_features)}: sharded weights "
                "(ZeRO-3, FSDP) must be initialised before they are sharded"
            )
        supported.append(AdapterLayer(name, module, *numbers))
    if not supported and not (allow_none and unsupported):
        raise ValueError(f"adapter {adapter!r} has no linear LoRA layer")
    return AdapterLayers(tuple(supported), tuple(unsupported))


@contextlib.contextmanager
def base_model_only(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model without its adapters, and any other model as it is."""
    if not is_peft_model(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415  (peft is an optional dependency)

    with contextlib.ExitStack() as undo:
        # PEFT makes every active adapter trainable again on the way out, also those that were frozen before.
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        if is_wrapped(model):
            undo.enter_context(model.disable_adapter())  # type: ignore[operator]
        else:
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
                    undo.callback(layer.enable_adapters, True)
                    layer.enable_adapters(False)
        yield


def check_untrained(layers: AdapterLayers, adapter: str) -> None:
    """Raise a ValueError if a `lora_B` is not zero: the adapter is trained, or was initialised already."""
    for layer in layers.supported:
        a, b = layer.view.factors(adapter)
        if isinstance(layer.module, ExpertLayer) and not bool(a.any()):
            continue  # PEFT before 0.20 has experts start with A at zero
        bias = layer.module.lora_B[adapter].bias
        for kind, value in (("", b), (" bias", None if bias is None else whole(bias))):
            if value is not None and value.device.type != "meta" and bool((value != 0).any()):
                raise ValueError(
                    f"layer {layer.name} has a lora_B{kind} that is not zero: the adapter {adapter!r} is trained "
                    "or was initialised already; force=True overwrites it"
                )
