"""The settings of LoRA-Dash."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_kernels._checks import check_range


@dataclass(frozen=True)
class DashSettings:
    """What a run of LoRA-Dash depends on; `LoraDash` says what each is.

    Raises:
        TypeError: if a value is of a wrong type.
        ValueError: if one is out of range.
    """

    k: int = 8
    pre_launch: int = 100
    epsilon: float = 1e-6
    adapter_name: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges that need no model."""
        check_range("k", self.k, low=1, integer=True)
        check_range("pre_launch", self.pre_launch, low=1, integer=True)
        check_range("epsilon", self.epsilon, low=0.0)
        if math.isinf(self.epsilon):
            raise ValueError(f"epsilon is {self.epsilon!r}, but must be finite")
