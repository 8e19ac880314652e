"""Stock PEFT adapter folders, read without their base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from lora_kernels._checks import check_number, repr_short
from lora_kernels._files import read_json
from lora_kernels.adapters import servers
from lora_kernels.adapters.files import WEIGHTS, mark_of
from lora_kernels.adapters.names import of_pattern, scaling_of
from lora_kernels.adapters.parts import Start
from lora_kernels.reports import PREFIX

CONFIG = "adapter_config.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Parts of an adapter that are no factors of a linear layer, and what is said of them.
_OTHERS = {".lora_embedding_A": "an embedding: its input are indices", ".lora_magnitude_vector": ""}


class SavedLayer(NamedTuple):
    """What is trained of a linear layer: A `(r, n)`, B `(m, r)`, scaling, and the A and B of a frozen start, if any."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    start: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class AdapterFolder:
    """The content of a folder."""

    path: Path  # the folder
    config: dict[str, Any]  # its adapter_config.json
    layers: tuple[SavedLayer, ...]  # the linear layers
    unsupported: tuple[tuple[str, str], ...]  # other LoRA layers, and why
    notes: tuple[str, ...]  # facts about the whole, such as what servers need or refuse


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder; a ValueError if it is missing, of another method, or holds a wrong value."""
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(
            f"adapter is {str(folder)!r}, but must be a folder with {CONFIG} (PEFT's save_pretrained makes one)"
        )
    config = read_json(file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{file} is of peft_type {kind!r}, but must be 'LORA'")
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = config.get(name)
        if not _is_number(value) or not value >= least:
            raise ValueError(f"{file} has {name} {repr_short(value)}, but must be a number of at least {least}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{file} has {name} {repr_short(config[name])}, but must be a mapping")
    for value in (config.get("alpha_pattern") or {}).values():
        if not _is_number(value):
            raise ValueError(f"{file} has {repr_short(value)} in alpha_pattern, but must have numbers")
    if not isinstance(config.get("target_parameters") or [], list):
        raise ValueError(f"{file} has target_parameters {repr_short(config['target_parameters'])}, but must be a list")
    return config


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that arithmetic can take."""
    try:
        check_number("value", value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, by name; a ValueError if there is no safetensors file that can be read."""
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    file = folder / WEIGHTS
    if not file.is_file():
        other = folder / "adapter_model.bin"
        why = (
            f"; {other.name} is a pickle, which is not read: save the adapter as safetensors" if other.exists() else ""
        )
        raise ValueError(f"adapter is {str(folder)!r}, but must be a folder with {WEIGHTS}{why}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return tensors


def _scaling(config: Mapping[str, Any], name: str, rank: int, file: Path) -> float:
    short = name.removeprefix(PREFIX)
    try:
        expected = of_pattern(config.get("rank_pattern"), short, config["r"])
        alpha = of_pattern(config.get("alpha_pattern"), short, config["lora_alpha"])
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{file / CONFIG} has a pattern that is no regular expression: {error}") from error
    if expected != rank:
        raise ValueError(f"layer {name} of {file / WEIGHTS} has rank {rank}, but {CONFIG} says {expected}")
    return scaling_of(float(alpha), rank, bool(config.get("use_rslora"))) if rank else 0.0


def _trained(
    a: torch.Tensor, b: torch.Tensor, mark: Mapping[str, Any], name: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """What is trained of joined factors, and where it started."""
    rank = of_pattern(mark["rank_pattern"], name.removeprefix(PREFIX), mark["r"])
    start = (a[rank : 2 * rank], Start.sign * b[:, rank : 2 * rank]) if mark["start"] and len(a) >= 2 * rank else None
    return a[:rank], b[:, :rank], start


def _factors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by layer name, in the order of the file."""
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(_A):
            if key.endswith(_B) and key.removesuffix(_B) + _A not in tensors:
                raise ValueError(f"{folder / WEIGHTS} has {key}, but no lora_A beside it")
            continue
        name = key.removesuffix(_A)
        b = tensors.get(name + _B)
        if b is None:
            raise ValueError(f"{folder / WEIGHTS} has {key}, but no lora_B beside it")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise ValueError(
                f"layer {name} of {folder / WEIGHTS} has dtypes {a.dtype} and {b.dtype}, but must be floats"
            )
        if a.dim() == 2 and (b.dim() != 2 or a.shape[0] != b.shape[1]):
            raise ValueError(
                f"layer {name} of {folder / WEIGHTS} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                "but must have A (r, n) and B (m, r)"
            )
        factors[name] = (a, b)
    return factors


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_adapter(path: str | Path) -> AdapterFolder:
    """The LoRA factors of a stock PEFT adapter folder, without its base model; a ValueError if there are none."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"adapter is {str(folder)!r}, but must be a folder")
    config, tensors = read_config(folder), read_tensors(folder)
    factors = _factors(folder, tensors)
    wrapped = {str(name).rpartition(".")[0] for name in config.get("target_parameters") or ()}
    mark = mark_of(config)
    layers, unsupported = [], []
    for name in sorted(factors, key=_natural):
        a, b = factors[name]
        if a.dim() != 2:
            unsupported.append((name, f"factors of {a.dim()} dimensions (a convolution): not a linear layer"))
        elif any(name.removesuffix(".base_layer").endswith(module) for module in wrapped if module):
            unsupported.append((name, "target_parameters: factors of several matrices in one"))
        else:
            scaling, start = _scaling(config, name, a.shape[0], folder), None
            if mark is not None:
                a, b, start = _trained(a, b, mark, name)
            layers.append(SavedLayer(name, a, b, scaling, start))
    for key in tensors:
        for part, why in _OTHERS.items():
            if part in key and why:
                unsupported.append((key.partition(part)[0], why))
    if not layers:
        raise ValueError(f"{folder / WEIGHTS} holds no linear LoRA layer (keys that end in {_A} and {_B})")
    notes = []
    if config.get("use_dora"):
        notes.append("DoRA: the update is more than s B A, whose spectrum is shown")
    notes += servers.notes(config, {key: tuple(value.shape) for key, value in tensors.items()})
    return AdapterFolder(folder, config, tuple(layers), tuple(unsupported), tuple(notes))
