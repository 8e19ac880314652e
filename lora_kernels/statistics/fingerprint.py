"""What statistics are of: model, layers, statistics and options, so that files of something else can be refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.runtime.processes import gather
from lora_kernels.statistics.options import CollectOptions
from lora_kernels.statistics.storage import Progress
from lora_kernels.statistics.store import Target

_SAMPLES = 64  # entries per parameter that identify its values


def fingerprint(
    model: nn.Module, targets: Sequence[Target], wants: Mapping[str, bool], options: CollectOptions
) -> dict[str, Any]:
    """What must be equal for statistics to be of the same thing, JSON-ready."""
    # It has the model's class, a digest of its parameters' names, shapes and a sample of their values, targets,
    # statistics and options.
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type == "meta" or hasattr(parameter, "device_mesh") or parameter.numel() == 0:
            continue  # a shard is not the same on every process
        for part in _parts(parameter.detach()):
            flat = part.reshape(-1)
            step = max(1, flat.numel() // _SAMPLES)
            digest.update(flat[::step][:_SAMPLES].to("cpu", torch.float32).contiguous().numpy().data)
    return {
        "model": type(model).__name__,
        "parameters": digest.hexdigest(),
        "targets": [[target.name, target.in_features, target.out_features] for target in targets],
        "wants": dict(wants),
        "options": options.described(),
    }


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in a tensor: itself, or those inside a wrapper, which need not be sliceable."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        inner = [getattr(tensor, name) for name in flatten()[0]]
        return [part for value in inner if isinstance(value, torch.Tensor) for part in _parts(value)]
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        # A wrapper that does not name its tensors: its numbers.
        try:
            numbers = tensor.dequantize()
        except (RuntimeError, NotImplementedError, TypeError):
            return []  # neither: its name and shape have to do
        return [] if type(numbers) is type(tensor) else _parts(numbers)
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return []
    if tensor.is_quantized:
        return [tensor.int_repr()]
    return [tensor.as_subclass(torch.Tensor)]


def differences(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """In what a fingerprint differs from the expected one, in words; empty if in nothing."""
    named = []
    for key, new in json.loads(json.dumps(dict(expected))).items():
        old = actual.get(key)
        if key == "options" and isinstance(old, Mapping):
            named += [f"{name} (was {old.get(name)!r}, is {new[name]!r})" for name in new if old.get(name) != new[name]]
        elif old != new:
            named.append(key)
    return ", ".join(named)


def check_fingerprint(path: Path, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a file whose fingerprint is not the expected one; the message says in what they differ."""
    different = differences(actual, expected)
    if different:
        raise ValueError(f"{path} holds statistics of something else: it differs in {different}; delete or move it")


def agree_on_start(identity: Mapping[str, Any], progress: Progress) -> list[Progress]:
    """The progress of every process; a ValueError on all of them if their models, options or plans differ."""
    # Values of parameters may differ (shards), and the memory of one machine from that of another.
    mine = {key: identity[key] for key in ("model", "targets", "wants", "options")}
    everyone = gather((mine, identity.get("form") is not None, progress))
    for number, (theirs, checkpointed, other) in enumerate(everyone):
        first, first_checkpointed, first_progress = everyone[0]
        different = differences(theirs, first)
        if checkpointed != first_checkpointed:
            different = "checkpoint"
        elif first_progress.plan and other.plan and first_progress.plan != other.plan:
            different = "the plan of its checkpoint"
        if different:
            raise ValueError(f"process {number} must collect the same as process 0, but differs in {different}")
    return [other for _, _, other in everyone]
