"""The frozen base model of demo and study, and its tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """A frozen causal language model in float32, in evaluation mode, and its tokenizer with a padding token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {str(folder)!r}, but must hold a causal language model: {error}") from error
    if tokenizer.eos_token is None:
        raise ValueError(f"model is {str(folder)!r}, but must have a tokenizer with an end token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval().requires_grad_(False), tokenizer


def quiet_transformers() -> None:
    """Silence progress bars, and warnings that are not about what is measured."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
