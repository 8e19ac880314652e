"""One fine-tuning run of the demo: model, batches, initialisation, training loop, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from benchmarks.demo.batches import Batch, Batches
from benchmarks.demo.config import MAX_BATCHES, DemoConfig
from benchmarks.demo.data import Example, TextTask
from benchmarks.demo.recipe import PLAIN, Recipe

if TYPE_CHECKING:
    from lora_kernels.init import InitMethod

EVALUATION_SHARES = (0.1, 0.25, 0.5, 1.0)
WARMUP_SHARE = 0.1
GRADIENT_CLIP = 1.0


class DivergedError(ValueError):
    """A run whose loss is no longer a finite number."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out results at one step.

    Attributes:
        step: Optimizer steps done so far.
        loss: Mean cross-entropy in nats per example.
        accuracy: Share of right answers, from 0 to 1.
    """

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class RunRecord:
    """Everything measured in one run.

    Attributes:
        arm: Name of the initialisation.
        seed: Seed of the head, the random factors, the order of the batches and the dropout masks.
        learning_rate: Peak rate of the adapter, and of the head where it was given none of its own.
        init_seconds: Wall time of the data-aware initialisation; 0 for random factors.
        train_seconds: Wall time of the training steps, without the evaluations.
        trainable_parameters: Adapter and head.
        ranks: LoRA rank of each layer.
        train_loss: Loss of each step's batch before the step.
        evaluations: Held-out results along the way.
        init_report: The report of `lora_kernels.initialize` as plain values; None for random factors.
    """

    arm: str
    seed: int
    learning_rate: float
    init_seconds: float
    train_seconds: float
    trainable_parameters: int
    ranks: dict[str, int]
    train_loss: list[float]
    evaluations: list[Evaluation]
    init_report: dict[str, Any] | None


def build_model(folder: Path, classes: int, rank: int, seed: int, pad_token_id: int) -> Any:
    """Loads the base model with a new head and wraps it with stock random LoRA on every linear layer but the head.

    The head is drawn first, so that it starts from the same values in every arm of one seed. `lora_alpha` equals the
    rank: the scaling is 1.

    Args:
        folder: Model folder.
        classes: Number of classes.
        rank: LoRA rank.
        seed: Seed of head and factors.
        pad_token_id: The tokenizer's padding token.

    Returns:
        A `PeftModel` in training mode.

    Raises:
        ValueError: transformers cannot load the folder as a sequence classifier.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    try:
        base: Any = AutoModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model was {str(folder)!r}, must hold a text model: {error}") from error
    if base.config.pad_token_id is None:
        base.config.pad_token_id = pad_token_id
    base = base.float()
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    return get_peft_model(base, config).train()


def adapter_ranks(model: Any) -> dict[str, int]:
    """Reads the LoRA rank of each adapted layer.

    Args:
        model: A `PeftModel` with one adapter named "default".

    Returns:
        Layer name (without PEFT's own prefix) to rank.
    """
    return {
        name.removeprefix("base_model.model."): int(module.lora_A["default"].weight.shape[0])
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], step: int) -> Evaluation:
    """Evaluates in eval mode and returns to the mode the model was in.

    Args:
        model: A sequence classifier.
        batches: Encoded examples, at least one.
        step: Number to put into the result.

    Returns:
        Mean loss per example and accuracy.
    """
    was_training = model.training
    model.eval()
    loss = right = count = 0.0
    try:
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss += float(torch.nn.functional.cross_entropy(logits.double(), batch["labels"], reduction="sum"))
            right += float((logits.argmax(dim=-1) == batch["labels"]).sum())
            count += len(batch["labels"])
    finally:
        model.train(was_training)
    return Evaluation(step, loss / count, right / count)


def evaluation_steps(steps: int) -> list[int]:
    """Chooses the steps after which a run is evaluated.

    Args:
        steps: Length of the run.

    Returns:
        Increasing step numbers, the last one `steps`.
    """
    return sorted({max(1, round(share * steps)) for share in EVALUATION_SHARES})


def train_run(
    folder: Path,
    tokenizer: Any,
    task: TextTask,
    config: DemoConfig,
    arm: str,
    seed: int,
    learning_rate: float,
    on_step: Callable[[int, float, Evaluation | None], None] = lambda step, loss, evaluation: None,
    *,
    method: str | InitMethod | None = None,
    head_rate: float | None = None,
    evaluate_at: Sequence[int] | None = None,
    held_out: Sequence[Batch] | None = None,
    recipe: Recipe = PLAIN,
) -> tuple[Any, RunRecord]:
    """Initialises and trains one adapter.

    All arms of one seed share the head's start, the order of the batches and the dropout masks; they differ in the
    LoRA factors, the ranks and the learning rate.

    Args:
        folder: Model folder.
        tokenizer: Its tokenizer.
        task: Data.
        config: Rank, steps, batch size and text length.
        arm: Name of the initialisation.
        seed: Seed of the run.
        learning_rate: Peak rate: linear warm-up over the first tenth of the steps, then linear decay.
        on_step: Called after each step with its number, its batch's loss and, at evaluated steps, the result.
        method: "random", a method of `lora_kernels.initialize` or its config; what `arm` names by default.
        head_rate: Peak rate of the head; `learning_rate` by default.
        evaluate_at: Steps after which the model is evaluated; `evaluation_steps` by default.
        held_out: The task's test part, encoded already; encoded here by default.
        recipe: How to train.

    Returns:
        The trained model and what was measured.

    Raises:
        DivergedError: A training or held-out loss is not finite.
    """
    batches = Batches(tokenizer, task.labels, config.max_tokens)
    model = build_model(folder, len(task.labels), config.rank, seed, tokenizer.pad_token_id)
    method = arm if method is None else method
    loader = batches.shuffled(task.train, config.batch_size, seed)
    report = None if method == "random" else _initialize(model, loader, method)
    if config.accelerate:
        _accelerate(model)
    dash = recipe.attach(model, config.steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = recipe.make(model, learning_rate, learning_rate if head_rate is None else head_rate)
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (config.steps - i) / max(1, config.steps - warmup))
    )
    held_out = batches.by_length(task.test) if held_out is None else held_out
    due = evaluation_steps(config.steps) if evaluate_at is None else evaluate_at
    losses: list[float] = []
    evaluations: list[Evaluation] = []
    train_seconds = 0.0
    torch.manual_seed(seed)  # dropout: the same masks in all arms
    epochs = _repeat(batches.shuffled(task.train, config.batch_size, seed))
    for step in range(1, config.steps + 1):
        start = time.perf_counter()
        loss = model(**next(epochs)).loss
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the training loss was {loss.item()} at step {step}, must be finite: learning_rate was {learning_rate}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        if dash is not None:
            dash.step(optimizer)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        train_seconds += time.perf_counter() - start
        result = evaluate(model, held_out, step) if step in due else None
        if result is not None and not math.isfinite(result.loss):
            raise DivergedError(
                f"the held-out loss was {result.loss} at step {step}, must be finite: learning_rate was {learning_rate}"
            )
        evaluations += [result] if result is not None else []
        on_step(step, losses[-1], result)
    record = RunRecord(
        arm=arm,
        seed=seed,
        learning_rate=learning_rate,
        init_seconds=0.0 if report is None else report["seconds"]["total"],
        train_seconds=train_seconds,
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        ranks=adapter_ranks(model),
        train_loss=losses,
        evaluations=evaluations,
        init_report=report,
    )
    return model, record


def _initialize(model: Any, loader: DataLoader[Example], method: str | InitMethod) -> dict[str, Any]:
    # Imported here: reading data and reports needs none of the kernels.
    import lora_kernels

    return lora_kernels.initialize(model, loader, method=method, max_batches=MAX_BATCHES, progress=False).to_dict()


def _accelerate(model: Any) -> None:
    import lora_kernels

    lora_kernels.accelerate(model, strict=True)


def _repeat(loader: DataLoader[Example]) -> Iterator[Batch]:
    while True:
        yield from loader
