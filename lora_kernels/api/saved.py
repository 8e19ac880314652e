"""`lk.export` and `lk.load`: adapters with all their parts, to files and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_choice, check_range
from lora_kernels._files import replacing_folder, write_tensors
from lora_kernels.adapters import parts, servers
from lora_kernels.adapters.files import MARK, OWN, WEIGHTS, mark_of
from lora_kernels.adapters.versions import require_peft
from lora_kernels.adapters.view import LoraView, lora_layers
from lora_kernels.api import peft as peft_layers
from lora_kernels.api.adapter_files import CONFIG, read_config, read_tensors
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.reports import PREFIX
from lora_kernels.training.dash import LoraDash


def load(
    base: nn.Module, path: str | Path, *, adapter_name: str = "default", is_trainable: bool = True, **settings: Any
) -> nn.Module:
    """Load an adapter that `save_pretrained` wrote, to train on where it stood: frozen start and coordinates apart.

    (Stock `PeftModel.from_pretrained` loads the same function, all of it as factors of a larger rank.) A run of
    LoRA-Dash goes on by `LoraDash(...).attach(model)`, transformers' Trainer by `train(resume_from_checkpoint=...)`.

    Args:
        base: the unmodified base model; or a PEFT model that has the adapter already, of the same ranks, as a script
            makes it that would otherwise call `initialize`.
        path: the adapter's folder, such as a Trainer's checkpoint.
        adapter_name: the name that it gets, or has.
        is_trainable: whether its factors are to be trained; of a PEFT model they stay as they are.
        settings: more arguments of `PeftModel.from_pretrained`.

    Returns:
        The PEFT model.

    Raises:
        ValueError: if the folder is missing, malformed or of another method, or does not fit the model: a factor of
            another shape, or one that only the file or only the model has.
        TypeError: on settings for a PEFT model, which is there already.
        ImportError: if PEFT is missing or too old.
    """
    require_peft()
    from peft import PeftModel  # noqa: PLC0415  (peft is an optional dependency)

    folder = Path(path)
    config, tensors = read_config(folder), read_tensors(folder)
    mark = mark_of(config)
    dash = None if mark is None else mark["dash"]
    try:
        coordinates = None if dash is None else LoraDash(**dash, adapter_name=adapter_name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} has wrong settings of LoRA-Dash: {error}") from error
    model: Any = base
    there = peft_layers.is_peft_model(base)
    if there:
        if settings:
            raise TypeError(f"{', '.join(sorted(settings))}: the model is a PEFT model already")
        peft_layers.find_lora_layers(base, adapter_name)  # or an error
        _check_ranks(model, adapter_name, config if mark is None else mark)
    try:
        if not there:
            model = PeftModel.from_pretrained(
                base, str(path), adapter_name=adapter_name, is_trainable=is_trainable, **settings
            )
        _check_complete(model, adapter_name, folder, tensors)
        if mark is not None and not there:
            _cut(model, adapter_name, mark)
        if mark is not None or there:
            _fill(model, adapter_name, coordinates, tensors)
    except Exception as error:  # noqa: BLE001  (a wrong value surfaces anywhere in PEFT, as any error)
        raise ValueError(f"adapter {str(folder)!r} cannot be loaded onto this model: {error!r}") from error
    return model  # type: ignore[no-any-return]


def _ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> Iterator[tuple[LoraView, int, float]]:
    """What a config's values mean for every layer of an adapter.

    Yields:
        The layer, its rank and alpha.
    """
    from peft.utils.other import get_pattern_key  # noqa: PLC0415

    ranks, alphas = own.get("rank_pattern") or {}, own.get("alpha_pattern") or {}
    for view in lora_layers(model, adapter):
        rank = ranks.get(get_pattern_key(ranks, view.config_name), own["r"])
        yield view, rank, alphas.get(get_pattern_key(alphas, view.config_name), own["lora_alpha"])


def _check_ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> None:
    rslora = bool(own.get("use_rslora"))
    for view, rank, alpha in _ranks(model, adapter, own):
        has = view.rank(adapter), view.alpha(adapter)
        if (has[0], view.rslora(adapter)) != (rank, rslora) or not math.isclose(has[1], alpha):
            raise ValueError(
                f"layer {view.name} has rank {has[0]} and alpha {has[1]}, but the file was made for {rank} and {alpha}"
                f"{' with rsLoRA' * rslora}"
            )


def _cut(model: Any, adapter: str, mark: Mapping[str, Any]) -> None:
    """Give a joined adapter, as PEFT has loaded it, its own ranks and config."""
    config = model.peft_config[adapter]
    for name in OWN:
        setattr(config, name, mark[name])
    config.auto_mapping = {key: value for key, value in config.auto_mapping.items() if key != MARK} or None
    for view, rank, alpha in _ranks(model, adapter, mark):
        peft_layers.set_rank(view.module, adapter, rank, alpha, rslora=mark["use_rslora"])


def _fill(model: Any, adapter: str, coordinates: LoraDash | None, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors into an adapter of its own ranks, taken apart into its parts."""
    from peft import set_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    from lora_kernels.adapters.config import describe, tidy_up  # noqa: PLC0415  (imports peft)

    describe(model, adapter)
    if coordinates is not None:
        coordinates.attach(model)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    tidy_up(model, adapter)


def _check_complete(model: Any, adapter: str, folder: Path, tensors: Iterable[str]) -> None:
    """PEFT passes over factors that only the file or only the model has, which would be another adapter."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    def factors(names: Iterable[str]) -> set[str]:
        return {name for name in names if ".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name}

    # Without embeddings: whether they have changed, older versions look up in the base model's folder, and warn.
    held = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    written, wanted = factors(tensors), factors(held)
    for missing, where, other in (
        (wanted - written, "the model", "the file"),
        (written - wanted, "the file", "the model"),
    ):
        if missing:
            raise ValueError(
                f"adapter {str(folder)!r} does not fit this model: {where} has {min(missing)}, which {other} has not "
                f"({len(missing)} such)"
            )


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
    """The best product of rank `rank` to a product of factors, without forming it (QR of both, SVD of the core).

    Args:
        a: `(q, n)`.
        b: `(m, q)`.
        rank: at most q.

    Returns:
        A `(rank, n)` and B `(m, rank)` in float64, balanced (`A A^T = B^T B`), and the relative Frobenius error.
    """
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

    Args:
        model: the PEFT model.
        path: a folder. If it is there, its adapter is replaced in one step and its other files stay.
        rank: `"exact"`, or the rank to cut every layer to.
        adapter_name: the adapter.
        serving: write what PEFT, vLLM, SGLang and llama.cpp compute alike: one rank for all layers (the smaller ones
            padded with zeros), one alpha, no patterns, no rsLoRA, `target_modules` as a list. `True` or `"vllm"`: the
            rank is one of vLLM's `--max-lora-rank`; `"llama.cpp"`: the largest that a layer has.

    Returns:
        By layer, the rank written and the error of cutting.

    Raises:
        ValueError: if `rank` is neither `"exact"` nor a positive number, `serving` is not one of its values, the
            adapter is missing, its start has changed the base weights, its coordinates cannot be expressed because s
            is 0, or no server computes all of it. Nothing is written then.
        TypeError: if the model is no PEFT model.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    from lora_kernels.adapters.config import changed_base, plain_config, set_ranks, tidy  # noqa: PLC0415  (imports peft)

    if isinstance(rank, str):
        if rank != "exact":
            raise ValueError(f'rank is {rank!r}, but must be "exact" or a number')
    else:
        check_range("rank", rank, low=1, integer=True)
    if not isinstance(serving, bool):
        check_choice("serving", serving, ("vllm", "llama.cpp"))
    layers = peft_layers.find_lora_layers(model, adapter_name)
    changed = changed_base(model.peft_config[adapter_name])  # type: ignore[index, union-attr, operator]
    if changed is not None:
        raise ValueError(f"adapter {adapter_name!r} cannot be written for the unmodified base: {changed}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {
        key: value for key, value in state.items() if f".{parts.START}." not in key and f".{parts.DASH}." not in key
    }
    config: Any = plain_config(model.peft_config[adapter_name])  # type: ignore[index, union-attr, operator]
    if serving:
        _check_servable(config, layers, state)
    views = {layer.view.name: layer.view for layer in layers.supported}
    factors = {name: _product(view, adapter_name, rank) for name, view in views.items()}
    scalings = {name: view.scaling(adapter_name) for name, view in views.items()}
    scaling = servers.common(scalings.values())
    highest = max(a.shape[0] for a, _, _ in factors.values())
    width = servers.slot(highest, "llama.cpp" if serving == "llama.cpp" else "vllm") if serving else 0
    found: dict[str, ExportedLayer] = {}
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
        found[name] = ExportedLayer(a.shape[0], error)
        shapes[views[name].config_name] = (a.shape[0], tidy(scaling * a.shape[0]))
    for name, old, _why in layers.unsupported:
        other = LoraView(name, model.get_submodule(name))
        shapes[other.config_name] = (old, tidy(other.scaling(adapter_name) * old))
    set_ranks(config, shapes)
    if serving or isinstance(config.target_modules, str):  # servers want a list
        peft_layers.list_modules(model, adapter_name, config, always=bool(serving))
    config.init_lora_weights, config.inference_mode = True, True
    prefix = "" if peft_layers.is_wrapped(model) else PREFIX
    tensors = {prefix + key: value.clone() for key, value in state.items()}  # some share their memory
    with replacing_folder(path) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        config.save_pretrained(folder)
    return found


def _check_servable(config: Any, layers: peft_layers.LoraLayers, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no server computes, before anything is written."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    refused = servers.refusals(vars(config), shapes)
    if not refused and layers.unsupported:
        name, _, why = layers.unsupported[0]
        refused = [f"layer {name} ({why})"]
    if refused:
        raise ValueError(f"servers of adapters do not compute {', '.join(refused)}: {servers.MERGE}")


def _product(layer: LoraView, adapter: str, rank: str | int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors to write for one layer."""
    (a, b), module = layer.factors(adapter), layer.module
    start, dash = parts.start(module, adapter), parts.directions(module, adapter)
    if start is not None:
        a, b = torch.cat((a, start.a.to(a))), torch.cat((b, start.sign * start.b.to(b)), dim=1)
    if dash is not None and dash.launched:
        more = parts.columns(dash, module.scaling[adapter])
        a, b = torch.cat((a, dash.right.to(a))), torch.cat((b, more.to(b)), dim=1)
    if isinstance(rank, str) or a.shape[0] <= rank:
        return a, b, 0.0
    return compress(a, b, rank)
