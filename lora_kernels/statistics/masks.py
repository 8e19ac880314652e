"""Which tokens of a batch count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_kernels._checks import check_choice, repr_short
from lora_kernels.runtime.loss import IGNORED_LABEL

MASKS = ("attention", "labels", "next_labels")

_SEQUENCES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")

Mask = str | Callable[[Any], torch.Tensor | None] | None


def check_mask(mask: Mask) -> None:
    """Refuse a `mask` that is no function, `None` or one of `MASKS`."""
    if isinstance(mask, str):
        check_choice("mask", mask, MASKS)
    elif mask is not None and not callable(mask):
        raise TypeError(f"mask must be a name, a function or None, got {type(mask).__name__} {repr_short(mask)}")


def _tensor(batch: Any, key: str) -> torch.Tensor | None:
    value = batch.get(key) if isinstance(batch, Mapping) else None
    return value if isinstance(value, torch.Tensor) else None


def _attention(batch: Any, key: str) -> torch.Tensor | None:
    mask = _tensor(batch, key)
    return mask != 0 if mask is not None and mask.dim() == 2 else None


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
        TypeError: if the mask is something else, or a mask function returns something else than a tensor.
    """
    check_mask(mask)
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
    attention = _attention(batch, "attention_mask")
    if mask == "attention":
        return attention
    labels = _tensor(batch, "labels")
    if labels is None or labels.dim() != 2:
        given = "none" if labels is None else f"shape {tuple(labels.shape)}"
        raise ValueError(f"mask={mask!r} needs batch['labels'] of shape (batch, tokens), got {given}")
    counts = labels != IGNORED_LABEL
    if mask == "next_labels":
        counts = torch.nn.functional.pad(counts[:, 1:], (0, 1), value=False)
    return counts if attention is None else counts & attention


class UnassignedRowsError(ValueError):
    """Rows of a layer that cannot be told apart by sample."""


@dataclass(frozen=True)
class BatchWeights:
    """The weights of a batch's tokens; an encoder-decoder model has two sequences."""

    tokens: torch.Tensor | None = None  # `(batch, tokens)` of the model's input sequence, or `None`
    decoder: torch.Tensor | None = None  # the same for the decoder's sequence; unused by other models
    factors: torch.Tensor | None = None  # `(batch,)`, by which the gradients of a sample are multiplied, or `None`
    lengths: frozenset[int] = frozenset()  # of the sequences of the batch, in tokens

    @classmethod
    def of(cls, batch: Any, mask: Mask, *, encoder_decoder: bool, factors: torch.Tensor | None = None) -> BatchWeights:
        """The weights of a batch; for the mask see `token_weights`."""
        # In an encoder-decoder model the encoder's rows follow the attention mask, and the decoder's
        # `decoder_attention_mask` if there is one, else the labels that are not -100 (its output at a position is
        # trained on that label).
        sequences = (_tensor(batch, key) for key in _SEQUENCES)
        lengths = frozenset(value.shape[1] for value in sequences if value is not None and value.dim() >= 2)
        if not encoder_decoder or not isinstance(mask, str):
            weights = token_weights(batch, mask)
            return cls(weights, weights, factors, lengths)
        labels = _tensor(batch, "labels")
        counted = labels != IGNORED_LABEL if labels is not None and labels.dim() == 2 else None
        decoder = _attention(batch, "decoder_attention_mask") if mask == "attention" else None
        return cls(_attention(batch, "attention_mask"), counted if decoder is None else decoder, factors, lengths)

    def row_factors(self, shape: torch.Size) -> torch.Tensor | None:
        """The factors of rows, in the leading sizes of a layer's rows (`None`: ones), or an UnassignedRowsError."""
        if self.factors is None:
            return None
        samples = self.factors.numel()
        if samples == 1:
            return self.factors.expand(shape)
        if shape and shape[0] == samples:
            return self.factors.reshape(-1, *([1] * (len(shape) - 1))).expand(shape)
        lengths = self.lengths | {mask.shape[1] for mask in (self.tokens, self.decoder) if mask is not None}
        if any(shape[:2] == (length, samples) for length in lengths):
            return self.factors.reshape(1, -1, *([1] * (len(shape) - 2))).expand(shape)
        if len(shape) == 1 and any(shape[0] == samples * length for length in lengths):
            return self.factors.repeat_interleave(shape[0] // samples)
        raise UnassignedRowsError(
            f"its rows {tuple(shape)} cannot be assigned to the {samples} samples of a batch, and its gradients were "
            'left out: use batches of one sample, or weighting="token"'
        )


def align(weights: torch.Tensor | None, rows: torch.Size) -> tuple[torch.Tensor | None, bool]:
    """The token weights `(batch, tokens)` in the leading sizes `rows` of a layer's input, and whether they fit."""
    # They fit as `(batch, tokens)` with further sizes after or between, as `(tokens, batch, ...)`, or flat. Rows that
    # are one per sample (a pooled input) or match no tokens get `None`: all of them count.
    if weights is None:
        return None, True
    if len(rows) == 1 and rows[0] == weights.numel():
        return weights.reshape(-1), True
    placed = _place(weights.shape[0], weights.shape[1], rows)
    if placed is None:
        return None, rows == weights.shape[:1]
    first, second = placed
    if first > second:
        weights, first, second = weights.mT, second, first
    sizes = [1] * len(rows)
    sizes[first], sizes[second] = weights.shape
    return weights.reshape(sizes).expand(rows), True


def _place(batch: int, tokens: int, rows: torch.Size) -> tuple[int, int] | None:
    """Where batch and tokens are among the sizes of rows; `None` if they are not, or it is ambiguous."""
    if len(rows) < 2:
        return None
    if rows[0] == batch:
        places = [place for place in range(1, len(rows)) if rows[place] == tokens]
        if places and (len(places) == 1 or tokens == 1 or places[0] == 1):
            return 0, places[0]
    if rows[:2] == (tokens, batch):
        return 1, 0
    return None
