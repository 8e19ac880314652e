"""LoRA-DA: data-aware initialisation by asymptotic analysis (arXiv 2510.24561)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lora_kernels._checks import check_choice, check_positive, check_range
from lora_kernels.init.curvature import WANTS, InputMetric, descent_step
from lora_kernels.init.method import InputwiseMethod
from lora_kernels.init.problem import LayerFactors, LayerProblem, as_factors
from lora_kernels.linalg import LinearOperator, TopEigenpairs, eigh_topk
from lora_kernels.linalg.eigen import DIRECT_ORDER
from lora_kernels.linalg.randomized_svd import fix_pair
from lora_kernels.ops.small_linalg.reference import fix_signs
from lora_kernels.statistics.store import Statistics
from lora_kernels.statistics.sums import FISHER

# Our names of the authors' token masks.
_MASKS = {"attention": "attention", "labels": "next_labels"}
# Gains below this share of the largest are rounding.
_NO_GAIN = 1e-13
# A Rayleigh quotient errs by the square of its vector's residual.
_NORM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LoraDA(InputwiseMethod):
    """A = the directions that gain most from a Fisher-preconditioned step, against their variance; B = that step in A.

    With `C = M / N + damping I` (raw second moment of the input), `f` the mean squared output gradients, `G` the mean
    gradient over samples and `w = 1 / (f + damping)`: `D = -C^{-1} G^T diag(w)`, and the rows of A are the eigenvectors
    of the smallest eigenvalues of `-bias_weight D D^T + variance_weight (sum w / population_size) C^{-1}`, and
    `B = (A D)^T / |D|_2`, both over `sqrt(gamma)`. The base weight stays as it is, so the model starts one step on.
    All in float64.

    Args:
        bias_weight: of the first term, above 0.
        variance_weight: of the second term; with 0 the rows of A are the leading left singular vectors of D.
        damping: of C and of f.
        gamma: both factors are divided by its square root.
        population_size: number of samples of the training set; by default the number of samples read.
        normalize: divide D (and so B) by its largest singular value.
        token_mask: which rows count in C and f: `attention`, or `labels`: positions whose next label counts.
        output_damping_ratio: dampen f by this share of its (lower) median instead of `damping`.
        normalize_variance: give the second term the Frobenius norm of the first one, before `variance_weight`; forms
            the inverse of C.
        balance_factors: split the singular values of B evenly between A and B; A's rows are then not orthogonal.

    Raises:
        TypeError: if a numeric argument is not a number.
        ValueError: if a value is out of range.
    """

    name: ClassVar[str] = "lora_da"
    wants: ClassVar[Mapping[str, bool]] = WANTS
    moves_function: ClassVar[bool] = True

    bias_weight: float = 1.0
    variance_weight: float = 0.03
    damping: float = 1e-6
    gamma: float = 1024.0
    population_size: int | None = None
    normalize: bool = True
    token_mask: str = "attention"
    output_damping_ratio: float | None = None
    normalize_variance: bool = False
    balance_factors: bool = False

    def __post_init__(self) -> None:
        for name in ("bias_weight", "damping", "gamma"):
            check_positive(name, getattr(self, name))
        if self.output_damping_ratio is not None:
            check_positive("output_damping_ratio", self.output_damping_ratio)
        check_range("variance_weight", self.variance_weight, low=0)
        check_choice("token_mask", self.token_mask, tuple(_MASKS))
        check_range("population_size", self.population_size, low=1, integer=True, optional=True)

    @property
    def collect_options(self) -> Mapping[str, Any]:
        """The authors' loop over single samples, whatever the batch size."""
        return {"weighting": "sample", "mask": _MASKS[self.token_mask]}

    def for_samples(self, count: int) -> LoraDA:
        """The same method with this population size, if it has none."""
        return replace(self, population_size=count) if self.population_size is None else self

    def solve_all(self, layers: Mapping[str, LayerProblem]) -> dict[str, LayerFactors]:
        """The factors of all layers; a warning says where statistics were not collected with `collect_options`."""
        statistics = next(iter(layers.values())).collection
        if isinstance(statistics, Statistics):
            self._warn_of_conventions(statistics)
        if self.population_size is not None:
            return super().solve_all(layers)
        count = statistics.samples if isinstance(statistics, Statistics) else 0
        if count < 1:
            raise ValueError("statistics count no samples: give population_size, the size of the training set")
        return super(LoraDA, self.for_samples(count)).solve_all(layers)

    def remarks(self, statistics: Statistics) -> tuple[str, ...]:
        """That the population was left open, where it counts."""
        if self.population_size is not None or self.variance_weight == 0 or self.normalize_variance:
            return ()
        return (f"population_size was left open: taken as the {statistics.samples} samples read",)

    def _warn_of_conventions(self, statistics: Statistics) -> None:
        used = statistics.fingerprint.get("options", {})
        other = [
            f"{key}={used[key]!r} instead of {value!r}"
            for key, value in self.collect_options.items()
            if key in used and used[key] != value
        ]
        if other:
            warnings.warn(f"statistics were collected with {', '.join(other)}", RuntimeWarning, stacklevel=4)

    def solve(self, layers: Sequence[LayerProblem]) -> Iterator[LayerFactors]:
        """Yield the factors of the layers that read one input."""
        metric = InputMetric.of(layers[0], self.damping)
        for layer in layers:
            yield self._layer(layer, metric)

    def _layer(self, layer: LayerProblem, metric: InputMetric) -> LayerFactors:
        rank, notes = layer.rank, list(metric.notes)
        inverse = self._inverse_fisher(layer, notes).to(metric.lower.device)
        step = descent_step(layer, metric, inverse)
        variance = self._variance(step, inverse, metric)
        pairs = _pairs(step, rank, self.bias_weight, variance, metric)
        gains = int((pairs.values > _NO_GAIN * pairs.values[0].abs()).sum())
        if gains < rank:
            notes.append(f"only {gains} of {rank} directions gain more than their variance costs")
        a = pairs.vectors.mT
        b = step.mT @ pairs.vectors
        if self.normalize:
            b /= _spectral_norm(step) if variance > 0 else (pairs.values[0] / self.bias_weight).sqrt()
        if self.balance_factors:
            u, s, vh = torch.linalg.svd(b, full_matrices=False)
            u, v = fix_pair(u, vh.mT)
            b, a = u * s.sqrt(), s.sqrt().unsqueeze(-1) * (v.mT @ a)
        factors = as_factors(a / math.sqrt(self.gamma), b / math.sqrt(self.gamma))
        explained = metric.explained(pairs.vectors)
        return LayerFactors(factors, explained, float(pairs.residuals), pairs.method, tuple(notes))

    def _inverse_fisher(self, layer: LayerProblem, notes: list[str]) -> torch.Tensor:
        mean = layer.mean(FISHER)
        if self.output_damping_ratio is None:
            return 1.0 / (mean + self.damping)
        median = float(mean.median())
        if median <= 0:
            notes.append("half of the Fisher diagonal is zero: so is its median, which was to dampen it")
        return 1.0 / (mean + max(self.output_damping_ratio * median, torch.finfo(torch.float32).tiny))

    def _variance(self, step: torch.Tensor, inverse: torch.Tensor, metric: InputMetric) -> float:
        """The factor of `C^{-1}`, for a D that is not normalised: the eigenvectors are the same."""
        if self.variance_weight == 0:
            return 0.0
        if not self.normalize_variance:
            assert self.population_size is not None  # `factors` has filled it in
            return self.variance_weight * float(inverse.sum()) / self.population_size
        thin = _thin(step)
        bias = self.bias_weight * float(torch.linalg.norm(thin @ thin.mT))
        return self.variance_weight * bias / float(torch.linalg.norm(metric.inverse))


def _thin(step: torch.Tensor) -> torch.Tensor:
    """D or its transpose, whichever has fewer rows: its Gram matrix is the smaller one."""
    return step if step.shape[0] <= step.shape[1] else step.mT


def _gram(step: torch.Tensor) -> LinearOperator:
    """The smaller one of `D D^T` and `D^T D`."""
    thin = _thin(step)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return thin @ (thin.mT @ x)

    return LinearOperator((thin.shape[0], thin.shape[0]), apply, apply, step.dtype, step.device)


def _spectral_norm(step: torch.Tensor) -> torch.Tensor:
    if min(step.shape) > DIRECT_ORDER:
        return eigh_topk(_gram(step), 1, tolerance=_NORM_TOLERANCE).values[0].sqrt()
    thin = _thin(step)
    largest: torch.Tensor = torch.linalg.eigvalsh(thin @ thin.mT)[-1]  # far cheaper than all singular values
    return largest.sqrt()


def _pairs(step: torch.Tensor, rank: int, bias: float, variance: float, metric: InputMetric) -> TopEigenpairs:
    """The largest eigenpairs of `bias D D^T - variance C^{-1}`, a matrix that is only multiplied with."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        product = step @ (step.mT @ x)
        return bias * product - variance * metric.solve_thin(x) if variance > 0 else bias * product

    n, m = step.shape
    if variance > 0 or (n <= m and n > DIRECT_ORDER):
        return eigh_topk(LinearOperator((n, n), apply, apply, step.dtype, step.device), rank)
    if min(n, m) <= DIRECT_ORDER:
        u, s, _ = torch.linalg.svd(step, full_matrices=False)
        values, vectors, method = bias * s[:rank].square(), u[:, :rank], "svd"
    else:
        pairs = eigh_topk(_gram(step), rank)
        values, method = bias * pairs.values, pairs.method
        vectors = torch.linalg.qr(step @ pairs.vectors).Q
    vectors = fix_signs(vectors)
    error = torch.linalg.vector_norm(apply(vectors) - vectors * values, dim=0).amax() / values[0]
    return TopEigenpairs(values, vectors, error, method)
