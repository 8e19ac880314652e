"""Whether an adapter is a minimum: the optimality conditions of the nuclear-norm problem, checked with the gradient.

With `F(A, B) = loss(W + s B A) + (lambda / 2)(|A|_F^2 + |B|_F^2)`, the decay is `(lambda / s) |s B A|_*` on the update
at every balanced point, and an update D minimises `loss + (lambda / s) |D|_*` in the region where the loss is convex if
and only if `|G|_2 <= lambda / s` with `U^T G V = -(lambda / s) I` on D's singular directions (arXiv 2502.09376; G is
the gradient of the loss with respect to the whole weight, at the adapted point).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_kernels._checks import check_number, check_range, check_type
from lora_kernels.landscape.spectra import Adapter, Spectrum, directions
from lora_kernels.linalg.spectral_norm import spectral_norm
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.statistics.sums import Gradient

OBJECTIVE = (
    "mean loss over the data given + (lambda / 2)(|A|_F^2 + |B|_F^2), the decay in the loss (L2) as in SGD or Adam "
    "with weight_decay; AdamW's decoupled decay minimises no such sum and only resembles it"
)


@dataclass(frozen=True)
class Certificate:
    """The optimality conditions of one layer, the others held fixed.

    Attributes:
        objective: what is certified, in words.
        weight_decay: lambda.
        threshold: `lambda / |s|`, the largest `|G|_2` at a minimum.
        gradient_norm: `|G|_2`, the best estimate.
        gradient_norm_low: a lower bound on it, up to rounding.
        gradient_norm_high: an upper bound, with probability `linalg.randomized_svd.CONFIDENCE` where it is not exact.
        source: `exact`, or `sketch` where G was reconstructed from random sketches.
        directions: number of singular directions of the update that were checked, its numerical rank.
        alignment: `|U^T G V + (lambda / s) I|_2 s / lambda` on them, `None` if the update is zero.
        alignment_error: a bound on the sketch's part in it, relative in the same way; 0 if G is exact.
        stationarity: length of F's gradient with respect to both factors over `lambda (|A|_F^2 + |B|_F^2)^(1/2)`: 0
            at a stationary point, about 1 or more where loss and decay do not balance. 0 where both factors are zero.
        implied_weight_decay: the lambda at which the factors are closest to stationary. Far from the one given, this is
            not the objective that was trained; negative while the factors grow.
        cost: `(lambda / s) |s B A|_*`, the decay's part of the objective if the factors are balanced.
        gain: mean loss without the adapter's update (of all layers) minus that with it, if it was measured. At a
            minimum the cost is at most the gain: otherwise zero would be lower.
    """

    derived: ClassVar[tuple[str, ...]] = ("ratio", "ratio_low", "ratio_high")

    objective: str
    weight_decay: float
    threshold: float
    gradient_norm: float
    gradient_norm_low: float
    gradient_norm_high: float
    source: str
    directions: int
    alignment: float | None
    alignment_error: float
    stationarity: float
    implied_weight_decay: float | None
    cost: float
    gain: float | None = None

    @property
    def ratio(self) -> float:
        """`s |G|_2 / lambda`: 1 at a minimum that is not zero, below 1 if zero is the minimum, never above 1 at one."""
        return self.gradient_norm / self.threshold

    @property
    def ratio_low(self) -> float:
        """The same with the lower bound."""
        return self.gradient_norm_low / self.threshold

    @property
    def ratio_high(self) -> float:
        """The same with the upper bound."""
        return self.gradient_norm_high / self.threshold


@without_autocast()
def certify(
    adapter: Adapter, spectrum: Spectrum, gradient: Gradient, weight_decay: float, gain: float | None = None
) -> Certificate:
    """Check the optimality conditions of one layer.

    Args:
        adapter: the factors, with finite entries.
        spectrum: their measurement.
        gradient: of the mean loss at `W + s B A`.
        weight_decay: lambda, above zero.
        gain: see `Certificate`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if lambda is not positive, the scaling is zero, shapes do not match, or an entry is not finite.
    """
    check_type("adapter", adapter, Adapter, "an Adapter")
    check_type("spectrum", spectrum, Spectrum, "a Spectrum")
    check_type("gradient", gradient, Gradient, "a Gradient")
    if gain is not None:
        check_number("gain", gain)
    check_range("weight_decay", weight_decay, low=0.0)
    if weight_decay == 0 or adapter.scaling == 0 or not math.isfinite(weight_decay):
        raise ValueError(
            f"layer {adapter.name} has weight_decay {weight_decay!r} and scaling {adapter.scaling!r}, "
            "but both must be finite and not zero for a certificate"
        )
    if gradient.shape != spectrum.shape:
        raise ValueError(
            f"the gradient of layer {adapter.name} has shape {gradient.shape}, but must have shape {spectrum.shape}"
        )
    parts = (("A", adapter.a), ("B", adapter.b), ("the gradient", gradient.left), ("the gradient", gradient.right))
    for what, part in parts:
        if part is not None and (part.device.type == "meta" or not bool(torch.isfinite(part).all())):
            raise ValueError(
                f"{what} of layer {adapter.name} has entries that are NaN or infinite, or no entries (meta)"
            )
    threshold = weight_decay / abs(adapter.scaling)
    if gradient.right is None:
        value, high = spectral_norm(gradient.left.detach())
        low = value
    else:
        value = float(torch.linalg.vector_norm(gradient.left, dim=0).max()) if gradient.left.numel() else 0.0
        low, high = max(0.0, value - gradient.error), value + gradient.error
    alignment = None
    if spectrum.numerical_rank:
        u, _, v = directions(adapter, spectrum.numerical_rank)
        core = u.mT @ gradient.times(v).to(u)
        eye = torch.eye(spectrum.numerical_rank, dtype=u.dtype, device=u.device)
        alignment = float(torch.linalg.matrix_norm(core / threshold + eye, 2))
    stationarity, implied = _stationarity(adapter, gradient, weight_decay)
    return Certificate(
        objective=OBJECTIVE,
        weight_decay=weight_decay,
        threshold=threshold,
        gradient_norm=value,
        gradient_norm_low=low,
        gradient_norm_high=high,
        source="exact" if gradient.right is None else "sketch",
        directions=spectrum.numerical_rank,
        alignment=alignment,
        alignment_error=gradient.error / threshold,
        stationarity=stationarity,
        implied_weight_decay=implied,
        cost=threshold * spectrum.nuclear,
        gain=gain,
    )


def _stationarity(adapter: Adapter, gradient: Gradient, weight_decay: float) -> tuple[float, float | None]:
    """Relative length of F's gradient with respect to the factors, and the decay that would minimise it."""
    a, b = adapter.a.detach().to(torch.float64), adapter.b.detach().to(torch.float64)
    of_a = adapter.scaling * gradient.transposed_times(b).to(a).mT
    of_b = adapter.scaling * gradient.times(a.mT).to(b)
    size = math.hypot(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    length = math.hypot(
        float(torch.linalg.vector_norm(of_a + weight_decay * a)),
        float(torch.linalg.vector_norm(of_b + weight_decay * b)),
    )
    if size == 0.0:
        return 0.0, None
    implied = -(float((of_a * a).sum()) + float((of_b * b).sum())) / size**2
    return length / (weight_decay * size), implied
