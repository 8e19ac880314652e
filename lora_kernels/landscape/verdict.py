"""Whether training ended well: a verdict, with the numbers and thresholds that decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_kernels._checks import check_range, check_type
from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.spectra import RANK_TOLERANCE, Spectrum

LOW_RANK_MINIMUM = "low_rank_minimum"
STILL_TRAINING = "still_training"
RANK_LIMITED = "rank_limited"
LOUD_FAILURE = "loud_failure"
NOT_JUDGED = "not_judged"
KINDS = (LOW_RANK_MINIMUM, STILL_TRAINING, RANK_LIMITED, LOUD_FAILURE, NOT_JUDGED)
# The verdict on a model is the first of these that one of its layers has.
WORST_FIRST = (LOUD_FAILURE, STILL_TRAINING, NOT_JUDGED, RANK_LIMITED, LOW_RANK_MINIMUM)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the verdict; `benchmarks/results/landscape.json` has the runs that they were chosen from.

    Attributes:
        rank_tolerance: share of the largest singular value below which one does not count towards the rank.
        stationarity: largest `Certificate.stationarity` of a stationary point.
        ratio: largest excess of `s |G|_2 / lambda` over 1 at a minimum.
        alignment: largest `Certificate.alignment` at a minimum.
        full_rank: smallest share of the adapter's rank at which the numerical rank counts as full.
        loud_share: smallest `|s B A|_2 / |W|_2` at which an update counts as large whatever the gradient is: the
            geometric mean of the largest share in a sound run of MiniLM-L6 and the smallest at 100 times its rate.

    Raises:
        TypeError: if a threshold is not a number.
        ValueError: if a threshold is out of range.
    """

    rank_tolerance: float = RANK_TOLERANCE
    stationarity: float = 0.05
    ratio: float = 0.05
    alignment: float = 0.05
    full_rank: float = 1.0
    loud_share: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_range(name, value, low=0.0, high=1.0 if name in ("rank_tolerance", "full_rank") else None)


@dataclass(frozen=True)
class Verdict:
    """A verdict.

    Attributes:
        kind: one of `KINDS`. `low_rank_minimum`: the optimality conditions are met. `loud_failure`: the update uses the
            adapter's whole rank and is large, either at a stationary point that is not a minimum, or above
            `loud_share` anywhere; or the factors are not finite. `rank_limited`: such a stationary point, but not
            large: with this decay a larger rank would reach a lower loss. `still_training`: not stationary, or at a
            saddle. `not_judged`: the numbers that would decide were not given.
        reasons: the numbers and thresholds that decided, in words.
    """

    kind: str
    reasons: tuple[str, ...]


def judge(spectrum: Spectrum, certificate: Certificate | None = None, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict on one layer.

    Args:
        spectrum: its measurement.
        certificate: its optimality conditions; without them only a loud failure can be detected.
        thresholds: of the verdict.

    Raises:
        TypeError: if an argument has the wrong type.
    """
    check_type("spectrum", spectrum, Spectrum, "a Spectrum")
    check_type("certificate", certificate, (Certificate, type(None)), "a Certificate or None")
    check_type("thresholds", thresholds, (Thresholds, type(None)), "Thresholds or None")
    limits = thresholds or Thresholds()
    if spectrum.status == "not_finite":
        return Verdict(LOUD_FAILURE, ("the factors hold NaN or infinite entries",))
    rank = sum(value > limits.rank_tolerance * spectrum.spectral for value in spectrum.values)
    usable = spectrum.usable_rank
    full = usable > 0 and rank >= limits.full_rank * usable
    ranks = f"numerical rank {rank} of {usable} (tolerance {limits.rank_tolerance:g})"
    share = spectrum.spectral_share
    sizes = [] if share is None else [f"|s B A|_2 is {share:.3g} of |W|_2"]
    facts = () if certificate is None else _facts(certificate, limits)
    if certificate is not None and certificate.stationarity <= limits.stationarity:
        error = 0.0 if certificate.alignment is None else certificate.alignment + certificate.alignment_error
        if certificate.ratio_high <= 1 + limits.ratio and error <= limits.alignment:
            note = ("the whole rank is in use: a larger r may go lower",) if full else ()
            return Verdict(LOW_RANK_MINIMUM, (*facts, ranks, *sizes, *note))
        if full and certificate.ratio_low > 1 + limits.ratio:
            return _stuck(certificate, limits, share, (*facts, ranks, *sizes))
    if full and share is not None and not share < limits.loud_share:
        return Verdict(LOUD_FAILURE, (ranks, f"{sizes[0]}, at least {limits.loud_share:g}"))
    if certificate is None:
        reason = "no weight decay or no data was given: minima cannot be distinguished from other points"
        return Verdict(NOT_JUDGED, (ranks, *sizes, reason))
    return Verdict(STILL_TRAINING, (*facts, ranks))


def _facts(certificate: Certificate, limits: Thresholds) -> tuple[str, ...]:
    facts = [
        f"stationarity {certificate.stationarity:.3g} (at a stationary point at most {limits.stationarity:g})",
        f"s |G|_2 / lambda = {certificate.ratio:.4g}, within [{certificate.ratio_low:.4g}, "
        f"{certificate.ratio_high:.4g}] (at a minimum at most {1 + limits.ratio:g})",
    ]
    if certificate.alignment is not None:
        facts.append(f"alignment error {certificate.alignment:.3g} (at a minimum at most {limits.alignment:g})")
    return tuple(facts)


def _stuck(certificate: Certificate, limits: Thresholds, share: float | None, facts: tuple[str, ...]) -> Verdict:
    """The verdict on a stationary point of full rank that is not a minimum."""
    facts = (*facts, "stationary at full rank, and not a minimum")
    cost, gain = certificate.cost, certificate.gain
    if gain is not None:
        facts = (*facts, f"its decay costs {cost:.3g}, and all updates together gain {gain:.3g} in loss")
        if cost > gain:
            return Verdict(LOUD_FAILURE, (*facts, "large: zero would be lower"))
    if share is not None and not share < limits.loud_share:
        return Verdict(LOUD_FAILURE, (*facts, f"large: at least {limits.loud_share:g} of the weight"))
    if gain is None:
        reason = "without the losses with and without it, a small rank cannot be distinguished from a large update"
        return Verdict(NOT_JUDGED, (*facts, reason))
    return Verdict(RANK_LIMITED, (*facts, "a larger rank would go lower with this decay"))


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a model: the first of `WORST_FIRST` that one of its layers has.

    Args:
        verdicts: of its layers.

    Raises:
        TypeError: if an entry is not a `Verdict`.
    """
    check_type("verdicts", verdicts, Iterable, "verdicts")
    kinds = []
    every: Any = [verdicts] if hasattr(verdicts, "dtype") else verdicts  # tensors and arrays are iterable, too
    for verdict in every:
        check_type("verdicts", verdict, Verdict, "verdicts")
        kinds.append(verdict.kind)
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    reasons = (f"{len(kinds)} layers: {counts}",) if kinds else ("no layer",)
    return Verdict(next((kind for kind in WORST_FIRST if kind in kinds), NOT_JUDGED), reasons)
