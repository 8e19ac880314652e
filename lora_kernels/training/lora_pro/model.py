"""Pairs of a PEFT model, and the optimizer for all that it trains."""

from __future__ import annotations

import functools
import operator
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from lora_kernels._checks import check_type
from lora_kernels.adapters.view import lora_layers
from lora_kernels.training.guard import Movement, trained_names
from lora_kernels.training.lora_pro.optimizer import LoraPro, LoraProOptions, Scaling

_Pair = tuple[torch.Tensor, torch.Tensor, Scaling, int]


def _factors(layer: Any) -> Iterator[tuple[str, Any, Any]]:
    # Name, A and B of every adapter of a layer.
    for adapter in getattr(layer, "lora_A", {}):
        yield adapter, getattr(layer.lora_A[adapter], "weight", None), getattr(layer.lora_B[adapter], "weight", None)
    for adapter in getattr(layer, "lora_embedding_A", {}):
        yield adapter, layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


def find_pairs(model: nn.Module) -> list[_Pair]:
    """A, B, scaling and number of experts of all LoRA pairs that a PEFT model trains, DoRA's included; at least one."""
    # A warning tells of trained factors that are not a pair, whose product is added to one weight; they get AdamW.
    check_type("model", model, nn.Module, "a torch.nn.Module")
    pairs: list[_Pair] = []
    unpaired: Counter[str] = Counter()
    for _, layer in lora_layers(model):
        for adapter, a, b in _factors(layer):
            if not any(isinstance(factor, torch.Tensor) and factor.requires_grad for factor in (a, b)):
                continue
            if not (a.requires_grad and b.requires_grad):
                unpaired["one factor is frozen"] += 1
            elif a.dim() != 2 or b.dim() != 2:
                kind = type(layer).__name__
                unpaired[f"factors of {kind} are not matrices (of a convolution, or flattened by FSDP1)"] += 1
            else:
                scaling: Any = functools.partial(operator.getitem, layer.scaling, adapter)
                pairs.append((a, b, scaling, getattr(layer, "num_experts", 1)))
    if unpaired:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in unpaired.items())
        warnings.warn(f"{unpaired.total()} LoRA layers get plain AdamW: {reasons}", RuntimeWarning, stacklevel=3)
    if not pairs:
        raise ValueError("model trains no LoRA pair: create it with peft.get_peft_model, with the adapter trainable")
    return pairs


def create_lora_pro_optimizer(model: nn.Module, *, lr: float, **options: Unpack[LoraProOptions]) -> LoraPro:
    """LoRA-Pro for all that a PEFT model trains: pairs by LoRA-Pro, the rest (heads, biases, ...) by AdamW.

    Create it after the model is sharded by `fully_shard`; before or after DistributedDataParallel. The scaling of a
    layer is read at every step. Embeddings are pairs as well: in `full` mode their moments have the size of the table.
    Of a parameter of many experts (`target_parameters`) each has a pair of its own.
    If parameters of 16 bits hardly move in the first steps, because rounding swallows what is added to them, a
    RuntimeWarning says so.

    Args:
        model: with PEFT's LoRA layers.
        lr: learning rate.
        options: mode, betas, eps, damping, state_dtype and rounding of `LoraPro`, and its weight_decay, which is that
            of factors and other matrices, not of biases and norms (parameters with one axis).

    Raises:
        TypeError: on a wrong type, or another option.
        ValueError: if the model trains no LoRA pair, or a number is out of range.
    """
    pairs = find_pairs(model)
    paired = {id(factor) for pair in pairs for factor in pair[:2]}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in paired]
    entries = ("scaling", [pair[2] for pair in pairs]), ("experts", [pair[3] for pair in pairs])
    groups: list[dict[str, Any]] = [{"pairs": [pair[:2] for pair in pairs], **dict(entries)}]
    matrices = [parameter for parameter in others if parameter.dim() > 1]
    vectors = [parameter for parameter in others if parameter.dim() <= 1]
    groups += [{"params": matrices}] * bool(matrices) + [{"params": vectors, "weight_decay": 0.0}] * bool(vectors)
    optimizer = LoraPro(groups, lr, **options)
    if names := trained_names(model):
        Movement.watch(names)
    return optimizer


def lora_pro_cls_and_kwargs(model: nn.Module, *, lr: float, **options: Any) -> tuple[type[LoraPro], dict[str, Any]]:
    """For `Trainer(optimizer_cls_and_kwargs=...)` of transformers, which creates the groups itself.

    The pairs are located in the Trainer's groups by identity. Weight decay is that of the Trainer's arguments. The
    learning rate given here is used, not that of the arguments.

    Args:
        model: the PEFT model that the Trainer gets.
        lr: learning rate.
        options: mode, betas, eps, damping, state_dtype or rounding of `LoraPro`.

    Raises:
        TypeError: on another option.
        ValueError: if the model trains no LoRA pair.
    """
    known = [name for name in LoraProOptions.__annotations__ if name != "weight_decay"]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"options must be of {', '.join(known)}, got {', '.join(unknown)}")
    return LoraPro, {"pairs": find_pairs(model), "lr": lr, **options}
