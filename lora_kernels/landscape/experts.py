"""The experts of a parameter together: one row of a diagnosis instead of hundreds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_kernels.landscape.verdict import LOUD_FAILURE, Verdict, overall

if TYPE_CHECKING:
    from lora_kernels.landscape.report import LayerDiagnosis

_NAMED = 12  # experts that a note names


@dataclass(frozen=True)
class ExpertsDiagnosis:
    """All experts of one parameter.

    Attributes:
        name: module of experts and parameter.
        count: number of experts.
        ranks: the smallest and the largest numerical rank of an expert.
        rank: r of each.
        entropy_rank: the median.
        spectral: the largest `|s B A|_2`.
        spectral_share: the largest `|s B A|_2 / |W|_2`, if the weights were read.
        balance: the largest.
        ratio: the largest `s |G|_2 / lambda` of a certificate, if there is one.
        alignment: the largest.
        stationarity: the largest.
        verdict: the worst of the experts that data reached, and of all that fail loudly.
        zero: experts whose update is zero.
        unreached: experts that no counted token reached, of the data given.
    """

    name: str
    count: int
    ranks: tuple[int, int]
    rank: int
    entropy_rank: float | None
    spectral: float | None
    spectral_share: float | None
    balance: float | None
    ratio: float | None
    alignment: float | None
    stationarity: float | None
    verdict: Verdict
    zero: tuple[int, ...]
    unreached: tuple[int, ...]

    def notes(self) -> list[str]:
        """What there is to say of some experts, named by their numbers."""
        told = (("no counted token reached", self.unreached), ("the update is zero in", self.zero))
        return [f"{what} {_named(experts, self.count)}" for what, experts in told if experts]


def _named(experts: Sequence[int], count: int) -> str:
    if len(experts) == count:
        return f"any of {count} experts" if count > 1 else "the expert"
    names = ", ".join(map(str, experts[:_NAMED]))
    more = f" and {len(experts) - _NAMED} more" if len(experts) > _NAMED else ""
    return f"expert{'s' if len(experts) > 1 else ''} {names}{more} of {count}"


def together(name: str, experts: Sequence[LayerDiagnosis]) -> ExpertsDiagnosis:
    """The summary of a parameter's experts; numbers of experts that are not finite show in the verdict."""
    spectra = [layer.spectrum for layer in experts]
    certificates = [layer.certificate for layer in experts if layer.certificate is not None]
    reached = [layer for layer in experts if layer.tokens != 0 or layer.verdict.kind == LOUD_FAILURE]
    ranks = [spectrum.numerical_rank for spectrum in spectra]

    def largest(values: Iterable[float | None]) -> float | None:
        return max((value for value in values if value is not None and not math.isnan(value)), default=None)

    def which(condition: Callable[[LayerDiagnosis], bool]) -> tuple[int, ...]:
        return tuple(int(layer.name.rpartition(".")[2]) for layer in experts if condition(layer))

    entropies = [spectrum.entropy_rank for spectrum in spectra if spectrum.status != "not_finite"]
    return ExpertsDiagnosis(
        name=name,
        count=len(experts),
        ranks=(min(ranks), max(ranks)),
        rank=spectra[0].rank,
        entropy_rank=statistics.median(entropies) if entropies else None,
        spectral=largest(spectrum.spectral for spectrum in spectra),
        spectral_share=largest(spectrum.spectral_share for spectrum in spectra),
        balance=largest(spectrum.balance for spectrum in spectra),
        ratio=largest(certificate.ratio for certificate in certificates),
        alignment=largest(certificate.alignment for certificate in certificates),
        stationarity=largest(certificate.stationarity for certificate in certificates),
        verdict=overall(layer.verdict for layer in reached or experts),
        zero=which(lambda layer: layer.spectrum.status == "zero"),
        unreached=which(lambda layer: layer.tokens == 0),
    )


def rows(layers: Iterable[LayerDiagnosis]) -> list[LayerDiagnosis | ExpertsDiagnosis]:
    """Layers in their order, the experts of a parameter as one."""
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in layers:
        groups.setdefault(layer.parameter or layer.name, []).append(layer)
    return [group[0] if group[0].parameter is None else together(name, group) for name, group in groups.items()]
