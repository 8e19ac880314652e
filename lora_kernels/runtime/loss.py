"""The loss of a batch, and the number of items (tokens or samples) it is a mean over: statistics are of their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import check_choice
from lora_kernels.runtime.feed import call_model, without_peft

IGNORED_LABEL = -100  # as in transformers
Loss = Callable[[Any, Any], torch.Tensor]
REDUCTIONS = ("auto", "next_tokens", "tokens", "samples", "sum")
Reduction = str | Callable[[Any], torch.Tensor]


class MissingLossError(ValueError):
    """A model did not return a loss."""


def model_loss(outputs: Any, batch: Any) -> torch.Tensor:
    """The scalar loss in a model's outputs: their `loss`, the first of a tuple, or the outputs themselves."""
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if loss is None and isinstance(outputs, (tuple, list)) and outputs:
        loss = outputs[0]
    if loss is None and isinstance(outputs, torch.Tensor):
        loss = outputs
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        has = "with" if isinstance(batch, Mapping) and "labels" in batch else "without"
        raise MissingLossError(
            f"the model's output ({type(outputs).__name__}, from a batch {has} labels) holds no scalar loss: "
            "put labels into the batch, or pass loss=lambda outputs, batch: ..."
        )
    return loss


def _first_tensor(batch: Any) -> torch.Tensor | None:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    return next((tensor for tensor in tensors if not tensor.is_nested and tensor.dim() > 0), None)


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the leading size of its first tensor; 0 without one."""
    first = _first_tensor(batch)
    return 0 if first is None else first.shape[0]


def loss_items(model: nn.Module, batch: Any, reduction: Reduction) -> torch.Tensor:
    """Number of items per sample that the loss of a batch is a mean over, `(samples,)` float64.

    Args:
        model: `auto` reads its `loss_type` (transformers).
        batch: on the model's device.
        reduction: `next_tokens`: positions whose following label is not -100 (causal models, which shift their
            labels). `tokens`: labels that are not -100. `samples`: one per sample. `sum`: the loss is a sum; counts are
            ones. `auto`: `next_tokens` for transformers models with the loss type ForCausalLM; else `tokens` if
            `batch["labels"]` are integers `(batch, tokens)`; else `samples`. Or a function of the batch that returns
            the counts.

    Raises:
        ValueError: if the reduction is unknown, labels are needed and missing, or a function's counts have another
            shape.
    """
    if not callable(reduction):
        check_choice("reduction", reduction, REDUCTIONS)
    first = _first_tensor(batch)
    if first is None:
        raise ValueError("batch holds no tensor: its loss cannot be told from its samples' losses")
    samples, device = first.shape[0], first.device
    if callable(reduction):
        counts = torch.as_tensor(reduction(batch), device=device, dtype=torch.float64)
        if counts.shape != (samples,):
            raise ValueError(f"reduction(batch) has shape {tuple(counts.shape)}, but must be ({samples},)")
        return counts
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    per_token = isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    if reduction == "auto":
        causal = getattr(without_peft(model), "loss_type", None) == "ForCausalLM"
        reduction = ("next_tokens" if causal else "tokens") if per_token else "samples"
    if reduction in ("next_tokens", "tokens"):
        if not per_token:
            raise ValueError(f"reduction={reduction!r} needs integer batch['labels'] of shape (batch, tokens)")
        assert isinstance(labels, torch.Tensor)  # per_token
        counted = labels[:, 1:] if reduction == "next_tokens" else labels
        return (counted != IGNORED_LABEL).sum(1).to(torch.float64)
    return torch.ones(samples, dtype=torch.float64, device=device)


def summed_loss(
    model: nn.Module, batch: Any, forward: Callable[..., Any] | None, loss: Loss | None, reduction: Reduction
) -> tuple[torch.Tensor, float]:
    """The sum of the losses of a batch's items, and their number; the model is not called where that is 0."""
    items = float(loss_items(model, batch, reduction).sum())
    if items <= 0:
        return torch.zeros(()), 0.0
    value = (loss or model_loss)((forward or call_model)(model, batch), batch)
    return value if reduction == "sum" else value * items, items
