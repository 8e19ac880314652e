"""What an initialisation did, layer by layer: printable, and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.adapters.experts import ExpertLayer
from lora_kernels.adapters.layers import AdapterLayer
from lora_kernels.api.learning_rate import LearningRateAdvice
from lora_kernels.reports import Layers, Report, Table, counted, short_name


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: the layer's name in the model.
        status: `initialised`, `stock` (LoRA's own start, as the data says nothing of the layer), `removed` (rank 0),
            `unsupported` (no linear layer, or its rank exceeds min(m, n)), or `not_reached` (never called); the last
            two keep their values.
        rank_before: rank before.
        rank: rank now.
        explained_variance: share of the input variance that A captures, or `None`.
        residual_variance: the share it misses, or `None`.
        tokens: tokens counted for this layer.
        shared_with: layers that read the same tensor and share its statistics.
        eigen_residual: largest relative residual of the eigenpairs behind A, or `None`.
        solver: the algorithm behind it, or `stock`.
        start_share: `|s B A| / |W|` (Frobenius) at the start.
        start_change: predicted change of the mean loss by the start itself (first order), or `None`.
        first_step: predicted change of the mean loss by Adam's first step, per unit of learning rate, or `None`.
        step_ratio: how much farther a step moves the weight than from stock LoRA's start, or `None`.
        notes: facts a user should know.
    """

    name: str
    status: str
    rank_before: int
    rank: int
    explained_variance: float | None = None
    residual_variance: float | None = None
    tokens: float = 0.0
    shared_with: tuple[str, ...] = ()
    eigen_residual: float | None = None
    solver: str = ""
    start_share: float = 0.0
    start_change: float | None = None
    first_step: float | None = None
    step_ratio: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InitReport(Report, Layers[LayerReport]):
    """The result of `initialize`.

    Attributes:
        method: the method's name.
        settings: its config.
        adapter: the adapter's name.
        layers: one entry per LoRA layer, in the model's order.
        seconds: wall time of `collect`, `decompose`, `write`, `rate`, and `total`.
        batches: batches read.
        tokens: tokens counted.
        trainable_before: parameters of the adapter's factors before.
        trainable: and now.
        advice: on learning rates.
        learning_rate: measured from the new start, or `None` where it was not asked for.
    """

    text_width: ClassVar[int] = 140

    method: str
    settings: dict[str, object]
    adapter: str
    layers: tuple[LayerReport, ...]
    seconds: dict[str, float]
    batches: int
    tokens: float
    trainable_before: int
    trainable: int
    advice: tuple[str, ...] = ()
    learning_rate: LearningRateAdvice | None = None

    def summary(self) -> str:
        """One line: what was done, on how much data, in what time."""
        counts = Counter(layer.status for layer in self.layers)
        states = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items())
        return (
            f"{self.method}: {states}; {self.tokens:,.0f} tokens in {self.batches} batches; "
            f"{self.trainable_before:,} -> {self.trainable:,} parameters; {self.seconds['total']:.2f} s"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title, optional = f"{self.method} initialisation of adapter {self.adapter!r}", ("tokens", "start", "first step")
        table = Table("layer", title=title, optional=optional)
        for column in ("rank", "explained", *reversed(optional)):
            table.add_column(column, justify="right")
        table.add_column("status")
        for layer in self.layers:
            rank = f"{layer.rank}" if layer.rank == layer.rank_before else f"{layer.rank_before} -> {layer.rank}"
            table.add_row(
                short_name(layer.name),
                rank,
                "" if layer.explained_variance is None else f"{100 * layer.explained_variance:.1f} %",
                "" if layer.first_step is None else f"{layer.first_step:.2g}",
                "" if not layer.start_share else f"{100 * layer.start_share:.2g} %",
                f"{layer.tokens:,.0f}",
                "" if layer.status == "initialised" else layer.status.replace("_", " "),
            )
        meanings = {
            "explained_variance": "explained: share of the input variance in A",
            "start_share": "start: |s B A| / |W|",
            "first_step": "first step: predicted loss change of Adam's first step, per unit of learning rate",
        }
        shown = (meaning for name, meaning in meanings.items() if any(getattr(layer, name) for layer in self.layers))
        table.caption = "; ".join(shown)
        yield table
        measured = () if self.learning_rate is None else (self.learning_rate.summary(),)
        notes = counted((layer.name, note) for layer in self.layers for note in layer.notes)
        yield Text("\n".join((self.summary(), *measured, *self.advice, *notes)))


def experts_together(reports: Iterable[tuple[AdapterLayer, LayerReport]]) -> list[LayerReport]:
    """One report for all experts of a parameter, under the name of PEFT's layer."""
    together: dict[str, list[LayerReport]] = {}
    for layer, report in reports:
        name = layer.module.wrapper_name if isinstance(layer.module, ExpertLayer) else layer.name
        together.setdefault(name, []).append(report)
    return [members[0] if members[0].name == name else _of_experts(name, members) for name, members in together.items()]


def _of_experts(name: str, members: Sequence[LayerReport]) -> LayerReport:
    """The report of a parameter from those of its experts."""
    started = [report for report in members if report.status == "initialised"]
    counts = Counter(report.status for report in members)
    status = "initialised" if started else counts.most_common(1)[0][0]
    few = sum(report.tokens < report.rank for report in started)
    notes = [f"{len(started)} of {len(members)} experts initialised"]
    if counts["not_reached"]:
        notes.append(f"{counts['not_reached']} that no counted token reaches keep their values")
    if few:
        notes.append(f"{few} saw fewer tokens than their rank")
    said = Counter(note for report in members for note in report.notes)
    notes += [f"{note} ({count} experts)" for note, count in said.most_common(3)]

    def numbers(field: str) -> list[float]:
        return [value for report in started if (value := getattr(report, field)) is not None]

    explained, variances = None, [(part.explained_variance, part.tokens) for part in started]
    if known := [(value, tokens) for value, tokens in variances if value is not None and tokens]:
        explained = math.fsum(value * tokens for value, tokens in known) / math.fsum(tokens for _, tokens in known)
    first = members[0]
    return LayerReport(
        name,
        status,
        first.rank_before,
        first.rank,
        explained,
        None if explained is None else max(0.0, 1.0 - explained),
        math.fsum(report.tokens for report in members),
        eigen_residual=max(numbers("eigen_residual"), default=None),
        solver=started[0].solver if started else "",
        start_share=max(numbers("start_share"), default=0.0),
        start_change=math.fsum(numbers("start_change")) if numbers("start_change") else None,
        first_step=math.fsum(numbers("first_step")) if numbers("first_step") else None,
        step_ratio=max(numbers("step_ratio"), default=None),
        notes=tuple(notes),
    )
