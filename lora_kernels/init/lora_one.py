"""LoRA-One: the model starts one rank-r step of full gradient descent on (arXiv 2502.01235)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_positive
from lora_kernels.init.gradients import GradientMethod, missing_directions
from lora_kernels.init.problem import LayerFactors, LayerProblem, as_factors
from lora_kernels.linalg.randomized_svd import RandomizedSVD


@dataclass(frozen=True)
class LoraOne(GradientMethod):
    """`gamma B A` = the best rank-r approximation of the negative gradient of the mean loss, over its spectral norm.

    With `-G = U S V^T`: `B = U_r sqrt(S_r / S_1) / sqrt(gamma)` and `A = sqrt(S_r / S_1) V_r^T / sqrt(gamma)`, as the
    authors' code has it (their text leaves out the square roots). The base weight stays as it is, so the start moves
    the function of the model: by `s / gamma` along the leading direction of a layer, whatever the size of its
    gradient. Where the gradient has fewer than r directions, the rest of B is zero and that of A arbitrary, which can
    learn. `residual` is an upper bound on the spectral norm of what the r triplets leave of G, relative to that of G.

    Args:
        gamma: how small the step is; 128 is the authors' default.
        seed: of the random start of the decomposition.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "lora_one"
    moves_function: ClassVar[bool] = True
    triplets_per_rank: ClassVar[int] = 1

    gamma: float = 128.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma, high=torch.finfo(torch.float32).max)

    def start(self, layer: LayerProblem, triplets: RandomizedSVD) -> LayerFactors:
        """Split the step evenly between A and B."""
        root = (triplets.S / triplets.S[0]).sqrt()
        a = torch.where(root > 0, root, 1.0).unsqueeze(-1) * triplets.Vh
        factors = as_factors(a / math.sqrt(self.gamma), -(triplets.U * root) / math.sqrt(self.gamma))
        notes = missing_directions(triplets, f"r = {layer.rank}")
        return LayerFactors(factors, residual=float(triplets.error), solver=triplets.method, notes=notes)
