"""transformers: a model, its tokenizer and batches of text from a folder and a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_kernels._checks import check_choice, check_range
from lora_kernels._files import read_json
from lora_kernels.adapters.experts import PRODUCTS, TRAITS
from lora_kernels.adapters.layers import find_lora_layers, left_out_by_peft
from lora_kernels.adapters.view import lora_layers
from lora_kernels.api.plain import linear_features
from lora_kernels.reports import counted
from lora_kernels.runtime.loss import IGNORED_LABEL

# Heads, and transformers' classes for them.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "base": "AutoModel",
}
# As PEFT calls them: their heads get no adapter.
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


def load(folder: Path, task: str, labels: Sequence[str] | None = None) -> tuple[Any, Any]:
    """`load_model`, and the folder's tokenizer; one without a padding token pads with its end token."""
    model = load_model(folder, task, labels)
    import transformers  # noqa: PLC0415  (an optional dependency)

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  (see `load_model`)
        raise ValueError(f"model {str(folder)!r} has no tokenizer that can be loaded: {error!r}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # classifiers on causal models ask for it
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def task_for(
    model: Path, asked: str | None = None, labels: Sequence[str] | None = None, task_type: str | None = None
) -> str:
    """The head to load a model with: as asked, by the adapter's `task_type`, a classifier with labels, or by config."""
    if asked is not None:
        check_choice("task", asked, tuple(TASKS))
        return asked
    known = next((task for task, name in TASK_TYPES.items() if name == task_type), None)
    return known or (task_of(model) if labels is None else "sequence-classification")


def task_of(model: Path) -> str:
    """The head of the weights of a folder or config file; `base` without, `causal-lm` if no architecture is named."""
    try:
        settings = read_json(model if model.suffix == ".json" else model / "config.json")
    except ValueError:
        return "base"
    named = settings.get("architectures") if isinstance(settings, dict) else None
    architectures = named if isinstance(named, list) and named else ["ForCausalLM"]
    heads = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm"}
    heads["ForSequenceClassification"] = "sequence-classification"
    return next((task for end, task in heads.items() if str(architectures[0]).endswith(end)), "base")


def load_model(folder: Path, task: str, labels: Sequence[str] | None = None) -> Any:
    """Load a model from a folder, nothing from a hub, in evaluation mode; a ValueError if that fails."""
    # A classifier whose folder holds no head of its own gets a new one (of seed 0) with a class for each of the
    # `labels`, in alphabetical order.
    check_choice("task", task, tuple(TASKS))
    if not (folder / "config.json").is_file():
        raise ValueError(f"model is {str(folder)!r}, but must be a folder with a transformers config.json")
    import transformers  # noqa: PLC0415  (an optional dependency)

    head: dict[str, Any] = {}
    if labels is not None and task == "sequence-classification" and task_of(folder) != task:
        names = sorted(set(labels))
        head = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, TASKS[task]).from_pretrained(folder, local_files_only=True, **head)
    except Exception as error:  # noqa: BLE001  (a wrong value surfaces anywhere in transformers, as any error)
        raise ValueError(f"model {str(folder)!r} cannot be loaded as {task}: {error!r}") from error
    return model.eval()


def empty_model(config_file: Path, task: str) -> Any:
    """A model on the meta device, from a config file alone: shapes without memory.

    Raises:
        ValueError: if the task is unknown, or the file is no config that transformers can build a model of.
    """
    check_choice("task", task, tuple(TASKS))
    settings = read_json(config_file)
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise ValueError(f"config {str(config_file)!r} holds no object with a model_type, as transformers writes it")
    import transformers  # noqa: PLC0415  (an optional dependency)

    try:
        config = transformers.AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = getattr(transformers, TASKS[task]).from_config(config)
            return model.to(torch.bfloat16).eval()
    except Exception as error:  # noqa: BLE001  (a wrong value surfaces anywhere in transformers, as any error)
        raise ValueError(f"config {str(config_file)!r} cannot be made into a {task} model: {error!r}") from error


def example_batch(model: Any) -> dict[str, torch.Tensor] | None:
    """A minimal batch for a transformers model, on its device; `None` if the kind of its main input is not known."""
    device, dtype = next((parameter.device, parameter.dtype) for parameter in model.parameters())
    ids = torch.ones(1, 8, dtype=torch.long, device=device)
    if model.main_input_name == "input_ids":
        both = {"input_ids": ids, "decoder_input_ids": ids}
        return both if getattr(model.config, "is_encoder_decoder", False) else {"input_ids": ids}
    size = getattr(model.config, "image_size", None)
    if model.main_input_name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, dtype=dtype, device=device)}
    return None


def linear_targets(model: Any) -> list[str]:
    """The names of the layers that PEFT's `target_modules="all-linear"` means: all linear ones but the output layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = ((name, module) for name, module in model.named_modules() if module is not head)
    return [name for name, module in modules if linear_features(module) is not None]


def expert_parameters(model: Any) -> list[str]:
    """The names of the parameters that hold many experts, for PEFT's `target_parameters`."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        for parameter in PRODUCTS
        if all(hasattr(module, trait) for trait in TRAITS)
        and isinstance(value := getattr(module, parameter, None), torch.Tensor)
        and value.dim() == 3
    ]


def of_experts(model: Any, rank: int) -> list[str]:
    """What there is to know of the experts of a PEFT model before training: rows, sizes, and what is left out."""
    views = [view for view in lora_layers(model) if view.parameter_name is not None]
    sizes = [sum(value.numel() for value in view.factors("default")) for view in views]
    trained, inside = sum(value.numel() for value in model.parameters() if value.requires_grad), sum(sizes)
    counts, chosen = {view.module.num_experts for view in views}, getattr(model.config, "num_experts_per_tok", None)
    experts = " or ".join(map(str, sorted(counts)))
    lines = [f"experts: {len(views)} parameters of {experts}; every expert has sums of its own, of its rows alone"]
    if isinstance(chosen, int) and 0 < chosen < min(counts):
        lines[0] += f" ({chosen} experts per token: about 1/{min(counts) / chosen:.3g} of the tokens)"
    lines.append(f"rank {rank} of every layer and expert: {_millions(trained)} trained, {_millions(inside)} in experts")
    if isinstance(chosen, int) and 1 < chosen <= rank:
        less = rank // chosen
        lines[-1] += f" (rank {less}, which is r / k, in experts: {_millions(inside * less / rank)})"
    left_out = find_lora_layers(model, without_experts=None).unsupported
    lines += [f"left out: {line}" for line in counted((name, why) for name, _, why in left_out)]
    dropped = left_out_by_peft(model, "default")
    return lines if dropped is None else [*lines, f"left out: {dropped}"]


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def task_batches(
    model: Any,
    tokenizer: Any,
    task: str,
    texts: Sequence[str],
    labels: Sequence[str] | None,
    batch_size: int,
    max_length: int,
) -> list[dict[str, torch.Tensor]]:
    """Texts in padded batches, `(batch, tokens)` int64, in their order, with the labels that a model's head takes."""
    # Labels of a classifier are the names or the numbers in its config; without any, those of a causal model are its
    # tokens (it shifts them), with -100 for padding.
    check_range("batch_size", batch_size, low=1, integer=True)
    check_range("max_length", max_length, low=1, integer=True)
    known = {str(name): int(index) for name, index in model.config.label2id.items()}
    known |= {str(index): index for index in range(model.config.num_labels)}
    for label in labels or ():
        if label not in known:
            raise ValueError(f"label {label!r} is none of the model's: {', '.join(list(known)[:8])}, ...")
    batches = []
    for low in range(0, len(texts), batch_size):
        part = list(texts[low : low + batch_size])
        encoded = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batch = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        if labels is not None:
            batch["labels"] = torch.tensor([known[label] for label in labels[low : low + batch_size]])
        elif task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
        batches.append(batch)
    return batches
