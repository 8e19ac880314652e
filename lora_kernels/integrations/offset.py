"""Adapters that start away from zero, on base weights that stay as they are.

A method such as PiSSA starts at `s B0 A0 != 0` and keeps the model's function by taking that off the base weight. Here
the base weight is never touched: `-s B0 A0` is a second, frozen adapter of the same PEFT model, active beside the
first. Its factors are buffers, not parameters, so no optimizer, no `requires_grad_` and no `disable_adapter` of PEFT
can set them free. `export` writes both as one stock adapter.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.init.factors import LoraFactors
from lora_kernels.integrations import peft as peft_layers
from lora_kernels.integrations.adapter_files import CONFIG, read_config, read_tensors
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops._checks import check_range
from lora_kernels.training.base_weight import PLAIN, dense_weight, offset_name, weight_kind
from lora_kernels.training.dash import LoRADash
from lora_kernels.training.dash import module as dash_module


def has_offset(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter has its frozen counterpart."""
    return offset_name(adapter) in model.peft_config  # type: ignore[operator]


def base_weight(module: Any, name: str = "") -> torch.Tensor:
    """The weight under a LoRA layer.

    Args:
        module: a PEFT LoRA layer.
        name: its name in the model, for the message.

    Returns:
        W, `(m, n)` float32, a copy where the base is quantized, sharded or of another dtype.

    Raises:
        ValueError: if it cannot be read.
    """
    return dense_weight(module, name).to(torch.float32)


@contextlib.contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """PEFT makes the parameters of every adapter that it activates trainable, also those frozen before."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _add(model: nn.Module, adapter: str, config: Any) -> None:
    """Add an adapter of LoRA layers alone, active beside the others.

    (`model.add_adapter` of a classifier would train another copy of its head with it, and `model.set_adapter` refuses
    two adapters where one of them has modules to save.)
    """
    from peft import PeftModel  # noqa: PLC0415  (peft is an optional dependency)

    config.modules_to_save = config.trainable_token_indices = None
    with _flags_kept(model):
        active = list(model.active_adapters)  # type: ignore[arg-type]
        PeftModel.add_adapter(model, adapter, config)  # type: ignore[arg-type]
        _activate(model, [*active, adapter])


def _activate(model: nn.Module, adapters: list[str]) -> None:
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415  (peft is an optional dependency)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(adapters)
    model.base_model.active_adapter = adapters  # type: ignore[union-attr]


def remove(model: nn.Module, adapter: str) -> None:
    """Delete the frozen counterpart of an adapter, if there is one."""
    if has_offset(model, adapter):
        with _flags_kept(model):
            active = [each for each in model.active_adapters if each != offset_name(adapter)]  # type: ignore[union-attr]
            _activate(model, active)
            model.delete_adapter(offset_name(adapter))  # type: ignore[operator]


def _freeze(linear: nn.Linear, weight: torch.Tensor) -> None:
    """Make a weight a buffer."""
    del linear.weight
    linear.register_buffer("weight", weight)


def check(model: nn.Module, layers: peft_layers.LoraLayers, adapter: str, base: str) -> None:
    """Refuse what could not be finished, before anything is read or written.

    Args:
        model: the PEFT model.
        layers: the adapter's layers.
        adapter: its name.
        base: `intact` or `mutate`.

    Raises:
        ValueError: if the adapter uses DoRA (its output is not `s B A x`), the model cannot take a second one, or a
            base weight that should change is no plain tensor.
    """
    if model.peft_config[adapter].use_dora:  # type: ignore[index, union-attr, operator]
        raise ValueError(f"adapter {adapter!r} uses DoRA, which cannot start away from zero and keep the function")
    if base == "intact" and not peft_layers.is_wrapped(model):
        raise ValueError(
            f"adapter {adapter!r} was put into the model (transformers' add_adapter, peft.inject_adapter_in_model), "
            'which cannot take the frozen adapter of base="intact": use peft.get_peft_model, or base="mutate"'
        )
    for each in layers.supported:
        if base == "mutate" and weight_kind(each.target.module) != PLAIN:
            raise ValueError(
                f"layer {each.target.name} has a quantized base, or one whose weight is no plain tensor: only "
                'base="intact" is possible'
            )


def attach(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Take what an adapter's factors are now off the model's function, by a frozen adapter beside it.

    Args:
        model: the PEFT model, factors written.
        adapter: the adapter.
        names: its layers that start away from zero.
    """
    config: Any = copy.deepcopy(model.peft_config[adapter])  # type: ignore[index, union-attr, operator]
    config.init_lora_weights, config.lora_dropout, config.lora_bias = True, 0.0, False  # B = 0, so nothing is added
    frozen = offset_name(adapter)
    _add(model, frozen, config)
    for name in names:
        module: Any = model.get_submodule(name)
        _freeze(module.lora_A[frozen], module.lora_A[adapter].weight.detach().clone())
        _freeze(module.lora_B[frozen], -module.lora_B[adapter].weight.detach())
        module.scaling[frozen] = module.scaling[adapter]
    for name, parameter in model.named_parameters():
        if f".{frozen}." in name or name.endswith(f".{frozen}"):
            parameter.requires_grad_(False)


@without_autocast()
def load(
    base: nn.Module, path: str | Path, *, adapter_name: str = "default", is_trainable: bool = True, **settings: Any
) -> nn.Module:
    """Load an adapter that `save_pretrained` wrote, with its frozen counterpart and LoRA-Dash's coordinates if any.

    (Stock `PeftModel.from_pretrained` loads the adapter alone, which is then away from zero on an untouched base, and
    without its coordinates, of which it warns as an unexpected `lora_dash`.) A run of LoRA-Dash goes on by
    `LoRADash(...).attach(model)`.

    Args:
        base: the unmodified base model.
        path: the adapter's folder.
        adapter_name: its name.
        is_trainable: whether its factors are to be trained.
        settings: more arguments of `PeftModel.from_pretrained`.

    Returns:
        The PEFT model.

    Raises:
        ValueError: if the folder is missing, malformed or of another method, or does not fit the model: a factor of
            another shape, or one that only the file or only the model has.
    """
    from peft import (  # noqa: PLC0415  (peft is an optional dependency)
        LoraConfig,
        PeftModel,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    folder = Path(path)
    dash, tensors = read_config(folder).get("lora_dash"), read_tensors(folder)
    try:
        coordinates = None if dash is None else LoRADash(**dash, adapter_name=adapter_name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} has wrong settings of LoRA-Dash: {error}") from error
    with warnings.catch_warnings():
        if dash is not None:
            warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['lora_dash'\]")
        try:
            model: Any = PeftModel.from_pretrained(
                base, str(path), adapter_name=adapter_name, is_trainable=is_trainable, **settings
            )
        except Exception as error:  # noqa: BLE001  (a wrong value surfaces anywhere in PEFT, as any error)
            raise ValueError(f"adapter {str(folder)!r} cannot be loaded onto this model: {error!r}") from error
    _check_complete(model, adapter_name, folder, tensors)
    if coordinates is not None:
        coordinates.attach(model)
        set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"), adapter_name=adapter_name)
    frozen = offset_name(adapter_name)
    # PEFT writes every adapter but "default" into a folder of its own name.
    folder = (Path(path) if adapter_name == "default" else Path(path).parent) / frozen
    if not folder.is_dir():
        return model  # type: ignore[no-any-return]
    _add(model, frozen, LoraConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=frozen)
    for module in model.modules():
        if frozen in getattr(module, "lora_A", {}):
            for part in (module.lora_A[frozen], module.lora_B[frozen]):
                _freeze(part, part.weight.detach())
    return model  # type: ignore[no-any-return]


def _check_complete(model: Any, adapter: str, folder: Path, tensors: Iterable[str]) -> None:
    """PEFT passes over factors that only the file or only the model has, which would be another adapter."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    def factors(names: Iterable[str]) -> set[str]:
        return {name for name in names if ".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name}

    written, wanted = factors(tensors), factors(get_peft_model_state_dict(model, adapter_name=adapter))
    for missing, where, other in (
        (wanted - written, "the model", "the file"),
        (written - wanted, "the file", "the model"),
    ):
        if missing:
            raise ValueError(
                f"adapter {str(folder)!r} does not fit this model: {where} has {min(missing)}, which {other} has not "
                f"({len(missing)} such)"
            )


def subtract(model: nn.Module, adapter: str, names: Iterable[str]) -> None:
    """Take the start off the base weights themselves, as PEFT does.

    Args:
        model: the PEFT model, factors written.
        adapter: the adapter.
        names: its layers that start away from zero.
    """
    with torch.no_grad():
        for name in names:
            module: Any = model.get_submodule(name)
            weight = module.get_base_layer().weight
            delta = module.get_delta_weight(adapter)
            weight.copy_(weight.to(delta.dtype) - delta)


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


@without_autocast()
def export(
    model: nn.Module, path: str | Path, *, rank: str | int = "exact", adapter_name: str = "default"
) -> dict[str, ExportedLayer]:
    """Write an adapter as one stock PEFT adapter for the unmodified base.

    With it go its frozen counterpart (r more rank) and LoRA-Dash's coordinates (k more, with B columns `c_i u_i / s`).

    Args:
        model: the PEFT model.
        path: a folder.
        rank: `"exact"`, or the rank to cut every layer to.
        adapter_name: the adapter.

    Returns:
        By layer, the rank written and the error of cutting.

    Raises:
        ValueError: if `rank` is neither `"exact"` nor a positive number, the adapter is missing, or its coordinates
            cannot be expressed because s is 0.
        TypeError: if the model is no PEFT model.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)
    from safetensors.torch import save_file  # noqa: PLC0415

    from lora_kernels.training.dash import peft_config  # noqa: PLC0415  (imports peft)

    if isinstance(rank, str):
        if rank != "exact":
            raise ValueError(f'rank is {rank!r}, but must be "exact" or a number')
    else:
        check_range("rank", rank, low=1, integer=True)
    layers = peft_layers.find_lora_layers(model, adapter_name)
    frozen = offset_name(adapter_name) if has_offset(model, adapter_name) else None
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {key: value for key, value in state.items() if f".{dash_module.ATTRIBUTE}." not in key}
    config: Any = copy.deepcopy(model.peft_config[adapter_name])  # type: ignore[index, union-attr, operator]
    peft_config.reduce(config)
    found: dict[str, ExportedLayer] = {}
    shapes: dict[str, tuple[int, float]] = {}
    for each in layers.supported:
        name = each.target.name
        module: Any = each.target.module
        a, b, error = _product(module, adapter_name, frozen, rank)
        scaling = peft_layers.plain_number(module.scaling[adapter_name])
        dtype = module.lora_A[adapter_name].weight.dtype
        for key, value in (("lora_A", a), ("lora_B", b)):
            state[f"{name}.{key}.weight"] = value.detach().to("cpu", dtype).contiguous()
        found[name] = ExportedLayer(a.shape[0], error)
        shapes[name.removeprefix("base_model.model.")] = (a.shape[0], scaling * a.shape[0])
    for name, old, _why in layers.unsupported:
        other: Any = model.get_submodule(name)
        shapes[name.removeprefix("base_model.model.")] = (
            old,
            peft_layers.plain_number(other.scaling[adapter_name]) * old,
        )
    config.use_rslora = False  # alpha = s r, whatever s was made of
    config.r = max(size for size, _ in shapes.values())
    config.lora_alpha = next(alpha for size, alpha in shapes.values() if size == config.r)
    config.rank_pattern, config.alpha_pattern = peft_layers.patterns(shapes, config)
    config.init_lora_weights, config.inference_mode = True, True
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if peft_layers.is_wrapped(model) else peft_layers.PREFIX
    tensors = {prefix + key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)
    return found


def _product(
    module: Any, adapter: str, frozen: str | None, rank: str | int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The factors to write for one layer."""
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    if frozen is not None and frozen in module.lora_A and bool(module.lora_B[frozen].weight.any()):
        a = torch.cat((a, module.lora_A[frozen].weight.detach().to(a)))
        b = torch.cat((b, module.lora_B[frozen].weight.detach().to(b)), dim=1)
    dash = dash_module.directions(module, adapter)
    if dash is not None and dash.launched:
        coordinates, left, right = dash.coordinates.detach(), dash.left, dash.right
        scaling = module.scaling[adapter]
        if scaling == 0:
            raise ValueError("an adapter of scaling 0 cannot express its coordinates, which are not scaled")
        a, b = torch.cat((a, right.to(a))), torch.cat((b, (left * (coordinates / scaling)).to(b)), dim=1)
    if isinstance(rank, str) or a.shape[0] <= rank:
        return a, b, 0.0
    return compress(a, b, rank)


def product_norm(factors: LoraFactors, scaling: float) -> float:
    """`|s B A|` (Frobenius), from the Gram matrices of the factors."""
    a, b = factors.A.detach().to(torch.float64), factors.B.detach().to(torch.float64)
    return abs(scaling) * math.sqrt(max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum())))
