"""The page of an initialisation: ranks, explained variance, size of the start and of the first step."""

from __future__ import annotations

from collections import defaultdict

from lora_kernels.api.report import InitReport
from lora_kernels.landscape.page import Finding, Grid, Page
from lora_kernels.reports import printable

# Explained variance below which the data have clearly more directions than the rank covers.
_LOW_VARIANCE = 0.5
# Attribute of a layer's report, title, meaning and hue.
_GRIDS = (
    ("explained_variance", "Explained variance", "share of the input variance that A captures, in %", 150),
    ("start_share", "Size of the start, |sBA| / |W|", "Frobenius norms", 20),
    ("first_step", "First step", "predicted loss change by Adam's first step per unit of learning rate", 275),
)


def init_page(report: InitReport) -> Page:
    """The page of what `initialize` reports."""
    ranks = {layer.name: float(layer.rank) for layer in report}
    grid = Grid(
        title="Rank",
        meaning="of adapters after the initialisation",
        values=ranks,
        texts={layer.name: str(layer.rank) for layer in report},
        tips={layer.name: f"rank {layer.rank_before} before, {layer.rank} now" for layer in report},
        high=max(ranks.values(), default=0.0) or 1.0,
    )
    others = [_grid(report, *settings) for settings in _GRIDS]
    return Page(
        title=f"{report.method} initialisation of adapter {printable(report.adapter)}",
        headline=report.summary(),
        grids=[grid, *(other for other in others if any(other.values.values()))],
        findings=_findings(report),
        notes=[printable(line) for line in report.advice],
    )


def _grid(report: InitReport, attribute: str, title: str, meaning: str, hue: int) -> Grid:
    """A grid of one number of the layers; sizes on a logarithmic scale, shares from 0 to 1 with their per cent."""
    values: dict[str, float | None] = {layer.name: getattr(layer, attribute) for layer in report}
    known = {name: abs(value) for name, value in values.items() if value is not None}
    is_share = attribute == "explained_variance"
    return Grid(
        title=title,
        meaning=meaning,
        values={name: known.get(name) for name in values},
        texts={name: f"{100 * value:.0f}" for name, value in known.items()} if is_share else {},
        tips={name: f"{values[name]:.3g}" for name in known},
        hue=hue,
        log=not is_share,
    )


def _findings(report: InitReport) -> list[Finding]:
    """Layers that kept their values or got a stock start, notes on layers, and low explained variance."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for layer in report:
        if layer.status != "initialised":
            groups["; ".join(layer.notes) or "no note"].append((layer.name, layer.status.replace("_", " ")))
        else:
            for note in layer.notes:
                groups[note].append((layer.name, f"rank {layer.rank}"))
    findings = [
        Finding(title="note", meaning=note, advice="see docs/starting.md", layers=tuple(layers))
        for note, layers in groups.items()
    ]
    variances = {layer.name: layer.explained_variance for layer in report if layer.explained_variance is not None}
    if low := sorted((value, name) for name, value in variances.items() if value < _LOW_VARIANCE):
        meaning = "the inputs of these layers have more directions than the rank covers"
        advice = "raise r, or let ranks follow the data: ranks=Redistribution('explained_variance', 2.0)"
        layers = tuple((name, f"{100 * value:.1f} %") for value, name in low)
        findings.append(Finding(title="low explained variance", meaning=meaning, advice=advice, layers=layers))
    return findings
