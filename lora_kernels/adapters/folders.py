"""Stock PEFT adapter folders: read without their base model, and the file of an adapter whose parts are joined."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from lora_kernels._checks import check_number, repr_short
from lora_kernels._files import read_json, write_tensors
from lora_kernels.adapters import parts, servers
from lora_kernels.adapters.experts import PRODUCTS, split_experts
from lora_kernels.adapters.names import of_pattern, scaling_of
from lora_kernels.reports import PREFIX

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Under `auto_mapping` of adapter_config.json.
MARK = "lora_kernels"
# Fields in which a joined adapter's config differs from the adapter's own, which the mark holds.
OWN = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = ".lora_embedding_A"
_UNKNOWN = "the files alone do not say of how many experts, or whose, these factors are: give the base model (--base)"
Factors = tuple[torch.Tensor, torch.Tensor]


class SavedLayer(NamedTuple):
    """What is trained of a linear layer or of one expert."""

    name: str
    a: torch.Tensor  # A `(r, n)`; of an expert, A and B may be those of the transposed weight: which, is in the model
    b: torch.Tensor  # B `(m, r)`
    scaling: float
    start: Factors | None  # where it started, if that was not at zero
    parameter: str | None = None  # of many experts, where the layer is one of them

    @property
    def module(self) -> str:
        """The module whose weight or parameter this is."""
        return self.name if self.parameter is None else self.parameter.rpartition(".")[0]


@dataclass(frozen=True)
class AdapterFolder:
    """The content of a folder."""

    path: Path  # the folder
    config: dict[str, Any]  # its adapter_config.json
    layers: tuple[SavedLayer, ...]  # the linear layers, and the experts of parameters
    unsupported: tuple[tuple[str, str], ...]  # other LoRA layers, and why
    notes: tuple[str, ...]  # facts about the whole, such as what servers need or refuse


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder; a ValueError if it is missing, of another method, or holds a wrong value."""
    file = folder / CONFIG
    if not file.is_file():
        must = f"a folder with {CONFIG} (PEFT's save_pretrained makes one)"
        raise ValueError(f"adapter is {str(folder)!r}, but must be {must}")
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


def mark_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mark in an adapter_config.json, from which joined parts are separated again; `None` for a plain adapter."""
    # It has the `OWN` values, whether there is a `start`, and the settings of `dash`. A ValueError if it is malformed.
    mapping = config.get("auto_mapping")
    mark = mapping.get(MARK) if isinstance(mapping, dict) else None
    if mark is None:
        return None
    kinds: dict[str, Any] = {"r": int, "rank_pattern": dict, "alpha_pattern": dict, "start": bool, "dash": dict | None}
    if not isinstance(mark, dict) or not set(OWN) <= set(mark):
        raise ValueError(f"auto_mapping.{MARK} is {repr_short(mark)}, but must have {', '.join(OWN)}")
    for name, kind in kinds.items():
        if not isinstance(mark.get(name), kind):
            raise ValueError(f"auto_mapping.{MARK} has {name} {repr_short(mark.get(name))}, which is of a wrong type")
    return mark


def join_file(path: Path, scalings: Mapping[str, tuple[float, int]]) -> None:
    """Join the parts in a weights file to the factors, given the saved scaling and the number of experts by layer."""
    from safetensors.torch import load_file  # noqa: PLC0415  (slow to import)

    state: dict[str, torch.Tensor] = load_file(path)
    layers = [name for name in scalings if f"{name}.{parts.START}.a" in state or f"{name}.{parts.DASH}.right" in state]
    if not layers:
        return
    for name in layers:
        parts.join(state, lambda container, leaf, name=name: f"{name}.{container}.{leaf}", *scalings[name])  # type: ignore[misc]
    write_tensors(path, state, {"format": "pt"})


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
        pickle = folder / "adapter_model.bin"
        why = f"; {pickle.name} is a pickle, which is not read: save the adapter as safetensors"
        why = why if pickle.exists() else ""
        raise ValueError(f"adapter is {str(folder)!r}, but must be a folder with {WEIGHTS}{why}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return tensors


def _factors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Factors]:
    """A and B by layer name, in the order of the file."""
    factors = {}
    for key, a in tensors.items():
        if not key.endswith(_A):
            if key.endswith(_B) and key.removesuffix(_B) + _A not in tensors:
                raise ValueError(f"{folder / WEIGHTS} has {key}, but no lora_A beside it")
            continue
        name = key.removesuffix(_A)
        b, where = tensors.get(name + _B), f"layer {name} of {folder / WEIGHTS}"
        if b is None:
            raise ValueError(f"{folder / WEIGHTS} has {key}, but no lora_B beside it")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise ValueError(f"{where} has dtypes {a.dtype} and {b.dtype}, but must be floats")
        if a.dim() == 2 and (b.dim() != 2 or a.shape[0] != b.shape[1]):
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"{where} has factors of shapes {shapes}, but must have A (r, n) and B (m, r)")
        factors[name] = (a, b)
    return factors


@dataclass(frozen=True)
class _Reader:
    """The config of a folder, and what it says of factors."""

    folder: Path
    config: dict[str, Any]
    mark: dict[str, Any] | None  # by which joined parts are separated

    def _settings(self, name: str) -> tuple[int, float]:
        """Rank and scaling that the config gives a layer."""
        config, short = self.config, name.removeprefix(PREFIX)
        try:
            rank = of_pattern(config.get("rank_pattern"), short, config["r"])
            alpha = of_pattern(config.get("alpha_pattern"), short, config["lora_alpha"])
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{self.folder / CONFIG} has a pattern that is no regular expression: {error}") from error
        positive = _is_number(rank) and rank > 0
        return rank, scaling_of(float(alpha), rank, bool(config.get("use_rslora"))) if positive else 0.0

    def _trained(
        self, name: str, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Factors | None]:
        """What is trained of factors, which may be joined ones, and where it started."""
        if self.mark is None:
            return a, b, None
        rank = of_pattern(self.mark["rank_pattern"], name.removeprefix(PREFIX), self.mark["r"])
        started = self.mark["start"] and len(a) >= 2 * rank
        start = (a[rank : 2 * rank], parts.Start.sign * b[:, rank : 2 * rank]) if started else None
        return a[:rank], b[:, :rank], start

    def linear(self, name: str, a: torch.Tensor, b: torch.Tensor) -> SavedLayer:
        """A linear layer, of factors that have the config's rank."""
        rank, scaling = self._settings(name)
        if rank != len(a):
            raise ValueError(f"layer {name} of {self.folder / WEIGHTS} has rank {len(a)}, but {CONFIG} says {rank}")
        a, b, start = self._trained(name, a, b)
        return SavedLayer(name, a, b, scaling, start)

    def parameters(self, module: str, pairs: Sequence[Factors]) -> list[str]:
        """The parameters of a module that `target_parameters` name, in the order in which transformers has them."""
        # Names without a path, to which PEFT converts `all-linear`, are those of any module that is not a plain layer.
        plain = len(pairs) == 1 and len(pairs[0][0]) == self._settings(module)[0]
        targets = [str(target).rpartition(".") for target in self.config.get("target_parameters") or ()]
        own = {name for path, _, name in targets if path and f".{module}".endswith(f".{path}")}
        names = own or {name for path, _, name in targets if not path and not plain}
        return sorted(names, key=lambda name: (PRODUCTS.index(name) if name in PRODUCTS else len(PRODUCTS), name))

    def experts(self, module: str, parameters: Sequence[str], pairs: Sequence[Factors]) -> list[SavedLayer]:
        """The experts of a module's parameters, given their factors; none where files do not say how many there are."""
        # A has as many rows as experts have ranks together, and the config says how many one of them has.
        if len(parameters) != len(pairs) or (len(pairs) > 1 and not set(parameters) <= set(PRODUCTS)):
            return []  # which factors are whose is unknown
        # gate_up_proj is the largest; others are nested in the order that they have in their module.
        pairs = sorted(pairs, key=lambda pair: pair[0].shape[1] + pair[1].shape[0], reverse=True)
        layers, counts = [], set()
        for parameter, (first, second) in zip(parameters, pairs, strict=True):
            name = f"{module}.{parameter}"
            rank, scaling = self._settings(name)
            if not isinstance(rank, int) or rank < 1 or len(first) % rank:
                return []
            count = len(first) // rank
            counts.add(count)
            split = split_experts(first.unsqueeze(0), second.unsqueeze(0), count)
            for expert, factors in enumerate(zip(*split, strict=True)):
                a, b, start = self._trained(name, *factors)
                if count == 1 and parameter not in PRODUCTS:  # a router's matrix, say
                    layers.append(SavedLayer(module, a, b, scaling, start))
                else:
                    layers.append(SavedLayer(f"{name}.{expert}", a, b, scaling, start, name))
        return layers if len(counts) == 1 else []


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_adapter(path: str | Path) -> AdapterFolder:
    """Read the LoRA factors of a stock PEFT adapter folder; its base model is not needed.

    Raises:
        ValueError: if the folder is missing, malformed, of another method, or holds no linear LoRA layer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"adapter is {str(folder)!r}, but must be a folder")
    config, tensors = read_config(folder), read_tensors(folder)
    factors, reader = _factors(folder, tensors), _Reader(folder, config, mark_of(config))
    modules: dict[str, list[str]] = {}  # those of a module with several adapted parameters are nested
    for name in sorted(factors, key=_natural):
        modules.setdefault(name.replace(".base_layer", ""), []).append(name)
    layers: list[SavedLayer] = []
    unsupported: list[tuple[str, str]] = []
    for module, names in modules.items():
        pairs = [factors[name] for name in sorted(names, key=len, reverse=True)]  # the innermost first
        parameters = reader.parameters(module, pairs)
        if any(a.dim() != 2 for a, _ in pairs):
            why = f"factors of {pairs[0][0].dim()} dimensions (a convolution): not a linear layer"
            unsupported.append((module, why))
        elif parameters:
            experts = reader.experts(module, parameters, pairs)
            if not experts:
                unsupported.append((module, f"target_parameters ({', '.join(parameters)}): {_UNKNOWN}"))
            layers += experts
        else:
            layers += [reader.linear(name, *factors[name]) for name in names]
    embeddings = (key.partition(_EMBEDDING)[0] for key in tensors if _EMBEDDING in key)
    unsupported += [(name, "an embedding: its input are indices") for name in embeddings]
    if not layers:
        others = "".join(f"; {name}: {why}" for name, why in unsupported[:3])
        raise ValueError(f"{folder / WEIGHTS} holds no linear LoRA layer (keys that end in {_A} and {_B}){others}")
    notes = ["DoRA: the update is more than s B A, whose spectrum is shown"] if config.get("use_dora") else []
    notes += servers.notes(config, {key: tuple(value.shape) for key, value in tensors.items()})
    return AdapterFolder(folder, config, tuple(layers), tuple(unsupported), tuple(notes))
