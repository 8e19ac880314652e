"""A diagnosis: every layer's numbers and verdict, printable, and JSON."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.spectra import Spectrum
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, NOT_JUDGED, Thresholds, Verdict, overall
from lora_kernels.landscape.weights import Overlap
from lora_kernels.reports import Layers, Report, Table, counted, short_name

_NAMED = 12  # experts that a note names
_STYLES = {LOUD_FAILURE: "bold red", LOW_RANK_MINIMUM: "green", NOT_JUDGED: "dim"}


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer.

    Attributes:
        name: the layer; of an expert, the name of its parameter and its number.
        spectrum: measured from the factors.
        verdict: with its reasons.
        certificate: the optimality conditions, if data and a weight decay were given and the data reached the layer.
        overlap: of the update's directions with those of the weight, if requested.
        notes: facts a user should know.
        parameter: of many experts, where the layer is one of them.
        tokens: counted tokens that reached it, if data was given.
    """

    name: str
    spectrum: Spectrum
    verdict: Verdict
    certificate: Certificate | None = None
    overlap: Overlap | None = None
    notes: tuple[str, ...] = ()
    parameter: str | None = None
    tokens: float | None = None


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


@dataclass(frozen=True)
class Diagnosis(Report, Layers[LayerDiagnosis]):
    """The result of `diagnose`.

    Attributes:
        adapter: the adapter's name, or its folder.
        layers: one entry per linear LoRA layer, in the model's order, and one per expert.
        verdict: on the whole adapter.
        thresholds: of the verdicts.
        weight_decay: lambda, if it was given.
        batches: batches read.
        tokens: tokens counted.
        unsupported: LoRA layers that are not linear, and why they were left out.
        notes: facts about the whole.
    """

    adapter: str
    layers: tuple[LayerDiagnosis, ...]
    verdict: Verdict
    thresholds: Thresholds
    weight_decay: float | None = None
    batches: int = 0
    tokens: float = 0.0
    unsupported: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    derived: ClassVar[tuple[str, ...]] = ("experts",)

    @property
    def experts(self) -> list[ExpertsDiagnosis]:
        """The experts of a parameter together, a summary for each parameter of experts."""
        return [row for row in rows(self.layers) if isinstance(row, ExpertsDiagnosis)]

    def summary(self) -> str:
        """One line: the verdict and its counts."""
        data = f"; {self.tokens:,.0f} tokens in {self.batches} batches" if self.batches else ""
        return f"{self.verdict.kind}: {'; '.join(self.verdict.reasons)}{data}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        compared = any(layer.spectrum.spectral_share is not None for layer in self.layers)
        optional = ("entropy", *(["|sBA|_2"] if compared else []), "alignment", "balance", "s|G|_2/lambda")
        table = Table("layer", title=f"loss landscape of adapter {self.adapter!r}", optional=optional)
        names = ("rank", "entropy", "|sBA|_2", "of |W|_2", "balance", "s|G|_2/lambda", "alignment", "stationarity")
        for column in names:
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for layer in rows(self.layers):
            kind = layer.verdict.kind
            cells = _of_experts(layer) if isinstance(layer, ExpertsDiagnosis) else _of_layer(layer)
            table.add_row(*cells, Text(kind.replace("_", " "), style=_STYLES.get(kind, "yellow")))
        yield table
        yield Text(self.summary(), style=_STYLES.get(self.verdict.kind, "yellow"))
        loud = [layer for layer in self.layers if layer.verdict.kind == LOUD_FAILURE]
        for layer in loud[:5]:
            yield Text(f"{short_name(layer.name)}: {'; '.join(layer.verdict.reasons)}")
        if notes := self.all_notes():
            yield Text("\n".join(notes), style="dim")

    def all_notes(self) -> list[str]:
        """Notes on the whole, on layers, on layers that were left out, and what was certified."""
        notes = [*self.notes, *counted((layer.name, note) for layer in self.layers for note in layer.notes)]
        notes += [f"{short_name(summary.name)}: {note}" for summary in self.experts for note in summary.notes()]
        notes += counted(self.unsupported)
        objectives = (layer.certificate.objective for layer in self.layers if layer.certificate is not None)
        return [*notes, *(f"certified: {objective}" for objective in itertools.islice(objectives, 1))]


def number(value: float | None) -> str:
    """A number in a table."""
    return "" if value is None else f"{value:.3g}"


def _of_layer(layer: LayerDiagnosis) -> list[str]:
    spectrum, certificate = layer.spectrum, layer.certificate
    numbers = spectrum.entropy_rank, spectrum.spectral, spectrum.spectral_share, spectrum.balance
    conditions = ["", "", ""]
    if certificate is not None:
        above = certificate.ratio_high > 1.001 * certificate.ratio
        ratio = f"{certificate.ratio:.4g}" + (f" <={certificate.ratio_high:.3g}" if above else "")
        conditions = [ratio, number(certificate.alignment), number(certificate.stationarity)]
    ranks = f"{spectrum.numerical_rank}/{spectrum.rank}"
    return [short_name(layer.name), ranks, *map(number, numbers), *conditions]


def _of_experts(layer: ExpertsDiagnosis) -> list[str]:
    low, high = layer.ranks
    numbers = layer.entropy_rank, layer.spectral, layer.spectral_share, layer.balance
    conditions = layer.ratio, layer.alignment, layer.stationarity
    ranks = f"{low}-{high}/{layer.rank}" if low < high else f"{low}/{layer.rank}"
    return [f"{short_name(layer.name)} ({layer.count} experts)", ranks, *map(number, (*numbers, *conditions))]
