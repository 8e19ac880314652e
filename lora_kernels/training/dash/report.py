"""What LoRA-Dash did, layer by layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.reports import Layers, Printed, Table, short_name
from lora_kernels.training.dash.selection import Selection


@dataclass(frozen=True, kw_only=True)
class DashLayer:
    """One LoRA layer.

    Attributes:
        name: the layer's name in the model.
        status: `waiting` for the switch, `launched`, or `refused`.
        reason: why it is refused, or a note.
        rates: largest and smallest change rate among the selected directions.
        sigma: largest and smallest of their singular values, as fractions of the weight's largest.
        share: of the adapter's squared change along all core directions, the fraction along the selected ones.
    """

    name: str
    status: Literal["waiting", "launched", "refused"]
    reason: str = ""
    rates: tuple[float, float] | None = None
    sigma: tuple[float, float] | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class DashReport(Printed, Layers[DashLayer]):
    """The state of a run of LoRA-Dash.

    Attributes:
        layers: one entry per LoRA layer of the adapter, in the model's order.
        steps: optimizer steps counted.
        pre_launch: the step of the switch.
    """

    layers: tuple[DashLayer, ...]
    steps: int
    pre_launch: int

    def summary(self) -> str:
        """One line: the number of layers by status, and why some are refused."""
        counts = Counter(layer.status for layer in self.layers)
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        reasons = Counter(layer.reason for layer in self.layers if layer.status == "refused")
        why = "".join(f"; refused: {reason} ({count})" for reason, count in reasons.items())
        return f"LoRA-Dash, step {self.steps} (switch at {self.pre_launch}): {states}{why}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("layer", "status", "change rates", "singular values", "share", "note", title="LoRA-Dash")
        for layer in self.layers:
            rates = "" if layer.rates is None else f"{layer.rates[0]:.1e} to {layer.rates[1]:.1e}"
            sigma = "" if layer.sigma is None else f"{layer.sigma[0]:.1e} to {layer.sigma[1]:.1e}"
            share = "" if layer.share is None else f"{100 * layer.share:.0f} %"
            table.add_row(short_name(layer.name), layer.status, rates, sigma, share, layer.reason)
        yield table
        yield Text(self.summary())


def launched(name: str, selection: Selection) -> DashLayer:
    """The entry of a layer that has its directions."""
    rates = float(selection.rates[0]), float(selection.rates[-1])
    scale = selection.largest if selection.largest > 0 else 1.0
    sigma = float(selection.sigma.max()) / scale, float(selection.sigma.min()) / scale
    note = "" if rates[0] > 0 else "the adapter has changed nothing: the directions are arbitrary"
    return DashLayer(name=name, status="launched", reason=note, rates=rates, sigma=sigma, share=selection.share)
