"""Statistics on disk: one safetensors file, whose header has a JSON document with a fingerprint and a digest of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_kernels._files import parse_json, write_tensors
from lora_kernels.statistics.sums import Accumulator, pack_lower, unpack_lower_

_FORMAT = 2
_KEY = "lora_kernels_statistics"


@dataclass(kw_only=True)
class Counts:
    """What a collection has read; `Statistics` describes the fields."""

    batches: int = 0
    samples: int = 0
    tokens: float = 0.0
    loss_items: float = 0.0
    seconds: float = 0.0
    skipped_rows: dict[str, int] = field(default_factory=dict)
    skipped_modules: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """The counts, by name."""
        return {part.name: getattr(self, part.name) for part in fields(Counts)}


@dataclass(kw_only=True)
class Progress(Counts):
    """How far a run has come."""

    number: int = 0  # the current pass
    done: int = 0  # batches read in it
    digest: str = ""  # of these batches
    complete: bool = False  # whether nothing is left to do
    notes: dict[str, list[str]] = field(default_factory=dict)  # by layer
    plan: str = ""  # digest of the plan
    current: int = 0  # how many of the stored sums belong to the current, unfinished pass
    # Layers that read a tensor with others in some calls only, and have sums of their own.
    apart: list[str] = field(default_factory=list)
    # Layers that came to do so in a later batch: their inputs are not known.
    left_out: list[str] = field(default_factory=list)


@dataclass
class LayerSums:
    """Sums and the layers they belong to: several where they read the same tensor."""

    layers: list[str]
    sums: Accumulator


def _digest(tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=32)
    for name in sorted(tensors):
        digest.update(name.encode())
        if tensors[name].numel():
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, parts: Iterable[LayerSums], progress: Progress, identity: Mapping[str, Any]) -> None:
    """Write sums, progress and fingerprint; at any moment the file is either the old one or the new one, whole."""
    tensors, specs = {}, []
    for index, part in enumerate(parts):
        sums = part.sums
        for name, value in sums.tensors().items():
            tensors[f"{index}.{name}"] = (pack_lower(value) if name in sums.triangular else value).contiguous().cpu()
        specs.append({"kind": sums.kind, "layers": part.layers, "dtype": str(sums.dtype), "settings": sums.settings()})
    document = {"format": _FORMAT, "fingerprint": dict(identity), "progress": asdict(progress), "sums": specs}
    document = json.loads(json.dumps(document))
    metadata = {_KEY: json.dumps({**document, "digest": _digest(tensors, document)})}
    write_tensors(path, tensors, metadata)


def read(path: Path, device: torch.device) -> tuple[list[LayerSums], Progress, dict[str, Any]]:
    """The sums, progress and fingerprint that `write` wrote; a ValueError if the file is not such a one any more."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        why = "truncated, or not a safetensors file"
        raise ValueError(f"{path} cannot be read as statistics ({why}): {error}") from None
    try:
        document = dict(parse_json(metadata[_KEY], path))
        digest = document.pop("digest")
        version = document["format"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is a safetensors file, but holds no statistics of lora_kernels") from None
    if version != _FORMAT:
        raise ValueError(f"{path} has format {version}, but this version reads format {_FORMAT}")
    if digest != _digest(tensors, document):
        raise ValueError(f"{path} was changed after it was written: its digest does not match")
    try:
        return _rebuilt(tensors, document, device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold what its header says: {error!r}") from error


def _rebuilt(
    tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any], device: torch.device
) -> tuple[list[LayerSums], Progress, dict[str, Any]]:
    for _name, _inputs, _outputs in document["fingerprint"]["targets"]:
        pass  # triples, or an error
    parts = []
    for index, spec in enumerate(document["sums"]):
        if not isinstance(spec["layers"], list) or not spec["layers"]:
            raise ValueError(f"sums {index} are of no layer")
        dtype = getattr(torch, spec["dtype"].removeprefix("torch."))
        sums = Accumulator.kinds[spec["kind"]].empty(spec["settings"], device, dtype)
        for name, value in sums.tensors().items():
            stored = tensors[f"{index}.{name}"]
            if name in sums.triangular:
                unpack_lower_(value, stored.to(device))
            else:
                value.copy_(stored)
        parts.append(LayerSums(spec["layers"], sums))
    return parts, Progress(**document["progress"]), document["fingerprint"]
