"""The report of an initialisation has one row for all experts of a parameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from lora_kernels.adapters.experts import ExpertLayer
from lora_kernels.adapters.layers import AdapterLayer
from lora_kernels.api.report import LayerReport


def experts_together(reports: Iterable[tuple[AdapterLayer, LayerReport]]) -> list[LayerReport]:
    """One report for all experts of a parameter, under the name of PEFT's layer."""
    together: dict[str, list[LayerReport]] = {}
    for layer, report in reports:
        module = layer.module
        name = module.wrapper_name if isinstance(module, ExpertLayer) else layer.name
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

    tokens = math.fsum(report.tokens for report in members)
    weight = math.fsum(report.tokens for report in started if report.explained_variance is not None)
    explained = (
        math.fsum(report.tokens * (report.explained_variance or 0.0) for report in started) / weight if weight else None
    )
    first = members[0]
    return LayerReport(
        name,
        status,
        first.rank_before,
        first.rank,
        explained,
        None if explained is None else max(0.0, 1.0 - explained),
        tokens,
        eigen_residual=max(numbers("eigen_residual"), default=None),
        solver=started[0].solver if started else "",
        start_share=max(numbers("start_share"), default=0.0),
        start_change=math.fsum(numbers("start_change")) if numbers("start_change") else None,
        first_step=math.fsum(numbers("first_step")) if numbers("first_step") else None,
        step_ratio=max(numbers("step_ratio"), default=None),
        notes=tuple(notes),
    )
