"""Which tokens of a batch count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_kernels.ops._checks import check_choice

MASKS = ("attention", "labels", "next_labels")
IGNORED_LABEL = -100

Mask = str | Callable[[Any], torch.Tensor | None] | None


def check_mask(mask: Mask) -> None:
    """Check the `mask` argument of a collection.

    Args:
        mask: see `token_weights`.

    Raises:
        ValueError: if it is a name other than `MASKS`.
    """
    if isinstance(mask, str):
        check_choice("mask", mask, MASKS)


def _tensor(batch: Any, key: str) -> torch.Tensor | None:
    value = batch.get(key) if isinstance(batch, Mapping) else None
    return value if isinstance(value, torch.Tensor) else None


def token_weights(batch: Any, mask: Mask) -> torch.Tensor | None:
    """The weight of each token of a batch.

    Args:
        batch: what the loader gave, already on the model's device.
        mask: `attention`: tokens whose `attention_mask` is not zero (all, if the batch has none). `labels`: of these,
            positions whose own label is not -100 (the convention of PEFT's EVA). `next_labels`: positions whose
            following label is not -100, that is those whose output a causal model is trained on. A function of the
            batch that returns a bool or float tensor `(batch, tokens)` or `None`. `None`: every row counts.

    Returns:
        `(batch, tokens)` bool or float weights, or `None` if all tokens count alike.

    Raises:
        ValueError: if labels are asked for and the batch has none per token, or a mask is not two-dimensional.
        TypeError: if a mask function returns something else than a tensor.
    """
    if mask is None:
        return None
    if callable(mask):
        weights = mask(batch)
        if weights is None:
            return None
        if not isinstance(weights, torch.Tensor):
            raise TypeError(f"the mask function returned {type(weights).__name__}, but must return a torch.Tensor")
        if weights.dim() != 2:
            raise ValueError(f"the mask function returned shape {tuple(weights.shape)}, but must be (batch, tokens)")
        return weights if weights.dtype == torch.bool or weights.is_floating_point() else weights != 0
    attention = _tensor(batch, "attention_mask")
    attention = attention != 0 if attention is not None and attention.dim() == 2 else None
    if mask == "attention":
        return attention
    labels = _tensor(batch, "labels")
    if labels is None or labels.dim() != 2:
        found = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"mask={mask!r} needs batch['labels'] of shape (batch, tokens), got {found}")
    counts = labels != IGNORED_LABEL
    if mask == "next_labels":
        counts = torch.nn.functional.pad(counts[:, 1:], (0, 1), value=False)
    return counts if attention is None else counts & attention


def align(weights: torch.Tensor | None, rows: torch.Size) -> tuple[torch.Tensor | None, bool]:
    """Fit the token weights of a batch to the rows of one layer's input.

    Args:
        weights: `(batch, tokens)` or `None`.
        rows: the leading sizes of the layer's input.

    Returns:
        The weights in the shape `rows`, and whether they fit. Rows that are one per sample (a pooled input) or that
        cannot be matched to tokens get `None`: all of them count.
    """
    if weights is None:
        return None, True
    if rows == weights.shape:
        return weights, True
    if len(rows) == 1 and rows[0] == weights.numel():
        return weights.reshape(-1), True
    return None, rows == weights.shape[:1]
