"""Sums of output gradients: Fisher diagonal and weight gradient; the mean gradient as an operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops.gradient_statistics.op import gradient_statistics_
from lora_kernels.statistics.moments import Accumulator, OutputGradients, as_rows

FISHER = "fisher"
GRADIENT = "gradient"


@dataclass(frozen=True)
class Gradient:
    """The loss gradient of one layer, `(m, n)`, as `left right` where it is known by a sketch.

    Attributes:
        left: `(m, n)`, or `(m, k)`.
        right: `(k, n)`, or `None`.
        error: a bound on the spectral norm of what the sketch leaves out, with probability
            `linalg.randomized_svd.CONFIDENCE`.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None
    error: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def dense(self) -> torch.Tensor:
        """`(m, n)`."""
        return self.left if self.right is None else self.left @ self.right

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """G x, for x `(n, k)`."""
        x = x.to(self.left)
        return self.left @ x if self.right is None else self.left @ (self.right @ x)

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        """G^T y, for y `(m, k)`."""
        product = self.left.mT @ y.to(self.left)
        return product if self.right is None else self.right.mT @ product


class FisherDiagonal(Accumulator):
    """`sum w_t g_t^2` over rows, g the gradient of the sum of losses by the output; `total` is `(m,)`."""

    kind = "fisher"
    statistic = FISHER
    words = "Fisher diagonal"
    features_of = "out_features"

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.features = features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=dtype, device=device)

    def add(self, call: OutputGradients) -> None:
        """Add the gradients of a call."""
        add_gradient_and_fisher(None, self, call)

    def mean_over(self, loss_items: float) -> torch.Tensor:  # noqa: ARG002
        """The mean over tokens, `(m,)` float64."""
        return self.total.to(torch.float64) / self.check_counted()


class WeightGradient(Accumulator):
    """`sum g_t x_t^T` over all rows; `total` is `(m, n)`.

    A mask would falsify it: rows without a loss of their own still move the losses of later ones.
    """

    kind = "weight_gradient"
    statistic = GRADIENT
    words = "weight gradient"
    arguments = ("out_features", "in_features")
    vector = ""
    reads_input = True

    def __init__(
        self, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(out_features, in_features, dtype=dtype, device=device)

    def add(self, call: OutputGradients) -> None:
        """Add the gradients of a call."""
        add_gradient_and_fisher(self, None, call)

    def mean_over(self, loss_items: float) -> torch.Tensor:
        """The gradient of the mean loss, `(m, n)`."""
        return self.total / loss_items


def add_gradient_and_fisher(
    gradient: WeightGradient | None, fisher: FisherDiagonal | None, call: OutputGradients
) -> None:
    """Add the gradients of a call to either or both, with one reading of them."""
    g, x, weight, factors = call
    # A selection of rows needs no more than `weight`, which has it too.
    squared = weight
    if factors is not None and factors.dtype != torch.bool:
        squared = factors.square() if weight is None else factors.square() * weight
    dtype = next(sums.dtype for sums in (gradient, fisher) if sums is not None)
    gradient_statistics_(
        None if gradient is None else gradient.total,
        None if fisher is None else fisher.total,
        as_rows(g, dtype),
        None if gradient is None or x is None else as_rows(x, dtype),
        weight=None if gradient is None else factors,
        fisher_weight=None if fisher is None else squared,
    )
