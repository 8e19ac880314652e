"""What a component of a layer is worth to rank redistribution: its score, larger where a rank serves more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from lora_kernels.init.components import input_components
from lora_kernels.init.curvature import WANTS, whitened_gradient
from lora_kernels.init.problem import LayerProblem, problems
from lora_kernels.init.solving import solve_layers
from lora_kernels.linalg import randomized_svd
from lora_kernels.statistics.gradients import GRADIENT
from lora_kernels.statistics.moments import INPUT_SECOND
from lora_kernels.statistics.store import Statistics

_DAMPING = 1e-6
_ROUNDS = 4

Scores = dict[str, list[float]]


def explained_variance(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """Share of a layer's (centred) input variance along its principal components (EVA, arXiv 2410.07170)."""
    components = input_components(statistics, offered, seed=seed)
    return {name: components[name].ratios()[:count] for name, count in offered.items()}


def gradient_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """Squared singular values of the mean loss gradient: what a unit gradient step along a component gains."""

    def energies(layer: LayerProblem) -> torch.Tensor:
        if layer.has(GRADIENT, exact=True):
            return _energies(layer.mean(GRADIENT), layer.rank, seed)
        return layer.gradient_svd(layer.rank).S.square()

    return _score(problems(statistics, offered, {GRADIENT: False}), energies)


def fisher_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int) -> Scores:
    """What a natural-gradient step along a component gains, in units of the loss."""
    # Half the squared singular values of the gradient, whitened by the input second moments and the Fisher diagonal.
    # Unlike the gradient energy it does not change when a layer's inputs or outputs are rescaled.

    def energies(layer: LayerProblem) -> torch.Tensor:
        if layer.why_unusable(WANTS) is not None:
            return torch.zeros(layer.rank)
        return _energies(whitened_gradient(layer, _DAMPING), layer.rank, seed) / 2

    return _score(problems(statistics, offered, WANTS), energies)


def _energies(matrix: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    return randomized_svd(matrix, count, n_iter=_ROUNDS, probes=0, seed=seed).S.square()


def _score(layers: Mapping[str, LayerProblem], energies: Callable[[LayerProblem], torch.Tensor]) -> Scores:
    def solve(group: Iterable[LayerProblem]) -> Iterable[list[float]]:
        return [energies(layer).tolist() for layer in group]

    return solve_layers(layers, solve, title="scoring layers", device=lambda layer: layer.device)


# By name: the statistics a score reads (True where only the exact sums will do), and its function of statistics, the
# number of components that a layer offers, and a seed.
SCORES: Mapping[str, tuple[Mapping[str, bool], Callable[..., Scores]]] = {
    "explained_variance": ({INPUT_SECOND: False}, explained_variance),
    "gradient_energy": ({GRADIENT: False}, gradient_energy),
    "fisher_energy": (WANTS, fisher_energy),
}
