"""One side of a comparison: a LoRA model on shared base weights, its start, its optimizer, and its clock."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import lora_kernels as lk
from benchmarks.demo.texts import Batch, predicted
from benchmarks.lora_layers import shared_copy
from lora_kernels.init import InitMethod, TaskDirections

WARMUP_SHARE = 0.1
GRADIENT_CLIP = 1.0
T = TypeVar("T")


class DivergedError(ValueError):
    """A run whose loss is no longer a finite number."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is started and trained.

    Attributes:
        method: of `lora_kernels.initialize`; None for PEFT's random start.
        accelerate: whether the layers run through `lora_kernels.accelerate`.
        optimizer: `adamw` without weight decay, `lora_pro` (full mode) or `lora_pro_efficient`.
        dash: the share of the steps after which LoRA-Dash selects its directions; None for plain LoRA.
        use_dora: PEFT's option.
        use_rslora: PEFT's option, which scales by alpha / sqrt(r).
    """

    method: str | InitMethod | None = None
    accelerate: bool = False
    optimizer: str = "adamw"
    dash: float | None = None
    use_dora: bool = False
    use_rslora: bool = False


class Evaluation(NamedTuple):
    """Held-out loss in nats per token after some steps, and what the side's clock showed then."""

    step: int
    seconds: float
    loss: float


@dataclass
class Side:
    """A side and what was measured of it.

    Attributes:
        name: of the side.
        model: of PEFT, in training mode.
        optimizer: of its adapter.
        rate: the learning rate after the warm-up.
        warmup: steps until the rate is reached; it stays there, so that losses at equal seconds can be compared.
        start_seconds: what `initialize` and `accelerate` took.
        advice: of `initialize`.
        dash: the run of LoRA-Dash, if there is one.
        step_seconds: of every step.
        train_loss: of every batch before its step.
        evaluations: so far.
    """

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    rate: float
    warmup: int
    start_seconds: float = 0.0
    advice: list[str] = field(default_factory=list)
    dash: Any = None
    step_seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The side's clock: its start and its steps, without evaluations."""
        return self.start_seconds + sum(self.step_seconds)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self, batch: Batch) -> float:
        """One training step; returns the loss before it."""
        loss, seconds = timed(lambda: self._step(batch))
        self.step_seconds.append(seconds)
        self.train_loss.append(self._finite("training", loss))
        return loss

    def _step(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (len(self.train_loss) + 1) / self.warmup)
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.optimizer.step()
        if self.dash is not None:
            self.dash.step(self.optimizer)
        self.optimizer.zero_grad()
        return float(loss.detach())

    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Measure the held-out loss and keep it."""
        loss = self._finite("held-out", mean_loss(self.model, batches))
        self.evaluations.append(Evaluation(len(self.train_loss), self.seconds, loss))
        return self.evaluations[-1]

    def _finite(self, kind: str, loss: float) -> float:
        if not math.isfinite(loss):
            raise DivergedError(
                f"{kind} loss of {self.name} is {loss} after {len(self.train_loss)} steps, but must be finite; its "
                f"learning rate is {self.rate:g}"
            )
        return loss


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and its seconds."""
    _synchronize()
    started = time.perf_counter()
    result = call()
    _synchronize()
    return result, time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean loss per predicted token, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        total = sum(float(model(**batch).loss) * predicted(batch) for batch in batches)
    finally:
        model.train(was_training)
    return total / sum(map(predicted, batches))


def adapted(base: Any, recipe: Recipe, rank: int, dropout: float, seed: int) -> Any:
    """PEFT's model with random LoRA on every linear layer but the head; alpha is the rank, so the scaling is 1."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=recipe.use_dora,
        use_rslora=recipe.use_rslora,
    )
    return get_peft_model(shared_copy(base), config).train()


def prepare(
    name: str,
    recipe: Recipe,
    base: Any,
    rate: float,
    batches: Sequence[Batch],
    *,
    steps: int,
    rank: int = 8,
    dropout: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    cores: Path | None = None,
) -> Side:
    """A side that is ready for its first step.

    Args:
        name: of the side.
        recipe: how it starts and trains.
        base: the frozen model, whose weights all sides share.
        rate: learning rate.
        batches: what a data-aware start reads.
        steps: of the run.
        rank: of every layer before any redistribution.
        dropout: of the adapters' inputs.
        seed: of the random factors.
        progress: whether the start shows a bar.
        cores: folder of the base weights' decompositions, for task directions and LoRA-Dash.

    Returns:
        The side.
    """
    model = adapted(base, recipe, rank, dropout, seed)
    method, cache = recipe.method, None if cores is None else str(cores)
    if isinstance(method, TaskDirections):
        method = replace(method, cache=cache)

    def start() -> list[str]:
        advice: list[str] = []
        if method is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # what it would say is in the report's advice
                report = lk.initialize(model, batches, method, progress=progress)
            advice += report.advice
        if recipe.accelerate:
            lk.accelerate(model, strict=True)
        return advice

    advice, seconds = timed(start)
    dash = None
    if recipe.dash is not None:
        dash = lk.LoraDash(pre_launch=max(1, round(recipe.dash * steps)), cache_dir=cache).attach(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    else:
        mode = "full" if recipe.optimizer == "lora_pro" else "efficient"
        optimizer = lk.create_lora_pro_optimizer(model, lr=rate, mode=mode)
    return Side(name, model, optimizer, rate, max(1, round(WARMUP_SHARE * steps)), seconds, advice, dash)
