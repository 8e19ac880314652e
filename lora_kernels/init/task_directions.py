"""Task-specific directions: the LoRA-Init of LoRA-TSD (arXiv 2409.01035)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from tqdm import tqdm

from lora_kernels._checks import check_choice, check_range
from lora_kernels.init.curvature import descent_step
from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.init.ranks import offers
from lora_kernels.linalg import core_basis
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.runtime.processes import share_out
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import METHOD_WANTS

UPDATES = ("gradient_step", "adapter")


@dataclass(frozen=True)
class TaskDirections:
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
    full_rate: ClassVar[bool] = False
    adjust_scaling_factors: ClassVar[bool] = False

    update: str = "gradient_step"
    share: float = 0.05
    epsilon: float = 1e-6
    damping: float = 1e-6
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges that need no model."""
        check_choice("update", self.update, UPDATES)
        for name in ("share", "epsilon", "damping"):
            value = getattr(self, name)
            check_range(name, value, low=0.0)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, but must be above 0 and finite")

    @property
    def wants(self) -> Mapping[str, bool]:
        """The statistics it reads: none where dW is the adapter's."""
        return METHOD_WANTS[self.name] if self.update == "gradient_step" else {}

    @property
    def collect_options(self) -> Mapping[str, object]:
        """As for LoRA-DA, whose step this is."""
        return {"weighting": "sample"} if self.update == "gradient_step" else {}

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002  (nothing of it may be sketched)
        """Columns that a sketch should have: none is read."""
        return 1

    def factors(
        self,
        statistics: Statistics,
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        Args:
            statistics: exact input second moments, Fisher diagonals and weight gradients (unread for `adapter`).
            ranks: the rank of each layer.
            base: the base weights, and the adapter's factors for `adapter`.
            progress: show a progress bar over the decompositions.

        Returns:
            Per layer its factors: `A` `(r, n)` with orthogonal rows, `B` `(m, r)` with orthogonal columns.

        Raises:
            ValueError: if base weights or statistics are missing, a rank is outside [1, min(m, n)], or dW is zero.
        """
        if base is None:
            raise ValueError("base is None, but task directions are those of the base weights")
        with tqdm(total=len(ranks), desc="decomposing weights", unit="layer", disable=not progress, leave=False) as bar:

            def solve(name: str) -> LayerFactors:
                weight = base[name].weight()
                offers({name: ranks[name]}, {name: min(weight.shape)}, rho=1.0)
                bar.update()
                return self._layer(name, weight, self._update(statistics, name, base[name]), ranks[name], base[name])

            device = next((base[name].weight().device for name in ranks), torch.device("cpu"))
            return share_out(ranks, solve, device)

    def _update(self, statistics: Statistics, name: str, layer: BaseLayer) -> torch.Tensor:
        if self.update == "gradient_step":
            return descent_step(statistics, name, self.damping).mT
        if layer.adapter is None:
            raise ValueError(f"layer {name} has no adapter whose factors could be the update")
        now = layer.adapter()
        return layer.scaling * (now.B.to(torch.float64) @ now.A.to(torch.float64))

    def _layer(
        self, name: str, weight: torch.Tensor, update: torch.Tensor, rank: int, layer: BaseLayer
    ) -> LayerFactors:
        if not bool(update.any()):
            raise ValueError(f"the update of layer {name} is zero: no direction changes more than another")
        u, s, vh = core_basis(weight, self.cache)
        # Row sums of (U^T dW) * V^T: the diagonal of U^T dW V alone.
        along = ((u.mT @ update.to(u)) * vh).sum(1).abs()
        rates = along / (s + self.epsilon * s[0])
        chosen = rates.topk(rank).indices
        left, right = fix_pair(u[:, chosen], vh[chosen].mT)
        size = self.share * float(torch.linalg.vector_norm(s)) / (abs(layer.scaling) * math.sqrt(rank))
        factors = LoraFactors(
            (math.sqrt(size) * right.mT).to(torch.float32).contiguous(),
            (math.sqrt(size) * left).to(torch.float32).contiguous(),
        )
        shown = f"change rates {float(rates[chosen].max()):.1e} to {float(rates[chosen].min()):.1e}"
        caught = float(along[chosen].square().sum() / along.square().sum().clamp_min(torch.finfo(along.dtype).tiny))
        notes = (f"{shown}; {100 * caught:.0f} % of the update along core directions",)
        return LayerFactors(factors, math.nan, 0.0, "svd", notes)
