"""The settings of the demo, with the defaults it was studied with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_kernels.init import METHODS

# The winners of `python -m benchmarks.demo.study --rates-only`; a test compares them with results/demo_rates.json.
DEFAULT_RATES = {"random": 3e-3, "eva": 1e-3}
DEFAULT_STEPS = 100
# Methods that study leaves out: the winners of `python -m benchmarks.demo.study` on another task, with another rate for
# the head; a test compares them with results/quality_banking77.json.
OTHER_RATE = 1e-3
RATES = {**dict.fromkeys(METHODS, OTHER_RATE), **DEFAULT_RATES}


@dataclass(frozen=True)
class DemoConfig:
    """Settings of one demo.

    Attributes:
        model: folder of a transformers encoder with its tokenizer; the packaged MiniLM-L6 where None.
        data: a `.csv` or `.jsonl` file; docstrings of the standard library where None.
        text_column: column of the text in `data`.
        label_column: column of the label in `data`.
        rank: LoRA rank per layer before any redistribution.
        method: initialisation that is compared with random LoRA; "random" trains that one alone.
        steps: optimizer steps per run.
        seeds: number of seeds; the seeds are 0, 1, ...
        batch_size: examples per step.
        learning_rate: peak rate of both arms; each arm's own studied rate where None.
        max_tokens: texts are cut to this many tokens.
        threads: CPU threads for torch; torch's own choice where None.
        accelerate: whether the LoRA layers run through `lora_kernels.accelerate`.
        out: output folder, created where it is missing.
    """

    model: Path | None = None
    data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    rank: int = 8
    method: str = "eva"
    steps: int = DEFAULT_STEPS
    seeds: int = 3
    batch_size: int = 16
    learning_rate: float | None = None
    max_tokens: int = 32
    threads: int | None = None
    accelerate: bool = False
    out: Path = Path("demo-out")

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening a file."""
        for name, least in {"rank": 1, "steps": 4, "seeds": 1, "batch_size": 1, "max_tokens": 3, "threads": 1}.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least) and not (name == "threads" and value is None):
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        if self.method not in RATES:
            raise ValueError(f"method is {self.method!r}, but must be one of {', '.join(RATES)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0 and below 1")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"model is {str(self.model)!r}, but must be a folder with a transformers config.json")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"data is {str(self.data)!r}, but must be an existing .csv or .jsonl file")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out is {str(self.out)!r}, but must be a folder")

    @property
    def arms(self) -> tuple[str, ...]:
        """The initialisations that are trained, random first."""
        return ("random",) if self.method == "random" else ("random", self.method)

    def rate(self, arm: str) -> float:
        """The learning rate of an arm."""
        return RATES[arm] if self.learning_rate is None else self.learning_rate

    def rate_source(self, arm: str) -> str:
        """Where an arm's learning rate comes from, for the report."""
        if self.learning_rate is not None:
            return "given"
        return "from the rate study" if arm in DEFAULT_RATES else "from the study on another task"
