"""transformers: a model, its tokenizer and batches of text from a folder and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels.ops._checks import check_choice, check_range

TASKS = ("causal-lm", "sequence-classification", "base")


def load(folder: Path, task: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder, nothing from a hub.

    Args:
        folder: with `config.json`, weights and a tokenizer.
        task: which head, one of `TASKS`; the adapter's layer names depend on it.

    Returns:
        Model (evaluation mode) and tokenizer; a tokenizer without a padding token pads with its end token.

    Raises:
        ValueError: if the task is unknown, or transformers cannot load the folder.
    """
    check_choice("task", task, TASKS)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model was {str(folder)!r}, must be a folder with a transformers config.json")
    import transformers  # noqa: PLC0415  (an optional dependency)

    kinds = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "base": transformers.AutoModel,
    }
    try:
        model = kinds[task].from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {str(folder)!r} cannot be loaded as {task}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def text_batches(
    tokenizer: Any, texts: Sequence[str], batch_size: int, max_length: int
) -> list[dict[str, torch.Tensor]]:
    """Tokenise texts into padded batches, in their order.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        texts: what to tokenise.
        batch_size: texts per batch.
        max_length: tokens at which a text is cut.

    Returns:
        Batches with `input_ids` and `attention_mask`, `(batch, tokens)` int64.
    """
    check_range("batch_size", batch_size, low=1, integer=True)
    check_range("max_length", max_length, low=1, integer=True)
    batches = []
    for low in range(0, len(texts), batch_size):
        part = list(texts[low : low + batch_size])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    return batches
