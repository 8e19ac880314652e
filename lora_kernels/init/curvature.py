"""The metric of a layer, `diag(f) x C`: Fisher diagonal of its outputs, second moment of its inputs; steps in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_kernels.init.problem import LayerProblem
from lora_kernels.linalg.cholesky import damped_cholesky
from lora_kernels.statistics.sums import FISHER, GRADIENT, INPUT_SECOND

# What a Fisher-preconditioned step reads.
WANTS: Mapping[str, bool] = {INPUT_SECOND: True, FISHER: True, GRADIENT: True}


@dataclass(frozen=True)
class InputMetric:
    """`C = M / N + damping I`, which layers that read the same tensor have in common; float64."""

    lower: torch.Tensor  # `(n, n)`, its Cholesky factor
    damping: float  # after any raises
    mean: torch.Tensor  # `(n,)`, of the inputs
    power: float  # trace of `M / N`
    notes: tuple[str, ...]  # what is to be said about it

    @classmethod
    def of(cls, layer: LayerProblem, damping: float) -> InputMetric:
        """The metric of a layer's input."""
        matrix = layer.mean(INPUT_SECOND)
        power = float(matrix.diagonal().sum())
        what = f"the input second moment of layer {layer.name}"
        lower, used = damped_cholesky(matrix, damping, attempts=12, what=what)
        raised = f"input damping raised from {damping:g} to {used:g}: the moments are not positive definite"
        notes = (raised,) if used > damping else ()
        assert layer.seen.input is not None  # it has the second moment
        return cls(lower, used, layer.seen.input.mean(), power, notes)

    def solve(self, block: torch.Tensor) -> torch.Tensor:
        """`C^{-1}` times a block `(n, k)`."""
        return torch.cholesky_solve(block, self.lower)

    @functools.cached_property
    def inverse(self) -> torch.Tensor:
        """`C^{-1}`, `(n, n)`."""
        return torch.cholesky_inverse(self.lower)

    def solve_thin(self, block: torch.Tensor) -> torch.Tensor:
        """`solve` for many calls with few columns: triangular solves of these would only wait on a GPU."""
        return self.inverse @ block if block.is_cuda else self.solve(block)

    def explained(self, vectors: torch.Tensor) -> float:
        """Share of the (centred) input variance in the span of orthonormal columns `(n, k)`."""
        inside = float((self.lower.mT @ vectors).square().sum()) - self.damping * vectors.shape[1]
        variance = float((vectors.mT @ self.mean).square().sum())
        total = self.power - float(self.mean.square().sum())
        return min(1.0, max(0.0, (inside - variance) / total)) if total > 0 else math.nan


def descent_step(layer: LayerProblem, metric: InputMetric, inverse: torch.Tensor) -> torch.Tensor:
    """The step `D = -C^{-1} G^T diag(inverse)`, `(n, m)` float64, with `inverse` `(m,)` that of the Fisher diagonal."""
    gradient = layer.mean(GRADIENT).to(metric.lower)
    return metric.solve((gradient * inverse.to(metric.lower).unsqueeze(-1)).mT).neg_()


def whitened_gradient(layer: LayerProblem, damping: float) -> torch.Tensor:
    """`diag(f)^{-1/2} G C^{-T/2}`, `(n, m)` float64; half its squared norm is what a natural-gradient step would gain.

    The Fisher matrix of the mean loss over items is assumed to be `(N / items) diag(f) x C` (Kronecker; Martens and
    Grosse 2015, arXiv 1503.05671), N the rows of the layer and f, C means over them.
    """
    metric = InputMetric.of(layer, damping)
    root = (layer.mean(FISHER).to(metric.lower) + damping).rsqrt()
    gradient = layer.mean(GRADIENT).to(metric.lower) * root.unsqueeze(-1)
    white: torch.Tensor = torch.linalg.solve_triangular(metric.lower, gradient.mT, upper=False)
    return white * math.sqrt(layer.seen.loss_items / layer.seen.tokens)
