"""`lk.export`: an adapter with all its parts, as one stock adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_range
from lora_kernels._files import replacing_folder, write_tensors
from lora_kernels.adapters import parts, servers
from lora_kernels.adapters.base_weight import whole
from lora_kernels.adapters.experts import join_experts, split_experts
from lora_kernels.adapters.folders import WEIGHTS
from lora_kernels.adapters.layers import find_lora_layers, is_wrapped
from lora_kernels.adapters.view import LoraView
from lora_kernels.adapters.writing import list_modules
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.reports import PREFIX


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported adapter.

    Attributes:
        rank: of the written adapter.
        error: `|P - P_k| / |P|` (Frobenius) of the product that it stands for; 0 where nothing was cut.
    """

    rank: int
    error: float


def compress(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The balanced A `(rank, n)` and B `(m, rank)`, float64, closest to a product `b a` of `(m, q)` and `(q, n)`."""
    # Also the relative Frobenius error. The product is never formed (QR of both, SVD of the core).
    left, core_b = torch.linalg.qr(b.to(torch.float64))
    right, core_a = torch.linalg.qr(a.to(torch.float64).mT)
    u, s, vh = torch.linalg.svd(core_b @ core_a.mT)
    total = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[rank:])) / total if total > 0 else 0.0
    u, v = fix_pair(left @ u[:, :rank], right @ vh.mT[:, :rank])
    root = s[:rank].sqrt()
    return (v * root).mT, u * root, error


def export(
    model: nn.Module,
    path: str | Path,
    *,
    rank: str | int = "exact",
    adapter_name: str = "default",
    serving: bool | str = False,
) -> dict[str, ExportedLayer]:
    """Write an adapter as it computes now, as one stock PEFT adapter for the unmodified base.

    Its frozen start is r more rank, LoRA-Dash's coordinates are k more (with B columns `c_i u_i / s`). Unlike
    `save_pretrained`, it writes the scaling that the layers have (`set_scale`), can cut the rank, and leaves out what a
    run needs to go on. All linear layers get one scaling, that of most of them; the rest is multiplied into their B.
    Experts that are one parameter, convolutions and embeddings keep their own, by a pattern.

    Args:
        model: the PEFT model.
        path: a folder. If it is there, its adapter is replaced in one step and its other files stay.
        rank: `"exact"`, or the rank to cut every linear layer and expert to.
        adapter_name: the adapter.
        serving: write what PEFT, vLLM, SGLang and llama.cpp compute alike: one rank for all layers (the smaller ones
            padded with zeros), one alpha, no patterns, no rsLoRA, `target_modules` as a list. `True` or `"vllm"`: the
            rank is one of vLLM's `--max-lora-rank`; `"llama.cpp"`: the largest that a layer has.

    Returns:
        By layer, the rank written and the error of cutting; of experts, the largest.

    Raises:
        ValueError: if `rank` is neither `"exact"` nor a positive number, `serving` is not one of its values, the
            adapter is missing, its start has changed the base weights, its coordinates cannot be expressed because s
            is 0, or no server computes all of it. Nothing is written then.
        TypeError: if the model is no PEFT model.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    from lora_kernels.adapters.config import changed_base, plain_config, set_ranks, tidy  # noqa: PLC0415  (imports peft)

    if isinstance(rank, str) and rank != "exact":
        raise ValueError(f'rank is {rank!r}, but must be "exact" or a number')
    if not isinstance(rank, str):
        check_range("rank", rank, low=1, integer=True)
    if not isinstance(serving, bool):
        check_choice("serving", serving, ("vllm", "llama.cpp"))
    layers = find_lora_layers(model, adapter_name, allow_none=True)
    config: Any = model.peft_config[adapter_name]  # type: ignore[index, union-attr, operator]
    if (changed := changed_base(config)) is not None:
        raise ValueError(f"adapter {adapter_name!r} cannot be written for the unmodified base: {changed}")
    whole_state, own = get_peft_model_state_dict(model, adapter_name=adapter_name), (parts.START, parts.DASH)
    state = {key: value for key, value in whole_state.items() if not any(f".{name}." in key for name in own)}
    config = plain_config(config)
    if serving:  # refuse what no server computes, before anything is written
        refused = servers.refusals(vars(config), {name: tuple(value.shape) for name, value in state.items()})
        refused = refused or [f"layer {name} ({why})" for name, _, why in layers.unsupported[:1]]
        if refused:
            raise ValueError(f"servers of adapters do not compute {servers.words(refused)}")
    views = {layer.name: layer.view for layer in layers.supported}
    factors = {name: _product(view, adapter_name, rank) for name, view in views.items()}
    scalings = {name: view.scaling(adapter_name) for name, view in views.items()}
    scaling = servers.common(scalings.values())
    highest = max((a.shape[0] for a, _, _ in factors.values()), default=0)
    width = 0 if not serving else highest if serving == "llama.cpp" else servers.slot(highest)
    exported: dict[str, ExportedLayer] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for name, (a, b, error) in factors.items():
        dtype = views[name].module.lora_A[adapter_name].weight.dtype
        if scalings[name] != scaling:
            wide = torch.promote_types(b.dtype, torch.float32)
            b = b.to(wide) * (scalings[name] / scaling)  # noqa: PLW2901
            bias = f"{name}.lora_B.bias"
            if bias in state:
                state[bias] = (state[bias].to(wide) * (scalings[name] / scaling)).to(state[bias].dtype)
        more = max(0, width - a.shape[0])
        a, b = nn.functional.pad(a, (0, 0, 0, more)), nn.functional.pad(b, (0, more))  # noqa: PLW2901
        for key, value in (("lora_A", a), ("lora_B", b)):
            state[f"{name}.{key}.weight"] = value.detach().to(dtype)
        exported[name] = ExportedLayer(a.shape[0], error)
        shapes[views[name].config_name] = (a.shape[0], tidy(scaling * a.shape[0]))
    for name, old, _why in layers.unsupported:
        other = LoraView(name, model.get_submodule(name))
        start = parts.start(other.module, adapter_name)  # (joined to the factors in the state dict)
        exported[name] = ExportedLayer(old + (0 if start is None else start.rank), 0.0)
        if other.parameter_name is not None and not isinstance(rank, str) and exported[name].rank > rank:
            exported[name] = _cut_experts(state, name, other.module.num_experts, rank)
        written = exported[name].rank
        shapes[other.config_name] = (written, tidy(other.scaling(adapter_name) * written))
    config.use_rslora = False
    set_ranks(config, shapes)
    if serving or isinstance(config.target_modules, str):  # servers want a list
        list_modules(model, adapter_name, config, always=bool(serving))
    config.init_lora_weights, config.inference_mode = True, True
    prefix = "" if is_wrapped(model) else PREFIX
    tensors = {prefix + key: value.clone() for key, value in state.items()}  # some share their memory
    with replacing_folder(path) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        config.save_pretrained(folder)
    return exported


def _cut_experts(state: dict[str, torch.Tensor], name: str, experts: int, rank: int) -> ExportedLayer:
    """Cut every expert of a parameter to a rank, in a state dict; the error is the largest of theirs."""
    key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    pairs = split_experts(state[key_a].detach().unsqueeze(0), state[key_b].detach().unsqueeze(0), experts)
    cut = [compress(a, b, rank) for a, b in zip(*pairs, strict=True)]
    first, second = join_experts(torch.stack([a for a, _, _ in cut]), torch.stack([b for _, b, _ in cut]), experts)
    state[key_a], state[key_b] = first[0].to(state[key_a].dtype), second[0].to(state[key_b].dtype)
    return ExportedLayer(rank, max(error for _, _, error in cut))


def _product(layer: LoraView, adapter: str, rank: str | int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors to write for one layer."""
    (a, b), module = layer.factors(adapter), layer.module
    start, dash = parts.start(module, adapter), parts.directions(module, adapter)
    if start is not None:
        a, b = torch.cat((a, start.a.to(a))), torch.cat((b, start.sign * start.b.to(b)), dim=1)
    if dash is not None and dash.launched:
        more = parts.columns(dash.left, whole(dash.coordinates), module.scaling[adapter])
        a, b = torch.cat((a, dash.right.to(a))), torch.cat((b, more.to(b)), dim=1)
    if isinstance(rank, str) or a.shape[0] <= rank:
        return a, b, 0.0
    return compress(a, b, rank)
