"""What a component of a layer is worth to rank redistribution: its score, larger where a rank serves more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from lora_kernels.init.components import input_components
from lora_kernels.init.curvature import whitened_gradient
from lora_kernels.linalg import randomized_svd
from lora_kernels.runtime.processes import share_out
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import FISHER, GRADIENT, INPUT_SECOND

_DAMPING = 1e-6
_ROUNDS = 4

Scores = dict[str, list[float]]


def explained_variance(statistics: Statistics, offered: Mapping[str, int], *, seed: int, progress: bool) -> Scores:
    """Share of a layer's (centred) input variance along each principal component (EVA, arXiv 2410.07170).

    Args:
        statistics: with input second moments or sketches.
        offered: components by layer.
        seed: of the random start of the eigensolver.
        progress: show a progress bar.

    Returns:
        Per layer, descending.
    """
    found = input_components(statistics, offered, seed=seed, progress=progress)
    return {name: found[name].ratios()[:count] for name, count in offered.items()}


def gradient_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int, progress: bool) -> Scores:
    """Squared singular values of the mean loss gradient: what a unit gradient step along a component gains.

    Args:
        statistics: with weight gradients, exact or sketched.
        offered: components by layer.
        seed: of the random start of the decomposition.
        progress: show a progress bar.

    Returns:
        Per layer, descending; not relative to the layer.

    Raises:
        ValueError: if a layer has no weight gradient, or its sketch too few columns.
    """

    def energies(name: str) -> torch.Tensor:
        sums = statistics[name].output
        if sums is not None and sums.sketch is not None:
            return sums.sketch.svd(offered[name], scale=1.0 / statistics.loss_items).S.square()
        return _energies(statistics[name].gradient(), offered[name], seed)

    return _each(offered, energies, statistics, progress)


def fisher_energy(statistics: Statistics, offered: Mapping[str, int], *, seed: int, progress: bool) -> Scores:
    """What a natural-gradient step along a component gains, in units of the loss.

    Half the squared singular values of the gradient, whitened by the input second moments and the Fisher diagonal.
    Unlike the gradient energy it does not change when a layer's inputs or outputs are rescaled.

    Args:
        statistics: with exact input second moments, Fisher diagonals and weight gradients.
        offered: components by layer.
        seed: of the random start of the decomposition.
        progress: show a progress bar.

    Returns:
        Per layer, descending.

    Raises:
        ValueError: if statistics are missing, sketched or not finite.
    """

    def energies(name: str) -> torch.Tensor:
        sums = statistics[name].output
        if sums is not None and sums.is_zero:
            return torch.zeros(offered[name])
        return _energies(whitened_gradient(statistics, name, _DAMPING), offered[name], seed) / 2

    return _each(offered, energies, statistics, progress)


def _energies(matrix: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    return randomized_svd(matrix, count, n_iter=_ROUNDS, probes=0, seed=seed).S.square()


def _each(
    offered: Mapping[str, int], energies: Callable[[str], torch.Tensor], statistics: Statistics, progress: bool
) -> Scores:
    """Layer by layer; the processes of a distributed run share the work."""
    if not offered:
        return {}
    with tqdm(total=len(offered), desc="scoring layers", unit="layer", disable=not progress, leave=False) as bar:

        def solve(name: str) -> list[float]:
            found: list[float] = energies(name).tolist()
            bar.update()
            return found

        output = statistics[next(iter(offered))].output
        device = torch.device("cpu") if output is None else output.count.device
        return share_out(offered, solve, device)


# By name: the statistics a score reads (True where only the exact sums will do), and its function.
SCORES: Mapping[str, tuple[Mapping[str, bool], Callable[..., Scores]]] = {
    "explained_variance": ({INPUT_SECOND: False}, explained_variance),
    "gradient_energy": ({GRADIENT: False}, gradient_energy),
    "fisher_energy": ({INPUT_SECOND: True, FISHER: True, GRADIENT: True}, fisher_energy),
}
