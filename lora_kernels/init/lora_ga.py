"""LoRA-GA: the first step of the adapter along the gradient of full fine-tuning (arXiv 2407.05000)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from lora_kernels.init.factors import BaseLayer, LayerFactors, LoraFactors
from lora_kernels.init.pissa import relative_error
from lora_kernels.init.ranks import offers
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.ops._checks import check_choice, check_range
from lora_kernels.statistics.distributed import share_out
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.wants import METHOD_WANTS

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd", "unit")


@dataclass(frozen=True)
class LoraGA:
    """A and B = different singular directions of the weight gradient, so that both learn from the first step on.

    With `G = U S V^T`, the gradient of the mean loss: A takes r rows of `V^T` and B r columns of `U S`, out of the 2 r
    leading ones. The function is kept (see `initialize(base=...)`). As PEFT's, up to the averaging of batches: G is the
    mean over items (tokens), not over batches.

    Args:
        direction: which go where. `ArB2r`: A the first r, B the next r. `A2rBr`: the reverse. `ArBr`: B the odd ones, A
            the even ones (counted from 1). `random`: r of them at random, the same for both.
        scale: of B. `stable`: `m^(1/4) / sqrt(gamma)`. `weight_svd`: its first singular value becomes that of W. `gd`:
            both factors over s. `unit`: 1.
        gamma: see `scale`.
        seed: of `random`.

    Raises:
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "lora_ga"
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["lora_ga"]
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    offsets_base: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False

    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_range("gamma", self.gamma, low=0.0)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma!r}, but must be above 0 and finite")

    def sketch_size(self, ranks: Sequence[int]) -> int:
        """Columns that a sketch should have: twice the triplets that are read."""
        return 4 * max(ranks, default=1)

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
            statistics: weight gradients, exact or sketched.
            ranks: the rank of each layer.
            base: the scalings, and the base weights for `scale="weight_svd"`.
            progress: show a progress bar.

        Returns:
            Per layer its factors; `residual` is the bound on the spectral norm of G beside its 2 r triplets, relative
            to the largest singular value.

        Raises:
            ValueError: if statistics or base are missing, a gradient is zero or not finite, or 2 r exceeds min(m, n).
        """
        if base is None:
            raise ValueError("base is None, but LoRA-GA reads the scalings")
        limits = {name: min(statistics[name].in_features, statistics[name].out_features) // 2 for name in ranks}
        offers(ranks, limits, rho=1.0)
        with tqdm(total=len(ranks), desc="decomposing", unit="layer", disable=not progress, leave=False) as bar:

            def solve(name: str) -> LayerFactors:
                triplets = self._triplets(statistics, name, 2 * ranks[name])
                bar.update()
                factors = self._factors(triplets, ranks[name], base[name], name)
                return LayerFactors(factors, math.nan, relative_error(triplets), triplets.method)

            sums = next((statistics[name].output for name in ranks), None)
            return share_out(ranks, solve, torch.device("cpu") if sums is None else sums.count.device)

    def _triplets(self, statistics: Statistics, name: str, count: int) -> RandomizedSVD:
        output = statistics[name].output
        if output is None or (output.gradient is None and output.sketch is None):
            raise ValueError(f'layer {name} has no weight gradient: collect(wants="lora_ga") keeps it')
        if output.gradient is not None:
            triplets = randomized_svd(statistics.mean_gradient(name), count)
        else:
            assert output.sketch is not None  # checked above
            triplets = output.sketch.svd(count, scale=1.0 / statistics.loss_items)
        if not float(triplets.S[0]) > 0:
            raise ValueError(f"the weight gradient of layer {name} is zero: the loss does not depend on it")
        return triplets

    def _factors(self, triplets: RandomizedSVD, rank: int, layer: BaseLayer, name: str) -> LoraFactors:
        first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
        if self.direction == "ArB2r":
            rows, columns = first, second
        elif self.direction == "A2rBr":
            rows, columns = second, first
        elif self.direction == "ArBr":
            rows, columns = 2 * first + 1, 2 * first
        else:
            generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
            rows = columns = torch.randperm(2 * rank, generator=generator)[:rank]
        rows, columns = rows.to(triplets.S.device), columns.to(triplets.S.device)
        a, size = triplets.Vh[rows], triplets.S[columns]
        b = triplets.U[:, columns] * size
        if self.scale == "stable":
            b = b * (b.shape[0] ** 0.25 / math.sqrt(self.gamma))
        elif self.scale == "weight_svd":
            largest = float(randomized_svd(layer.weight(), 1).S[0])
            b = b * (largest / float(size[0])) if float(size[0]) > 0 else b
        elif self.scale == "gd":
            a, b = a / layer.scaling, b / layer.scaling
        return LoraFactors(a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous())
