"""CorDA: singular components of the base weight as the data sees it (arXiv 2406.05223)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_choice, check_range
from lora_kernels.init.method import InputwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem, balanced, stock_start
from lora_kernels.linalg.cholesky import damped_cholesky
from lora_kernels.linalg.randomized_svd import LinearOperator, fix_pair, randomized_svd
from lora_kernels.statistics.sums import INPUT_SECOND

MODES = ("instruction_previewed", "knowledge_preserved")
# A failed Cholesky raises the damping tenfold, from here if there was none.
_LEAST_DAMPING = 1e-12


@dataclass(frozen=True)
class CorDA(InputwiseMethod):
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
    wants: ClassVar[Mapping[str, bool]] = {INPUT_SECOND: True}
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    full_rate: ClassVar[bool] = True

    mode: str = "instruction_previewed"
    damping: float = 0.01
    n_iter: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_range("damping", self.damping, low=0.0, high=torch.finfo(torch.float32).max)
        check_range("n_iter", self.n_iter, low=0, integer=True)

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the components of every weight that reads one input."""
        second = layers[0].mean(INPUT_SECOND)
        size = float(second.diagonal().mean())
        if size <= 0:
            yield from (stock_start(layer, "its input is always zero") for layer in layers)
            return
        start = self.damping * size
        what = f"the second moment of the input of layer {layers[0].name}"
        lower, damping = damped_cholesky(second, start, least=_LEAST_DAMPING * size, what=what)
        raised = f"damping raised to {damping / size:g}: C was not positive definite"
        notes = (raised,) if damping > start else ()
        for layer in layers:
            weight = layer.weight().to(second)
            if self.mode == "instruction_previewed":
                triplets = randomized_svd(_product(weight, second), layer.rank, n_iter=self.n_iter, seed=self.seed)
                u, s, v, top = triplets.U, triplets.S, triplets.Vh.mT, float(triplets.S[0])
                error, solver = float(triplets.error), triplets.method
            else:
                matrix = weight @ second
                u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
                top, solver = float(s[0]), "svd"
                # Below rounding a singular value is zero.
                s = torch.where(s > max(matrix.shape) * torch.finfo(s.dtype).eps * top, s, 0.0)[-layer.rank :]
                u, v = fix_pair(u[:, -layer.rank :], vh[-layer.rank :].mT)
                error = float((matrix @ v - u * s).norm(dim=0).max())
            factors, said = balanced(u, s, torch.cholesky_solve(v, lower).mT, layer.scaling)
            residual = error / top if top > 0 else 0.0
            yield LayerFactors(factors, residual=residual, solver=solver, notes=notes + said)


def _product(weight: torch.Tensor, second: torch.Tensor) -> LinearOperator:
    """`W C`, which is never formed: a few thin products are far cheaper."""

    def transposed(y: torch.Tensor) -> torch.Tensor:
        return second @ (weight.mT @ y)

    shape = tuple(weight.shape)
    return LinearOperator(shape, lambda x: weight @ (second @ x), transposed, weight.dtype, weight.device)
