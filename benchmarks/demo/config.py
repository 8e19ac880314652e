"""The settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_kernels.init import METHODS

STOCK, OURS = "stock PEFT", "lora_kernels"
RANDOM = "random"
# Of PEFT's side: nothing tells its users a rate, and this one is of many examples for language models.
STOCK_RATE = 3e-4


@dataclass(frozen=True)
class DemoConfig:
    """Settings of one demo.

    Attributes:
        model: folder of a transformers causal language model with its tokenizer; SmolLM2-135M-Instruct where None.
        data: a `.jsonl` or `.csv` file with `question` and `answer`, or with `text`; generated problems where None.
        method: start of our side; "random" is PEFT's own, so that only the layers differ.
        rate: learning rates of PEFT's side and of ours; where None `STOCK_RATE`, and what is suggested for our start.
        rank: LoRA rank, on every linear layer but the head.
        dropout: of the adapters' inputs.
        steps: optimizer steps of each side.
        batch_size: texts per step.
        max_tokens: texts are cut to this many tokens.
        init_batches: batches that the start reads; the first ones that training reads.
        held_out: texts that are held out, at most.
        answer_tokens: length of the answers that are generated, at most.
        seed: of the texts, their order and the random factors.
        threads: CPU threads for torch; torch's own choice where None.
        out: output folder, created where it is missing.
    """

    model: Path | None = None
    data: Path | None = None
    method: str = "eva"
    rate: tuple[float, float] | None = None
    rank: int = 8
    dropout: float = 0.0
    steps: int = 40
    batch_size: int = 4
    max_tokens: int = 160
    init_batches: int = 8
    held_out: int = 32
    answer_tokens: int = 96
    seed: int = 0
    threads: int | None = None
    out: Path = Path("demo-out")

    def __post_init__(self) -> None:
        """Check every value that can be checked without opening a file."""
        least = {"rank": 1, "steps": 2, "batch_size": 1, "max_tokens": 4, "init_batches": 1, "held_out": 1}
        least |= {"answer_tokens": 1, "seed": 0, "threads": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= bound) and not (name == "threads" and value is None):
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {bound}")
        if self.method != RANDOM and self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, but must be one of {', '.join([RANDOM, *METHODS])}")
        if self.rate is not None and not all(0 < value < 1 for value in self.rate):
            raise ValueError(f"rate is {self.rate}, but must be above 0 and below 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be at least 0 and below 1")
        if self.model is not None and not (self.model / "config.json").is_file():
            raise ValueError(f"model is {str(self.model)!r}, but must be a folder with a transformers config.json")
        if self.data is not None and not self.data.is_file():
            raise ValueError(f"data is {str(self.data)!r}, but must be an existing .jsonl or .csv file")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out is {str(self.out)!r}, but must be a folder")

    @property
    def evaluate_at(self) -> tuple[int, ...]:
        """Steps after which the held-out loss is measured: more often at the beginning, where it falls fast."""
        shares = (0, 0.05, 0.125, 0.25, 0.375, 0.5, 0.75, 1)
        return tuple(sorted({round(share * self.steps) for share in shares}))


# Under two minutes on two cores.
QUICK = {"steps": 8, "batch_size": 2, "init_batches": 2, "held_out": 8, "answer_tokens": 64, "max_tokens": 128}
