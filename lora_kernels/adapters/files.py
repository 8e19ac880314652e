"""The files of a saved adapter whose parts are joined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_kernels._checks import repr_short
from lora_kernels._files import write_tensors
from lora_kernels.adapters import parts

WEIGHTS = "adapter_model.safetensors"
# Under `auto_mapping` of adapter_config.json.
MARK = "lora_kernels"
# Fields in which a joined adapter's config differs from the adapter's own, which the mark holds.
OWN = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def mark_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The mark in an adapter_config.json, from which joined parts are separated again; `None` for a plain adapter."""
    # It has the `OWN` values, whether there is a `start`, and the settings of `dash`. A ValueError if it is malformed.
    mapping = config.get("auto_mapping")
    mark = mapping.get(MARK) if isinstance(mapping, dict) else None
    if mark is None:
        return None
    kinds: dict[str, Any] = {
        "r": int,
        "rank_pattern": dict,
        "alpha_pattern": dict,
        "start": bool,
        "dash": (dict, type(None)),
    }
    if not isinstance(mark, dict) or not set(OWN) <= set(mark):
        raise ValueError(f"auto_mapping.{MARK} is {repr_short(mark)}, but must have {', '.join(OWN)}")
    for name, kind in kinds.items():
        if not isinstance(mark.get(name), kind):
            raise ValueError(f"auto_mapping.{MARK} has {name} {repr_short(mark.get(name))}, which is of a wrong type")
    return mark


def join_file(path: Path, scalings: Mapping[str, tuple[float, int]]) -> None:
    """Join the parts in a weights file to the factors, given the saved scaling and the number of experts by layer."""
    from safetensors import safe_open  # noqa: PLC0415  (slow to import)
    from safetensors.torch import load_file  # noqa: PLC0415

    with safe_open(path, "pt") as file:
        there = set(file.keys())  # noqa: SIM118  (a file cannot be iterated over)
    layers = [name for name in scalings if f"{name}.{parts.START}.a" in there or f"{name}.{parts.DASH}.right" in there]
    if not layers:
        return
    state: dict[str, torch.Tensor] = load_file(path)
    for name in layers:
        parts.join(state, lambda container, leaf, name=name: f"{name}.{container}.{leaf}", *scalings[name])  # type: ignore[misc]
    write_tensors(path, state, {"format": "pt"})
