"""A diagnosis: every layer's numbers and verdict, printable, and JSON."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.experts import ExpertsDiagnosis, rows
from lora_kernels.landscape.spectra import Spectrum
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, NOT_JUDGED, Thresholds, Verdict
from lora_kernels.landscape.weights import Overlap
from lora_kernels.reports import Layers, Report, Table, counted, short_name

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
        conditions = [_bracket(certificate), number(certificate.alignment), number(certificate.stationarity)]
    ranks = f"{spectrum.numerical_rank}/{spectrum.rank}"
    return [short_name(layer.name), ranks, *map(number, numbers), *conditions]


def _of_experts(layer: ExpertsDiagnosis) -> list[str]:
    low, high = layer.ranks
    numbers = layer.entropy_rank, layer.spectral, layer.spectral_share, layer.balance
    conditions = layer.ratio, layer.alignment, layer.stationarity
    ranks = f"{low}-{high}/{layer.rank}" if low < high else f"{low}/{layer.rank}"
    return [f"{short_name(layer.name)} ({layer.count} experts)", ranks, *map(number, (*numbers, *conditions))]


def _bracket(certificate: Certificate) -> str:
    high = f" <={certificate.ratio_high:.3g}" if certificate.ratio_high > 1.001 * certificate.ratio else ""
    return f"{certificate.ratio:.4g}{high}"
