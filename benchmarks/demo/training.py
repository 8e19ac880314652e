"""One training run: initialisation, training loop, evaluation."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import lora_kernels as lk
from benchmarks.demo.data import Example, TextTask
from benchmarks.demo.model import MODEL_PACKAGE, Batch, Batches, Recipe, build_model, load_tokenizer
from lora_kernels.init import InitMethod

EVALUATION_SHARES = (0.1, 0.25, 0.5, 1.0)
WARMUP_SHARE = 0.1
GRADIENT_CLIP = 1.0
INIT_BATCHES = 16


class DivergedError(ValueError):
    """A run whose loss is no longer a finite number."""


@dataclass(frozen=True)
class Run:
    """One run. All runs of a seed share the head's start, the order of the batches and the dropout masks.

    Attributes:
        arm: the name under which results are collected.
        seed: of the head, the random factors, the order of the batches and the dropout masks.
        rate: peak learning rate of the adapter: linear warm-up over the first tenth, then linear decay.
        head_rate: peak learning rate of the head; `rate` where None.
        method: of `lora_kernels.initialize`; None for stock random LoRA.
        recipe: how to train.
        rank: of every layer, before any redistribution.
        batch_size: texts per step.
        evaluate_at: steps after which the held-out texts are evaluated; the last one is the length of the run.
        accelerate: whether the LoRA layers run fused.
    """

    arm: str
    seed: int
    rate: float
    head_rate: float | None = None
    method: str | InitMethod | None = None
    recipe: Recipe = Recipe()
    rank: int = 8
    batch_size: int = 16
    evaluate_at: tuple[int, ...] = (10, 25, 50, 100)
    accelerate: bool = False

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.evaluate_at[-1]


class Inputs:
    """What all runs of a task read: the model's folder, its tokenizer, and the encoded texts."""

    def __init__(self, folder: Path, task: TextTask, max_tokens: int = 32) -> None:
        self.folder = folder
        self.task = task
        self.tokenizer = load_tokenizer(folder)
        self.batches = Batches(self.tokenizer, task.labels, max_tokens)

    @cached_property
    def held_out(self) -> list[Batch]:
        """The test part, encoded once."""
        return self.batches.by_length(self.task.test)

    def model(self, run: Run) -> Any:
        """A new model with stock random LoRA."""
        return build_model(self.folder, len(self.task.labels), run.rank, run.seed, self.tokenizer.pad_token_id)

    def loader(self, run: Run) -> DataLoader[Example]:
        """The training batches in the order of the run's seed."""
        return self.batches.shuffled(self.task.train, run.batch_size, run.seed)


@dataclass(frozen=True)
class Evaluation:
    """Held-out results after a step: mean cross-entropy in nats per example, and the share of right answers."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What was measured in one run.

    Attributes:
        arm: of the run.
        seed: of the run.
        learning_rate: of the run.
        init_seconds: wall time of `lora_kernels.initialize`; 0 for random factors.
        train_seconds: wall time of the training steps, without the evaluations.
        trainable_parameters: of adapter and head.
        ranks: LoRA rank by layer.
        train_loss: loss of each batch before its step.
        evaluations: held-out results along the way.
        init_report: the report of `lora_kernels.initialize`; None for random factors.
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


def adapter_ranks(model: Any) -> dict[str, int]:
    """LoRA rank by layer."""
    return {
        name.removeprefix("base_model.model."): int(module.lora_A["default"].weight.shape[0])
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], step: int) -> Evaluation:
    """Mean loss and accuracy in eval mode; the model's mode is restored."""
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


def evaluation_steps(steps: int) -> tuple[int, ...]:
    """The steps after which a run of this length is evaluated, the last one among them."""
    return tuple(sorted({max(1, round(share * steps)) for share in EVALUATION_SHARES}))


def train(
    run: Run, inputs: Inputs, on_step: Callable[[int, float, Evaluation | None], None] = lambda *values: None
) -> tuple[Any, Result]:
    """Initialise and train one adapter.

    Args:
        run: what to train.
        inputs: model and data.
        on_step: called after each step with its number, its batch's loss and, at evaluated steps, the evaluation.

    Returns:
        The trained model and what was measured.

    Raises:
        DivergedError: if a training or held-out loss is not finite.
    """
    model = inputs.model(run)
    report = None
    if run.method is not None:
        loader = inputs.loader(run)
        report = lk.initialize(model, loader, method=run.method, max_batches=INIT_BATCHES, progress=False).to_dict()
    if run.accelerate:
        lk.accelerate(model, strict=True)
    dash = run.recipe.attach_dash(model, run.steps)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = run.recipe.optimizer_for(model, run.rate, run.rate if run.head_rate is None else run.head_rate)
    warmup = max(1, round(WARMUP_SHARE * run.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (run.steps - i) / max(1, run.steps - warmup))
    )
    losses: list[float] = []
    evaluations: list[Evaluation] = []
    train_seconds = 0.0
    torch.manual_seed(run.seed)  # dropout: the same masks in all arms
    batches = _repeat(inputs.loader(run))
    for step in range(1, run.steps + 1):
        start = time.perf_counter()
        loss = model(**next(batches)).loss
        _check_finite("training", loss.item(), step, run)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        if dash is not None:
            dash.step(optimizer)
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        train_seconds += time.perf_counter() - start
        evaluation = None
        if step in run.evaluate_at:
            evaluation = evaluate(model, inputs.held_out, step)
            _check_finite("held-out", evaluation.loss, step, run)
            evaluations.append(evaluation)
        on_step(step, losses[-1], evaluation)
    return model, Result(
        arm=run.arm,
        seed=run.seed,
        learning_rate=run.rate,
        init_seconds=0.0 if report is None else report["seconds"]["total"],
        train_seconds=train_seconds,
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        ranks=adapter_ranks(model),
        train_loss=losses,
        evaluations=evaluations,
        init_report=report,
    )


def _check_finite(kind: str, loss: float, step: int, run: Run) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{kind} loss is {loss} at step {step}, but must be finite; learning_rate is {run.rate}")


def _repeat(loader: DataLoader[Example]) -> Iterator[Batch]:
    while True:
        yield from loader


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    known = {"python": platform.python_version(), "lora_kernels": lk.__version__}
    for name in ("torch", "transformers", "peft", "safetensors", MODEL_PACKAGE.replace("_", "-")):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known
