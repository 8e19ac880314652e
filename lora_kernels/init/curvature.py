"""The metric of a layer, `diag(f) x C`: Fisher diagonal of its outputs, second moment of its inputs; steps in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.store import Statistics

# Tenfold raises of the damping before a second moment is given up.
_RAISES = 12


@dataclass(frozen=True)
class InputMetric:
    """`C = M / N + damping I`, which layers that read the same tensor have in common; float64.

    Attributes:
        lower: `(n, n)`, its Cholesky factor.
        damping: after any raises.
        mean: `(n,)`, of the inputs.
        power: trace of `M / N`.
        notes: what is to be said about it.
    """

    lower: torch.Tensor
    damping: float
    mean: torch.Tensor
    power: float
    notes: tuple[str, ...]

    def solve(self, block: torch.Tensor) -> torch.Tensor:
        """`C^{-1}` times a block `(n, k)`."""
        return torch.cholesky_solve(block, self.lower)

    def explained(self, vectors: torch.Tensor) -> float:
        """Share of the (centred) input variance in the span of orthonormal columns `(n, k)`."""
        inside = float((self.lower.mT @ vectors).square().sum()) - self.damping * vectors.shape[1]
        variance = float((vectors.mT @ self.mean).square().sum())
        total = self.power - float(self.mean.square().sum())
        return min(1.0, max(0.0, (inside - variance) / total)) if total > 0 else math.nan


def check_layer(statistics: Statistics, name: str) -> None:
    """Check that a layer's statistics make a metric and a step.

    Args:
        statistics: with exact input second moments, Fisher diagonals and weight gradients.
        name: the layer.

    Raises:
        ValueError: if one of them is missing, sketched, zero or not finite.
    """
    layer = statistics[name]
    again = 'collect(wants="lora_da") keeps what is needed'
    if layer.input is None or layer.input.tokens <= 0:
        raise ValueError(f"layer {name} saw no token in the collection pass")
    if not isinstance(layer.input, InputMoments):
        raise ValueError(f"layer {name} holds a sketch of its input, but the exact moments are needed: {again}")
    output = layer.output
    if output is None or output.fisher is None or (output.gradient is None and output.sketch is None):
        raise ValueError(f"layer {name} has no Fisher diagonal and weight gradient: {again}")
    if output.gradient is None:
        raise ValueError(f"layer {name} holds a sketch of its gradient, but the exact one is needed: {again}")
    if output.tokens <= 0 or statistics.loss_items <= 0:
        raise ValueError(f"layer {name} counted no row in the backward pass: there was none, or all were masked")
    for what, sums in (("weight gradient", output.gradient), ("Fisher diagonal", output.fisher)):
        largest = float(sums.abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"the {what} of layer {name} holds NaN or infinite entries")
        if largest == 0:
            raise ValueError(f"the {what} of layer {name} is zero: the loss of this data does not depend on it")


def factorize(moments: InputMoments, damping: float, name: str) -> InputMetric:
    """The metric of an input. A failed Cholesky raises the damping tenfold, and says so in the notes.

    Args:
        moments: exact second moments.
        damping: of C.
        name: the layer, for messages.

    Returns:
        The metric.

    Raises:
        ValueError: if the moments are not finite, or no damping makes them positive definite.
    """
    matrix = moments.covariance(center=False)
    diagonal = matrix.diagonal()
    power = float(diagonal.sum())
    if not math.isfinite(power):
        raise ValueError(f"the input second moment of layer {name} holds NaN or infinite entries")
    notes: tuple[str, ...] = ()
    plain, used = diagonal.clone(), damping
    for _ in range(_RAISES):
        torch.add(plain, used, out=diagonal)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            if used > damping:
                notes = (f"input damping raised from {damping:g} to {used:g}: the moments are not positive definite",)
            return InputMetric(lower, used, moments.mean(), power, notes)
        used *= 10
    raise ValueError(f"the input second moment of layer {name} is not positive definite, even with damping {used:g}")


def _parts(statistics: Statistics, name: str, damping: float) -> tuple[InputMetric, torch.Tensor, torch.Tensor]:
    """Metric, `1 / (f + damping)` as a column, and the mean gradient `(m, n)`, all float64."""
    check_layer(statistics, name)
    layer = statistics[name]
    assert isinstance(layer.input, InputMoments) and layer.output is not None and layer.output.fisher is not None
    metric = factorize(layer.input, damping, name)
    inverse = 1.0 / (layer.output.fisher.to(metric.lower) / layer.output.tokens + damping)
    return metric, inverse.unsqueeze(-1), statistics[name].gradient().to(metric.lower)


def descent_step(statistics: Statistics, name: str, damping: float) -> torch.Tensor:
    """The Fisher-preconditioned descent step `D = -C^{-1} G^T diag(1 / (f + damping))` of a layer.

    Args:
        statistics: exact input second moments, Fisher diagonals and weight gradients.
        name: the layer.
        damping: of C and of f.

    Returns:
        `(n, m)` float64.

    Raises:
        ValueError: as `LoraDA.factors`.
    """
    metric, inverse, gradient = _parts(statistics, name, damping)
    return metric.solve((gradient * inverse).mT).neg_()


def whitened_gradient(statistics: Statistics, name: str, damping: float) -> torch.Tensor:
    """`diag(f)^{-1/2} G C^{-T/2}`, scaled so that half its squared norm is what a natural-gradient step would gain.

    The Fisher matrix of the mean loss over items is taken to be `(N / items) diag(f) x C` (Kronecker; Martens and
    Grosse 2015, arXiv 1503.05671), N the rows of the layer and f, C means over them.

    Args:
        statistics: exact input second moments, Fisher diagonals and weight gradients.
        name: the layer.
        damping: of C and of f.

    Returns:
        `(n, m)` float64.

    Raises:
        ValueError: as `check_layer`.
    """
    metric, inverse, gradient = _parts(statistics, name, damping)
    white: torch.Tensor = torch.linalg.solve_triangular(metric.lower, (gradient * inverse.sqrt()).mT, upper=False)
    return white * math.sqrt(statistics.loss_items / statistics[name].tokens)
