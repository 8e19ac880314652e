"""What the demo can be told, and the defaults it was studied with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_kernels.init import METHODS

# The winners of `python -m benchmarks.demo_rates`; a test compares them with its record.
DEFAULT_RATES = {"random": 3e-3, "eva": 1e-3}
DEFAULT_STEPS = 100
MAX_BATCHES = 16
# Methods that study leaves out: the winners of `python -m benchmarks.quality` on another task, with another rate for
# the head; a test compares them with its record.
OTHER_RATE = 1e-3
STARTS = ("random", *METHODS)


ABOUT = {
    "model": "folder of a transformers encoder with its tokenizer (default: the packaged MiniLM-L6)",
    "data": "a .csv or .jsonl file (default: docstrings of the standard library)",
    "text_column": "column of the text in the data",
    "label_column": "column of the label in the data",
    "rank": "LoRA rank per layer, before any redistribution",
    "method": "initialisation to compare with random LoRA; random trains that one alone",
    "steps": "optimizer steps per run",
    "seeds": "number of seeds; they are 0, 1, ...",
    "batch_size": "texts per step",
    "learning_rate": "peak rate of both arms (default: each arm's own, from the study)",
    "max_tokens": "texts are cut to this many tokens",
    "out": "output folder",
    "plots": "draw the two PNG files",
    "threads": "CPU threads of torch (default: torch's own choice)",
    "accelerate": "run the LoRA layers fused",
}


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; `ABOUT` says what each is."""

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
    out: Path = Path("demo-out")
    plots: bool = True
    threads: int | None = None
    accelerate: bool = False

    def __post_init__(self) -> None:
        """Checks every value that can be checked without opening a file.

        Raises:
            ValueError: A value is out of its range.
        """
        lowest = {"rank": 1, "steps": 4, "seeds": 1, "batch_size": 1, "max_tokens": 3}
        for name, least in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} was {value!r}, must be an integer of at least {least}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads was {self.threads}, must be at least 1")
        if self.method not in STARTS:
            raise ValueError(f"method was {self.method!r}, must be one of {', '.join(STARTS)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate was {self.learning_rate}, must be above 0 and below 1")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"model was {str(self.model)!r}, must be a folder with a transformers config.json")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"data was {str(self.data)!r}, must be an existing .csv or .jsonl file")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out was {str(self.out)!r}, must be a folder")

    @property
    def arms(self) -> tuple[str, ...]:
        """The initialisations that are trained, random first."""
        return ("random",) if self.method == "random" else ("random", self.method)

    def rate(self, arm: str) -> float:
        """Chooses the learning rate of an arm.

        Args:
            arm: Name of the initialisation.

        Returns:
            `learning_rate` where given, else the studied rate.
        """
        return DEFAULT_RATES.get(arm, OTHER_RATE) if self.learning_rate is None else self.learning_rate

    def rate_source(self, arm: str) -> str:
        """Says where an arm's learning rate comes from, for the report.

        Args:
            arm: Name of the initialisation.

        Returns:
            A short phrase.
        """
        if self.learning_rate is not None:
            return "given"
        return "from the rate study" if arm in DEFAULT_RATES else "from the study on another task"
