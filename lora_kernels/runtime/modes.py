"""Temporary evaluation and observation modes, restored in `finally`; sharded parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

# An attribute of bitsandbytes' 4-bit layers.
_PACKS = "support_avx512bf16_for_cpu"


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a shard of FSDP2 (a DTensor)."""
    plain = type(parameter) in (nn.Parameter, torch.Tensor)  # asked at every call: hasattr is slow to say no
    return not plain and hasattr(parameter, "device_mesh") and hasattr(parameter, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds (for a plain tensor, itself); shares its memory."""
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


@contextlib.contextmanager
def evaluation_mode(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Yield in evaluation mode, undone at the end; `gradients` says whether a backward pass will run."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in training:
            if hasattr(module, _PACKS):
                # In evaluation mode, bitsandbytes repacks 4-bit weights on CPUs for good, into a format without
                # gradients. The flag has no other meaning there.
                module.training = True
                packed: Any = getattr(module.weight, "quant_state", None)
                if gradients and getattr(packed, "packing_format_for_cpu", False):
                    raise ValueError(
                        "bitsandbytes has packed a 4-bit weight for inference (the model ran in evaluation mode on "
                        "this CPU): no gradient flows through it any more; load the model anew and collect before "
                        "evaluating it"
                    )
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def observation_mode(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Yield in evaluation mode without a key-value cache, where gradients flow through activations alone."""
    # No parameter requires a gradient, so that no `.grad` is computed. Flags and random states are restored at the end.
    # FSDP2 reads the flags of its shards at the first gather, so they are not changed. (No weight gradient is computed
    # there either: the backward pass asks for the gradient of the anchor alone.)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters() if not is_sharded(parameter)]
    started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    config = getattr(model, "config", None)
    # (Without a cache, transformers reads positions, which have no values on the meta device.)
    caches = getattr(config, "use_cache", None) and not any(parameter.is_meta for parameter in model.parameters())
    devices = list(range(torch.cuda.device_count())) if started else []
    try:
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices=devices),
            torch.set_grad_enabled(gradients),
            evaluation_mode(model, gradients=gradients),
        ):
            if caches:
                config.use_cache = False  # type: ignore[union-attr]
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
    finally:
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def holding(parameters: Sequence[torch.Tensor], values: Iterable[torch.Tensor]) -> Iterator[None]:
    """Yield while parameters hold other values; their own memory is not touched, and is put back."""
    before = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value
