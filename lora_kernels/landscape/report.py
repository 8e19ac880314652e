"""A diagnosis: every layer's numbers and verdict, printable, and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.landscape.certificate import Certificate
from lora_kernels.landscape.spectra import Spectrum
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, NOT_JUDGED, Thresholds, Verdict
from lora_kernels.landscape.weights import Overlap
from lora_kernels.reports import Report, Table, counted, plain, short_name

_STYLES = {LOUD_FAILURE: "bold red", LOW_RANK_MINIMUM: "green", NOT_JUDGED: "dim"}


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer.

    Attributes:
        name: the layer.
        spectrum: what the factors say.
        verdict: the verdict, with its reasons.
        certificate: the optimality conditions, where data and a weight decay were given and reached the layer.
        overlap: of the update's directions with those of the weight, where it was asked for.
        notes: facts a user should know.
    """

    name: str
    spectrum: Spectrum
    verdict: Verdict
    certificate: Certificate | None = None
    overlap: Overlap | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis(Report):
    """The result of `diagnose`.

    Attributes:
        adapter: the adapter's name, or its folder.
        layers: one entry per linear LoRA layer, in the model's order.
        verdict: on all of them.
        thresholds: where the lines were drawn.
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

    def __iter__(self) -> Iterator[LayerDiagnosis]:
        """The layers."""
        return iter(self.layers)

    def to_dict(self) -> dict[str, object]:
        """Plain Python values, derived ones included; what is not finite becomes `None`."""
        found = asdict(self)
        for entry, layer in zip(found["layers"], self.layers, strict=True):
            for name in ("spectral", "spectral_share", "frobenius_share"):
                entry["spectrum"][name] = getattr(layer.spectrum, name)
            if layer.certificate is not None:
                for name in ("ratio", "ratio_low", "ratio_high"):
                    entry["certificate"][name] = getattr(layer.certificate, name)
        made: dict[str, object] = plain(found)  # type: ignore[assignment]
        return made

    def summary(self) -> str:
        """One line: the verdict and its counts."""
        data = f"; {self.tokens:,.0f} tokens in {self.batches} batches" if self.batches else ""
        return f"{self.verdict.kind}: {'; '.join(self.verdict.reasons)}{data}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the layers, the summary and the reasons.

        Yields:
            What rich prints.
        """
        certified = any(each.certificate is not None for each in self.layers)
        table = Table("layer", title=f"loss landscape of adapter {self.adapter!r}")
        names = ("rank", "entropy", "|sBA|_2", "of |W|_2", "balance")
        for column in (*names, *(("s|G|_2/lambda", "alignment", "stationarity") if certified else ())):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        for each in self.layers:
            seen = each.spectrum
            row = [
                f"{seen.numerical_rank}/{seen.rank}",
                number(seen.entropy_rank),
                number(seen.spectral),
                number(seen.spectral_share),
                number(seen.balance),
            ]
            if certified:
                found = each.certificate
                row += ["", "", ""] if found is None else [_bracket(found), number(found.alignment)]
                row += [] if found is None else [number(found.stationarity)]
            style = _STYLES.get(each.verdict.kind, "yellow")
            table.add_row(short_name(each.name), *row, Text(each.verdict.kind.replace("_", " "), style=style))
        yield table
        yield Text(self.summary(), style=_STYLES.get(self.verdict.kind, "yellow"))
        loud = [each for each in self.layers if each.verdict.kind == LOUD_FAILURE]
        for each in loud[:5]:
            yield Text(f"{short_name(each.name)}: {'; '.join(each.verdict.reasons)}")
        notes = [*self.notes, *counted((each.name, note) for each in self.layers for note in each.notes)]
        notes += counted(self.unsupported)
        if certified:
            notes.append(f"certified: {next(each.certificate.objective for each in self.layers if each.certificate)}")
        if notes:
            yield Text("\n".join(notes), style="dim")


def number(value: float | None) -> str:
    """A number in a table."""
    return "" if value is None else f"{value:.3g}"


def _bracket(found: Certificate) -> str:
    high = f" <={found.ratio_high:.3g}" if found.ratio_high > 1.001 * found.ratio else ""
    return f"{found.ratio:.4g}{high}"
