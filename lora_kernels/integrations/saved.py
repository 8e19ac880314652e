"""`lk.export` and `lk.load`: adapters with all their parts, to files and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters import parts
from lora_kernels.adapters.base_weight import whole
from lora_kernels.adapters.files import MARK, OWN, mark_of
from lora_kernels.adapters.names import PREFIX, config_name
from lora_kernels.adapters.versions import require_peft
from lora_kernels.integrations import peft as peft_layers
from lora_kernels.integrations.adapter_files import CONFIG, read_config, read_tensors
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.ops._checks import check_range
from lora_kernels.training.dash import LoRADash


def load(
    base: nn.Module, path: str | Path, *, adapter_name: str = "default", is_trainable: bool = True, **settings: Any
) -> nn.Module:
    """Load an adapter that `save_pretrained` wrote, to train on where it stood: frozen start and coordinates apart.

    (Stock `PeftModel.from_pretrained` loads the same function, all of it as factors of a larger rank.) A run of
    LoRA-Dash goes on by `LoRADash(...).attach(model)`, transformers' Trainer by `train(resume_from_checkpoint=...)`.

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
        coordinates = None if dash is None else LoRADash(**dash, adapter_name=adapter_name)
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


def _ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> Iterator[tuple[str, Any, int, float]]:
    """What a config's values mean for every layer of an adapter.

    Yields:
        Name, module, rank and alpha.
    """
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415  (peft is an optional dependency)
    from peft.utils.other import get_pattern_key  # noqa: PLC0415

    ranks, alphas = own.get("rank_pattern") or {}, own.get("alpha_pattern") or {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            short = config_name(name, module)
            rank = ranks.get(get_pattern_key(ranks, short), own["r"])
            yield name, module, rank, alphas.get(get_pattern_key(alphas, short), own["lora_alpha"])


def _check_ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> None:
    for name, module, rank, alpha in _ranks(model, adapter, own):
        rslora = bool(own.get("use_rslora"))
        if (module.r[adapter], module.use_rslora.get(adapter, False)) != (rank, rslora) or not math.isclose(
            module.lora_alpha[adapter], alpha
        ):
            raise ValueError(
                f"layer {name} has rank {module.r[adapter]} and alpha {module.lora_alpha[adapter]}, but the file was "
                f"made for {rank} and {alpha}{' with rsLoRA' * rslora}"
            )


def _cut(model: Any, adapter: str, mark: Mapping[str, Any]) -> None:
    """Give a joined adapter, as PEFT has loaded it, its own ranks and config."""
    config = model.peft_config[adapter]
    for name in OWN:
        setattr(config, name, mark[name])
    config.auto_mapping = {key: value for key, value in config.auto_mapping.items() if key != MARK} or None
    for _, module, rank, alpha in list(_ranks(model, adapter, mark)):
        peft_layers.set_rank(module, adapter, rank, alpha, rslora=mark["use_rslora"])


def _fill(model: Any, adapter: str, coordinates: LoRADash | None, tensors: dict[str, torch.Tensor]) -> None:
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
    model: nn.Module, path: str | Path, *, rank: str | int = "exact", adapter_name: str = "default"
) -> dict[str, ExportedLayer]:
    """Write an adapter as it computes now, as one stock PEFT adapter for the unmodified base.

    Its frozen start is r more rank, LoRA-Dash's coordinates are k more (with B columns `c_i u_i / s`). Unlike
    `save_pretrained`, it writes the scaling that the layers have (`set_scale`), can cut the rank, and leaves out what a
    run needs to go on.

    Args:
        model: the PEFT model.
        path: a folder.
        rank: `"exact"`, or the rank to cut every layer to.
        adapter_name: the adapter.

    Returns:
        By layer, the rank written and the error of cutting.

    Raises:
        ValueError: if `rank` is neither `"exact"` nor a positive number, the adapter is missing, its start has changed
            the base weights, or its coordinates cannot be expressed because s is 0.
        TypeError: if the model is no PEFT model.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)
    from safetensors.torch import save_file  # noqa: PLC0415

    from lora_kernels.adapters.config import changed_base, plain_config, set_ranks, tidy  # noqa: PLC0415  (imports peft)

    if isinstance(rank, str):
        if rank != "exact":
            raise ValueError(f'rank is {rank!r}, but must be "exact" or a number')
    else:
        check_range("rank", rank, low=1, integer=True)
    layers = peft_layers.find_lora_layers(model, adapter_name)
    changed = changed_base(model.peft_config[adapter_name])  # type: ignore[index, union-attr, operator]
    if changed is not None:
        raise ValueError(f"adapter {adapter_name!r} cannot be written for the unmodified base: {changed}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {
        key: value for key, value in state.items() if f".{parts.START}." not in key and f".{parts.DASH}." not in key
    }
    config: Any = plain_config(model.peft_config[adapter_name])  # type: ignore[index, union-attr, operator]
    found: dict[str, ExportedLayer] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for each in layers.supported:
        name = each.target.name
        module: Any = each.target.module
        a, b, error = _product(module, adapter_name, rank)
        scaling = peft_layers.plain_number(module.scaling[adapter_name])
        dtype = module.lora_A[adapter_name].weight.dtype
        for key, value in (("lora_A", a), ("lora_B", b)):
            state[f"{name}.{key}.weight"] = value.detach().to("cpu", dtype).contiguous()
        found[name] = ExportedLayer(a.shape[0], error)
        shapes[config_name(name)] = (a.shape[0], tidy(scaling * a.shape[0]))
    for name, old, _why in layers.unsupported:
        other: Any = model.get_submodule(name)
        shapes[config_name(name, other)] = (old, tidy(peft_layers.plain_number(other.scaling[adapter_name]) * old))
    set_ranks(config, shapes)
    if isinstance(config.target_modules, str):  # servers want a list
        peft_layers.list_modules(model, adapter_name, config)
    config.init_lora_weights, config.inference_mode = True, True
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if peft_layers.is_wrapped(model) else PREFIX
    tensors = {prefix + key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)
    return found


def _product(module: Any, adapter: str, rank: str | int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors to write for one layer."""
    a, b = whole(module.lora_A[adapter].weight), whole(module.lora_B[adapter].weight)
    start, dash = parts.start(module, adapter), parts.directions(module, adapter)
    if start is not None:
        a, b = torch.cat((a, start.a.to(a))), torch.cat((b, start.sign * start.b.to(b)), dim=1)
    if dash is not None and dash.launched:
        more = parts.columns(dash, module.scaling[adapter])
        a, b = torch.cat((a, dash.right.to(a))), torch.cat((b, more.to(b)), dim=1)
    if isinstance(rank, str) or a.shape[0] <= rank:
        return a, b, 0.0
    return compress(a, b, rank)
