"""CorDA: singular components of the base weight as the data sees it (arXiv 2406.05223)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from lora_kernels._checks import check_choice, check_range
from lora_kernels.init._layers import balanced, base_layer, check_rank, finite
from lora_kernels.init.factors import BaseLayer, LayerFactors
from lora_kernels.linalg.randomized_svd import LinearOperator, fix_pair, randomized_svd
from lora_kernels.runtime.processes import share_out
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.store import LayerStatistics, Statistics
from lora_kernels.statistics.wants import METHOD_WANTS

MODES = ("instruction_previewed", "knowledge_preserved")
# A failed Cholesky raises the damping tenfold, from here if there was none.
_LEAST_DAMPING = 1e-12


@dataclass(frozen=True)
class CorDA:
    """`U S V^T = W C` with C the damped second moment of the inputs; B = `U sqrt(S / s)`, A = `sqrt(S / s) V^T C^-1`.

    C is the mean over tokens of `x x^T`, not centred. Its scale only moves weight between A and B: `s B A` does not
    depend on it. `residual` is, for `instruction_previewed`, an upper bound on the spectral norm of what the components
    leave of `W C`, relative to that of `W C`; for `knowledge_preserved` the largest `|W C v - S u|` on the same scale.

    All of it is float64: of the smallest components float32 (and PEFT, which uses it) leaves little but rounding once
    `W C` is ill conditioned. Sums in float64 (`CollectOptions.dtype`) sharpen them further.

    Args:
        mode: `instruction_previewed` trains the r largest components, `knowledge_preserved` the r smallest.
        damping: what is added to the diagonal of C, as a multiple of its mean; raised, with a note, where C is then
            still not positive definite.
        n_iter: rounds of the randomized decomposition that finds the largest components; the smallest need the full
            one.
        seed: of its random start.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "corda"
    wants: ClassVar[Mapping[str, bool]] = METHOD_WANTS["corda"]
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True
    adjust_scaling_factors: ClassVar[bool] = False
    collect_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    mode: str = "instruction_previewed"
    damping: float = 0.01
    n_iter: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the choice and the ranges."""
        check_choice("mode", self.mode, MODES)
        check_range("damping", self.damping, low=0.0, high=torch.finfo(torch.float32).max)
        check_range("n_iter", self.n_iter, low=0, integer=True)

    def sketch_size(self, ranks: Sequence[int]) -> int:  # noqa: ARG002  (no sketch is read)
        """Columns that a sketch should have: one, as only the exact second moment will do."""
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
            statistics: of all layers named in `ranks`, with exact input moments.
            ranks: the rank of each layer.
            base: weight and scaling of each layer.
            progress: show a progress bar.

        Returns:
            Per layer its factors.

        Raises:
            ValueError: if a layer has no exact second moment or saw no token or only zeros, no base or no positive
                scaling, entries that are not finite, or a rank outside [1, min(m, n)].
        """
        layers = {name: base_layer(base, name, "CorDA") for name in ranks}
        groups: dict[int, list[str]] = defaultdict(list)  # of layers that read the same tensor
        first: dict[int, int] = {}
        for index, (name, rank) in enumerate(ranks.items()):
            sums = statistics[name].input if name in statistics else None
            if not isinstance(sums, InputMoments):
                raise ValueError(
                    f"layer {name} has no exact second moment of its input: collect it with CorDA(), or with "
                    'wants={"input_second": True}'
                )
            if sums.tokens <= 0:
                raise ValueError(f"layer {name} saw no token in the collection pass")
            check_rank(name, rank, min(statistics[name].in_features, statistics[name].out_features))
            groups[first.setdefault(id(sums), index)].append(name)
        if not groups:
            return {}

        with tqdm(total=len(ranks), desc="decomposing", unit="layer", disable=not progress, leave=False) as bar:

            def solve(key: int) -> dict[str, LayerFactors]:
                names = groups[key]
                second, lower, notes = self._second(names[0], statistics[names[0]])
                found = {}
                for name in names:
                    weight = self._weight(statistics[name], layers[name], second.device)
                    found[name] = self._layer(weight, second, lower, ranks[name], layers[name].scaling, notes)
                    bar.update()
                return found

            def weigh(key: int) -> float:
                outputs = [statistics[name].out_features for name in groups[key]]
                size = statistics[groups[key][0]].in_features
                return float(size * size * (size + sum(outputs)))

            # The processes of a distributed run share the inputs out and exchange the factors.
            parts = share_out(groups, solve, _moments(statistics[next(iter(ranks))]).second.device, weigh)
        merged = {name: answer for part in parts.values() for name, answer in part.items()}
        return {name: merged[name] for name in ranks}

    def _second(self, name: str, layer: LayerStatistics) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
        """C, its Cholesky factor, and what happened to the damping."""
        second = finite("second moment of the input", name, _moments(layer).covariance(center=False))
        size = float(second.diagonal().mean())
        if size <= 0:
            raise ValueError(f"the input of layer {name} is always zero: its second moment says nothing")
        diagonal = second.diagonal().clone()
        damping = float(self.damping)
        while True:
            second.diagonal().copy_(diagonal + damping * size)
            lower, info = torch.linalg.cholesky_ex(second)
            if not int(info):
                break
            damping = max(10 * damping, _LEAST_DAMPING)
        raised = damping > self.damping
        return second, lower, (f"damping raised to {damping:g}: C was not positive definite",) if raised else ()

    def _weight(self, layer: LayerStatistics, base: BaseLayer, device: torch.device) -> torch.Tensor:
        weight = finite("base weight", layer.name, base.weight()).to(device, torch.float64)
        if weight.shape != (layer.out_features, layer.in_features):
            expected = (layer.out_features, layer.in_features)
            raise ValueError(f"the base weight of layer {layer.name} is {tuple(weight.shape)}, but must be {expected}")
        return weight

    def _layer(
        self,
        weight: torch.Tensor,
        second: torch.Tensor,
        lower: torch.Tensor,
        rank: int,
        scaling: float,
        notes: tuple[str, ...],
    ) -> LayerFactors:
        if self.mode == "instruction_previewed":
            # W C itself is never formed: a few thin products are far cheaper.
            product = LinearOperator(
                tuple(weight.shape),
                lambda x: weight @ (second @ x),
                lambda y: second @ (weight.mT @ y),
                torch.float64,
                weight.device,
            )
            found = randomized_svd(product, rank, n_iter=self.n_iter, seed=self.seed)
            u, s, v, top = found.U, found.S, found.Vh.mT, float(found.S[0])
            assert found.error is not None  # probes are drawn
            residual, solver = float(found.error), found.method
        else:
            matrix = weight @ second
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            top = float(s[0])
            # Below rounding a singular value is zero.
            s = torch.where(s > max(matrix.shape) * torch.finfo(s.dtype).eps * top, s, 0.0)[-rank:]
            u, v = fix_pair(u[:, -rank:], vh[-rank:].mT)
            residual, solver = float((matrix @ v - u * s).norm(dim=0).max()), "svd"
        factors, said = balanced(u, s, torch.cholesky_solve(v, lower).mT, scaling)
        return LayerFactors(factors, math.nan, residual / top if top > 0 else 0.0, solver, notes + said)


def _moments(layer: LayerStatistics) -> InputMoments:
    assert isinstance(layer.input, InputMoments)  # checked by `factors`
    return layer.input
