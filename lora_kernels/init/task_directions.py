"""Task-specific directions: the LoRA-Init of LoRA-TSD (arXiv 2409.01035)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_choice, check_positive
from lora_kernels.init.curvature import WANTS, InputMetric, descent_step
from lora_kernels.init.method import LayerwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem, as_factors, stock_start
from lora_kernels.linalg.basis import changed_most, core_basis
from lora_kernels.statistics.sums import FISHER

UPDATES = ("gradient_step", "adapter")


@dataclass(frozen=True)
class TaskDirections(LayerwiseMethod):
    """A and B = the core directions of W that the task changes most, relative to their size.

    With `W = U diag(sigma) V^T` and an estimate `dW` of what fine-tuning does, direction i changes at the rate
    `|u_i^T dW v_i| / (sigma_i + eps)`. The rows of A are the `v_i` with the largest rates, the columns of B their
    `u_i`, scaled alike so that `|s B A| = share |W|` (Frobenius). The function is kept (see `initialize(base=...)`).

    Args:
        update: where dW comes from. `gradient_step`: one step preconditioned as LoRA-DA's, `-diag(1/f) G C^-1`, from
            the statistics. `adapter`: `s B A` as the adapter is now, after a short run of training (needs no data, and
            `force=True` to write over what was trained).
        share: of `|W|`.
        epsilon: eps, in units of the largest singular value.
        damping: of C and f in the gradient step.
        cache: folder for the singular value decompositions of the base weights, or `None`. They take the longest and
            do not depend on data.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "task_directions"
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True

    update: str = "gradient_step"
    share: float = 0.05
    epsilon: float = 1e-6
    damping: float = 1e-6
    cache: str | None = None

    def __post_init__(self) -> None:
        check_choice("update", self.update, UPDATES)
        for name in ("share", "epsilon", "damping"):
            check_positive(name, getattr(self, name))

    @property
    def wants(self) -> Mapping[str, bool]:
        """The statistics it reads: none where dW is the adapter's."""
        return WANTS if self.update == "gradient_step" else {}

    @property
    def collect_options(self) -> Mapping[str, object]:
        """As for LoRA-DA, whose step this is."""
        return {"weighting": "sample"} if self.update == "gradient_step" else {}

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the directions of weights."""
        for layer in layers:
            weight, update = layer.weight(), self._update(layer)
            if not bool(update.any()):
                yield stock_start(layer, "its update is zero, so no direction changes more than another")
                continue
            u, s, vh = core_basis(weight, self.cache)
            # Row sums of (U^T dW) * V^T: the diagonal of U^T dW V alone.
            most = changed_most((u, s, vh), ((u.mT @ update.to(u)) * vh).sum(1), layer.rank, self.epsilon)
            size = self.share * float(torch.linalg.vector_norm(s)) / (abs(layer.under.scaling) * math.sqrt(layer.rank))
            note = (
                f"change rates {float(most.rates[0]):.1e} to {float(most.rates[-1]):.1e}; "
                f"{100 * most.share:.0f} % of the update along core directions"
            )
            factors = as_factors(math.sqrt(size) * most.right, math.sqrt(size) * most.left)
            yield LayerFactors(factors, solver="svd", notes=(note,))

    def _update(self, layer: LayerProblem) -> torch.Tensor:
        if self.update == "gradient_step":
            metric = InputMetric.of(layer, self.damping)
            return descent_step(layer, metric, 1.0 / (layer.mean(FISHER) + self.damping)).mT
        if layer.under.adapter is None:
            raise ValueError(f"layer {layer.name} has no adapter whose factors could be the update")
        now = layer.under.adapter()
        return layer.under.scaling * (now.B.to(torch.float64) @ now.A.to(torch.float64))
