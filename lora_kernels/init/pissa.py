"""PiSSA: principal singular values and vectors of the base weight (arXiv 2404.02948)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.init.ranks import offers
from lora_kernels.linalg.randomized_svd import RandomizedSVD, fix_pair, randomized_svd
from lora_kernels.ops._checks import check_range
from lora_kernels.statistics.distributed import share_out
from lora_kernels.statistics.store import Statistics


def leading(matrix: torch.Tensor, rank: int, n_iter: int | None) -> RandomizedSVD:
    """The leading singular triplets of one matrix.

    Args:
        matrix: `(m, n)` float32 or float64.
        rank: how many.
        n_iter: rounds of `randomized_svd`, or `None` for a full decomposition, cut.

    Returns:
        The triplets; `error` bounds the spectral norm of what is left only where they are approximate.
    """
    if n_iter is not None:
        return randomized_svd(matrix, rank, n_iter=n_iter, oversample=8)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    left, right = fix_pair(u[:, :rank], vh[:rank].mT)
    return RandomizedSVD(left, s[:rank], right.mT, None, "svd")


def split(triplets: RandomizedSVD, scaling: float) -> LoraFactors:
    """Factors with `s B A = U S V^T`, the singular values split evenly."""
    root = (triplets.S / scaling).sqrt()
    a, b = root.unsqueeze(-1) * triplets.Vh, triplets.U * root
    return LoraFactors(a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous())


def relative_error(triplets: RandomizedSVD) -> float:
    """The bound on what is left beside the triplets, of the largest singular value; 0 for a full decomposition."""
    largest = float(triplets.S[0])
    return 0.0 if triplets.error is None or largest <= 0 else float(triplets.error) / largest


@dataclass(frozen=True)
class PiSSA:
    """`s B A` = the r leading singular triplets of W, split evenly; the function is kept.

    Args:
        n_iter: rounds of the randomized SVD, whose error bound the report carries; `None` for the full one.

    Raises:
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "pissa"
    wants: ClassVar[Mapping[str, bool]] = MappingProxyType({})
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    offsets_base: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False

    n_iter: int | None = 4

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.n_iter is not None:
            check_range("n_iter", self.n_iter, low=0, integer=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002  (no data is read)
        """Columns that a sketch should have: none is read."""
        return 1

    def factors(
        self,
        statistics: Statistics,  # noqa: ARG002  (no data is read)
        ranks: Mapping[str, int],
        *,
        base: Mapping[str, BaseLayer] | None = None,
        progress: bool = False,
    ) -> dict[str, LayerFactors]:
        """The factors of every layer.

        Args:
            statistics: not read.
            ranks: the rank of each layer.
            base: the base weights.
            progress: show a progress bar.

        Returns:
            Per layer its factors; `residual` is the bound on the spectral norm of the weight beside them, relative to
            the largest singular value (0 for the full decomposition).

        Raises:
            ValueError: if the base weights are missing, or a rank is outside [1, min(m, n)].
        """
        if base is None:
            raise ValueError("base is None, but PiSSA reads the base weights")
        with tqdm(total=len(ranks), desc="decomposing weights", unit="layer", disable=not progress, leave=False) as bar:

            def solve(name: str) -> LayerFactors:
                weight = base[name].weight()
                offers({name: ranks[name]}, {name: min(weight.shape)}, rho=1.0)
                triplets = leading(weight, ranks[name], self.n_iter)
                bar.update()
                factors = split(triplets, base[name].scaling)
                return LayerFactors(factors, math.nan, relative_error(triplets), triplets.method)

            device = next((base[name].weight().device for name in ranks), torch.device("cpu"))
            return share_out(ranks, solve, device)
