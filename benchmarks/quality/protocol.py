"""What a study of quality compares, under which protocol, and on which texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.demo.data import TextTask, docstring_task, hold_out
from benchmarks.demo.recipe import Recipe
from benchmarks.demo.user_data import part_file, read_folder, read_task, stratified_split
from benchmarks.quality.report import BASELINE
from lora_kernels.api.text_files import read_rows
from lora_kernels.init import EVA, CorDA, InitMethod, LoraDA, LoraGA, PiSSA, TaskDirections


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        method: the initialisation; None for stock random LoRA.
        recipe: how it is trained.
        rates: the grid of the adapter's rate; None for that of the protocol.
    """

    method: InitMethod | None = None
    recipe: Recipe = Recipe()
    rates: tuple[float, ...] | None = None

    def settings(self) -> dict[str, Any] | None:
        """As in the record: None for random LoRA trained by AdamW."""
        found: dict[str, Any] = {} if self.method is None else {"method": self.method.name, **asdict(self.method)}  # type: ignore[call-overload]
        if self.recipe != Recipe():
            found["training"] = asdict(self.recipe)
        if self.rates is not None:
            found["rates"] = list(self.rates)
        return found or None


# Variants, such as {"eva_rho1": Arm(EVA(rho=1.0))}, are added here.
ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "eva": Arm(EVA(rho=2.0, min_rank=0)),
    "lora_da": Arm(LoraDA()),
    "lora_ga": Arm(LoraGA()),
    "corda": Arm(CorDA()),
    "pissa": Arm(PiSSA()),
    "task_directions": Arm(TaskDirections()),
    # Its full mode moves W by its rate, as full fine-tuning does, so its rates are those of full fine-tuning.
    "lora_pro": Arm(recipe=Recipe("lora_pro"), rates=(1e-5, 3e-5, 1e-4, 3e-4)),
    "lora_pro_efficient": Arm(recipe=Recipe("lora_pro_efficient")),
    "lora_dash": Arm(recipe=Recipe(dash=0.5)),
}
LABEL_COLUMNS = ("label", "category", "intent")


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on, but for the data and the arms.

    Attributes:
        rank: of the adapter.
        evaluate_at: steps after which the test part is evaluated; the last one is the length of a run.
        batch_size: texts per step.
        max_tokens: texts are cut to this length.
        rates: the grid of the adapter's rate.
        head_rates: the grid of the head's rate.
        head_study_rates: adapter rates at which each head rate is tried.
        extensions: how often either grid may grow by one value at an edge.
        tuning_seeds: of the runs that choose rates, by their mean loss.
        seeds: of the final runs.
        validation_share: of each class of the training part; chooses the rates.
    """

    rank: int = 8
    evaluate_at: tuple[int, ...] = (25, 50, 100, 200)
    batch_size: int = 16
    max_tokens: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    head_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    head_study_rates: tuple[float, ...] = (1e-3, 3e-3)
    extensions: int = 2
    tuning_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_share: float = 0.1

    @property
    def steps(self) -> int:
        """Length of a run."""
        return self.evaluate_at[-1]


# The demo's task has an eighth of the texts of banking77.
SHORT = Protocol(evaluate_at=(10, 25, 50, 100))
QUICK = Protocol(
    rank=4,
    evaluate_at=(2, 4, 8),
    rates=(1e-3, 1e-2),
    head_rates=(3e-3,),
    head_study_rates=(1e-3,),
    extensions=0,
    seeds=(0,),
)


@dataclass(frozen=True)
class Job:
    """One run. `part` is `tune` (evaluated once, on the validation part) or `final`."""

    part: str
    arm: str
    seed: int
    rate: float
    head_rate: float


@dataclass(frozen=True)
class Setup:
    """What a worker needs to do any job.

    Attributes:
        data: a folder with `train` and `test`, or one file; the demo's task where None.
        text_column: column of the text.
        label_column: column of the label; the first of `LABEL_COLUMNS` that there is where None.
        model: model folder; the packaged MiniLM-L6 where None.
        protocol: the protocol.
        arms: by name.
    """

    data: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    model: Path | None = None
    protocol: Protocol = field(default_factory=Protocol)
    arms: Mapping[str, Arm] = field(default_factory=lambda: dict(ARMS))

    @property
    def files(self) -> list[Path]:
        """The data files."""
        if self.data is None:
            return []
        return [part_file(self.data, part) for part in ("train", "test")] if self.data.is_dir() else [self.data]


def read(setup: Setup) -> dict[str, TextTask]:
    """Reads the data.

    Args:
        setup: where and how.

    Returns:
        The task of each part: `final` with the test texts, `tune` with the validation texts, and for `data` the same
        training texts in both.
    """
    if setup.data is None:
        task = docstring_task()
        return {"final": task, "tune": hold_out(task)}
    label = setup.label_column
    if label is None:
        _, row = next(read_rows(setup.files[0], (setup.text_column,)), ("", {}))
        label = next((name for name in LABEL_COLUMNS if name in row), LABEL_COLUMNS[0])
    task = (read_folder if setup.data.is_dir() else read_task)(setup.data, setup.text_column, label)
    train, validation = (tuple(part) for part in stratified_split(task.train, 0, setup.protocol.validation_share))
    return {
        "final": replace(task, train=train),
        "tune": TextTask(f"{task.name}, held-out part of the training texts", task.labels, train, validation),
    }
