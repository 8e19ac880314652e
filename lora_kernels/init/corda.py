"""CorDA: context-oriented decomposition of the base weight (arXiv 2406.05223)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from lora_kernels.init.factors import BaseLayer, LayerFactors
from lora_kernels.init.pissa import leading, relative_error, split
from lora_kernels.init.ranks import offers
from lora_kernels.linalg.randomized_svd import RandomizedSVD, fix_pair
from lora_kernels.ops._checks import check_choice, check_range
from lora_kernels.statistics.distributed import share_out
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import METHOD_WANTS

MODES = ("instruction_previewed", "knowledge_preserved")
# Tenfold raises of the damping before a second moment is given up.
_RAISES = 8


@dataclass(frozen=True)
class CorDA:
    """`s B A` = r singular components of `W C`, times `C^-1`, with C the second moment of the input; function kept.

    With `C = M / N + damping mean(diag(M / N)) I` and `W C = U S V^T`: B takes columns of U, A rows of `V^T C^-1`, and
    the singular values are split evenly. The data's scale does not matter.

    Args:
        mode: `instruction_previewed`: the r largest components, those that the data uses most, are trained.
            `knowledge_preserved`: the r smallest, so that what the data uses stays.
        damping: relative to the mean of the diagonal; raised tenfold where the Cholesky decomposition fails (and the
            report says so).
        n_iter: rounds of the randomized SVD for `instruction_previewed`; `None` for a full one. The smallest components
            always need a full one.

    Raises:
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "corda"
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["corda"]
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    offsets_base: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False

    mode: str = "instruction_previewed"
    damping: float = 0.01
    n_iter: int | None = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice("mode", self.mode, MODES)
        check_range("damping", self.damping, low=0.0)
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping is {self.damping!r}, but must be above 0 and finite")
        if self.n_iter is not None:
            check_range("n_iter", self.n_iter, low=0, integer=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002  (the second moment must be exact)
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
            statistics: exact input second moments.
            ranks: the rank of each layer.
            base: the base weights.
            progress: show a progress bar.

        Returns:
            Per layer its factors; `residual` is the bound on the spectral norm of `W C` beside the components, relative
            to the largest (0 for a full decomposition).

        Raises:
            ValueError: if base weights or exact statistics are missing, a rank is outside [1, min(m, n)], or no damping
                makes a second moment positive definite.
        """
        if base is None:
            raise ValueError("base is None, but CorDA reads the base weights")
        groups: dict[int, list[str]] = {}
        for name in ranks:
            sums = statistics[name].input
            if not isinstance(sums, InputMoments) or sums.tokens <= 0:
                raise ValueError(f'layer {name} has no exact input second moment: collect(wants="corda") keeps it')
            groups.setdefault(id(sums), []).append(name)
        members = dict(enumerate(groups.values()))
        with tqdm(total=len(ranks), desc="decomposing weights", unit="layer", disable=not progress, leave=False) as bar:

            def solve(number: int) -> dict[str, LayerFactors]:
                moments = statistics[members[number][0]].input
                assert isinstance(moments, InputMoments)  # checked above
                metric, lower, notes = self._metric(moments, members[number][0])
                found = {}
                for name in members[number]:
                    found[name] = self._layer(base[name], metric, lower, ranks[name], name, notes)
                    bar.update()
                return found

            device = next((base[name].weight().device for name in ranks), torch.device("cpu"))
            solved = share_out(members, solve, device)
        found = {name: answer for each in solved.values() for name, answer in each.items()}
        return {name: found[name] for name in ranks}

    def _metric(self, moments: InputMoments, name: str) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
        """C and its Cholesky factor; layers that share an input share them."""
        matrix = moments.covariance(center=False)
        diagonal = matrix.diagonal()
        plain, used = diagonal.clone(), self.damping
        if not bool(torch.isfinite(plain).all()):
            raise ValueError(f"the input second moment of layer {name} holds NaN or infinite entries")
        for _ in range(_RAISES):
            torch.add(plain, used * plain.mean(), out=diagonal)
            lower, info = torch.linalg.cholesky_ex(matrix)
            if int(info) == 0:
                raised = f"damping raised from {self.damping:g} to {used:g}: the moments are not positive definite"
                return matrix, lower, (raised,) if used > self.damping else ()
            used *= 10
        raise ValueError(f"the input second moment of layer {name} is zero or not positive definite")

    def _layer(
        self,
        layer: BaseLayer,
        metric: torch.Tensor,
        lower: torch.Tensor,
        rank: int,
        name: str,
        notes: tuple[str, ...],
    ) -> LayerFactors:
        weight = layer.weight()
        offers({name: rank}, {name: min(weight.shape)}, rho=1.0)
        product = weight.to(metric) @ metric
        if self.mode == "instruction_previewed":
            # In float32 the triplets lose nothing that the factors could hold, at half the cost.
            triplets = leading(product.to(torch.float32), rank, self.n_iter)
        else:
            u, s, vh = torch.linalg.svd(product, full_matrices=False)
            left, right = fix_pair(u[:, -rank:], vh[-rank:].mT)
            triplets = RandomizedSVD(left, s[-rank:], right.mT, None, "svd")
        back = torch.cholesky_solve(triplets.Vh.mT.to(lower), lower).mT
        turned = RandomizedSVD(triplets.U.to(lower), triplets.S.to(lower), back, triplets.error, triplets.method)
        residual = relative_error(triplets) if self.mode == "instruction_previewed" else 0.0
        return LayerFactors(split(turned, layer.scaling), math.nan, residual, triplets.method, notes)
