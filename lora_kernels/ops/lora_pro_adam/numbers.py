"""The numbers of an Adam step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Adam:
    """The numbers of a step."""

    scaling: float  # s
    beta1: float
    beta2: float
    eps: float  # added to the root of the second moment
    step: int  # counted from 1
    row_offset: int  # the number of the first row, for the random bits
    row_step: int  # from one matrix of a batch to the next

    @property
    def avg_factor(self) -> float:
        """One over the bias of the first moment."""
        return 1 / (1 - self.beta1**self.step)

    @property
    def root_factor(self) -> float:
        """One over the bias of the root of the second moment."""
        return 1 / math.sqrt(1 - self.beta2**self.step)
