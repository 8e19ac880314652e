"""Did training end well? A verdict from the numbers, with the thresholds that decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from lora_kernels._checks import check_range, check_type, repr_short
from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.spectra import RANK_TOLERANCE, Spectrum

LOW_RANK_MINIMUM = "low_rank_minimum"
STILL_TRAINING = "still_training"
RANK_LIMITED = "rank_limited"
LOUD_FAILURE = "loud_failure"
NOT_JUDGED = "not_judged"
KINDS = (LOW_RANK_MINIMUM, STILL_TRAINING, RANK_LIMITED, LOUD_FAILURE, NOT_JUDGED)


@dataclass(frozen=True)
class Thresholds:
    """Where the verdict draws its lines: see `benchmarks/results/landscape.json` for what they were chosen from.

    Attributes:
        rank_tolerance: share of the largest singular value below which one does not count towards the rank.
        stationarity: largest `Certificate.stationarity` of a stationary point.
        ratio: how far `s |G|_2 / lambda` may exceed 1 at a minimum.
        alignment: largest `Certificate.alignment` at a minimum.
        full_rank: share of the adapter's rank from which on the numerical rank counts as full.
        loud_share: `|s B A|_2 / |W|_2` from which on an update is large whatever the gradient says: the geometric mean
            of the largest share in a sane run of MiniLM-L6 and the smallest at 100 times its learning rate.

    Raises:
        TypeError: if one is no number.
        ValueError: if one is out of range.
    """

    rank_tolerance: float = RANK_TOLERANCE
    stationarity: float = 0.05
    ratio: float = 0.05
    alignment: float = 0.05
    full_rank: float = 1.0
    loud_share: float = 30.0

    def __post_init__(self) -> None:
        """Check the values."""
        for each in fields(self):
            high = 1.0 if each.name in ("rank_tolerance", "full_rank") else None
            check_range(each.name, getattr(self, each.name), low=0.0, high=high)


@dataclass(frozen=True)
class Verdict:
    """A verdict.

    Attributes:
        kind: one of `KINDS`. `low_rank_minimum`: the certificate closes. `loud_failure`: an update that uses the
            adapter's whole rank and is large, at a stationary point that is no minimum, or large beyond measure at any
            point; or factors that are not finite. `rank_limited`: such a stationary point, but not large: with this
            decay a larger rank would go lower. `still_training`: not stationary, or at a saddle. `not_judged`: the
            numbers that would decide were not given.
        reasons: the numbers and thresholds that decided, in words.
    """

    kind: str
    reasons: tuple[str, ...]


def judge(spectrum: Spectrum, certificate: Certificate | None = None, thresholds: Thresholds | None = None) -> Verdict:
    """The verdict on one layer.

    Args:
        spectrum: its measurement.
        certificate: its optimality conditions; without them only a loud failure can be told.
        thresholds: where the lines are.

    Returns:
        The verdict.

    Raises:
        TypeError: if one of them is something else.
    """
    check_type("spectrum", spectrum, Spectrum, "a Spectrum")
    check_type("certificate", certificate, (Certificate, type(None)), "a Certificate or None")
    check_type("thresholds", thresholds, (Thresholds, type(None)), "Thresholds or None")
    limits = thresholds or Thresholds()
    if spectrum.status == "not_finite":
        return Verdict(LOUD_FAILURE, ("the factors hold NaN or infinite entries",))
    rank = sum(each > limits.rank_tolerance * spectrum.spectral for each in spectrum.values)
    usable = min(spectrum.rank, *spectrum.shape)
    full = usable > 0 and rank >= limits.full_rank * usable
    ranks = f"numerical rank {rank} of {usable} (tolerance {limits.rank_tolerance:g})"
    share = spectrum.spectral_share
    sizes = "" if share is None else f"|s B A|_2 is {share:.3g} of |W|_2"
    if certificate is not None:
        found = _by_certificate(certificate, limits, full, share, (ranks, *((sizes,) if sizes else ())))
        if found is not None:
            return found
    if full and share is not None and not share < limits.loud_share:
        return Verdict(LOUD_FAILURE, (ranks, f"{sizes}, at least {limits.loud_share:g}"))
    if certificate is None:
        told = "no weight decay or no data was given: minima cannot be told from other points"
        return Verdict(NOT_JUDGED, (ranks, *((sizes,) if sizes else ()), told))
    return Verdict(STILL_TRAINING, (*_facts(certificate, limits), ranks))


def _facts(certificate: Certificate, limits: Thresholds) -> tuple[str, ...]:
    facts = [
        f"stationarity {certificate.stationarity:.3g} (at a stationary point at most {limits.stationarity:g})",
        f"s |G|_2 / lambda = {certificate.ratio:.4g}, within [{certificate.ratio_low:.4g}, "
        f"{certificate.ratio_high:.4g}] (at a minimum at most {1 + limits.ratio:g})",
    ]
    if certificate.alignment is not None:
        facts.append(f"alignment error {certificate.alignment:.3g} (at a minimum at most {limits.alignment:g})")
    return tuple(facts)


def _by_certificate(
    certificate: Certificate, limits: Thresholds, full: bool, share: float | None, seen: tuple[str, ...]
) -> Verdict | None:
    """A minimum, or a stationary point of full rank that is not a minimum."""
    facts = _facts(certificate, limits)
    if not certificate.stationarity <= limits.stationarity:
        return None
    aligned = certificate.alignment is None or certificate.alignment + certificate.alignment_error <= limits.alignment
    if certificate.ratio_high <= 1 + limits.ratio and aligned:
        note = ("the whole rank is in use: a larger r may go lower",) if full else ()
        return Verdict(LOW_RANK_MINIMUM, (*facts, *seen, *note))
    if full and certificate.ratio_low > 1 + limits.ratio:
        return _stuck(certificate, limits, share, (*facts, *seen))
    return None


def _stuck(certificate: Certificate, limits: Thresholds, share: float | None, facts: tuple[str, ...]) -> Verdict:
    """At a stationary point of full rank that is no minimum: the rank is too small, or the update too large."""
    facts = (*facts, "stationary at full rank, and no minimum")
    cost, gain = certificate.cost, certificate.gain
    if gain is not None:
        facts = (*facts, f"its decay costs {cost:.3g}, and all updates together gain {gain:.3g} in loss")
        if cost > gain:
            return Verdict(LOUD_FAILURE, (*facts, "large: zero would be lower"))
    if share is not None and not share < limits.loud_share:
        return Verdict(LOUD_FAILURE, (*facts, f"large: at least {limits.loud_share:g} of the weight"))
    if gain is None:
        told = "whether the rank is too small or the update too large takes the losses with and without it"
        return Verdict(NOT_JUDGED, (*facts, told))
    return Verdict(RANK_LIMITED, (*facts, "a larger rank would go lower with this decay"))


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a model: loud where one layer is, a minimum where all layers are.

    Between them, the first of `still_training`, `not_judged` and `rank_limited` that a layer has.

    Args:
        verdicts: of its layers.

    Returns:
        The verdict, with the counts.

    Raises:
        TypeError: if one of them is no verdict.
    """
    check_type("verdicts", verdicts, Iterable, "verdicts")
    if hasattr(verdicts, "dtype"):  # a tensor, or an array, calls itself iterable
        raise TypeError(f"verdicts must be verdicts, got {type(verdicts).__name__} {repr_short(verdicts)}")
    found = list(verdicts)
    for each in found:
        check_type("verdicts", each, Verdict, "verdicts")
    kinds = [each.kind for each in found]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
    reasons = (f"{len(kinds)} layers: {counts}",) if kinds else ("no layer",)
    order = (LOUD_FAILURE, STILL_TRAINING, NOT_JUDGED, RANK_LIMITED, LOW_RANK_MINIMUM)
    return Verdict(next((kind for kind in order if kind in kinds), NOT_JUDGED), reasons)
