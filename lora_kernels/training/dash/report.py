"""What LoRA-Dash did, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lora_kernels.reports import Printed, Table, short_name
from lora_kernels.training.dash.selection import Selection


@dataclass(frozen=True)
class DashLayer:
    """One LoRA layer.

    Attributes:
        name: the layer's name in the model.
        status: `waiting` for the switch, `launched`, or `refused`.
        reason: why it is refused, or a fact to know.
        rates: largest and smallest change rate among the chosen directions.
        sigma: largest and smallest of their singular values, as shares of the weight's largest.
        share: of what the adapter had changed along core directions (squares), the part along the chosen ones.
    """

    name: str
    status: str
    reason: str = ""
    rates: tuple[float, float] | None = None
    sigma: tuple[float, float] | None = None
    share: float | None = None


@dataclass(frozen=True)
class DashReport(Printed):
    """Where a run of LoRA-Dash stands.

    Attributes:
        layers: one entry per LoRA layer of the adapter, in the model's order.
        steps: optimizer steps counted.
        pre_launch: at which the switch is.
    """

    layers: tuple[DashLayer, ...]
    steps: int
    pre_launch: int

    def __iter__(self) -> Iterator[DashLayer]:
        """The layers."""
        return iter(self.layers)

    def summary(self) -> str:
        """One line: how many layers are where, and why some are refused."""
        counts = Counter(each.status for each in self.layers)
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        reasons = Counter(each.reason for each in self.layers if each.status == "refused")
        why = "".join(f"; refused: {reason} ({count})" for reason, count in reasons.items())
        return f"LoRA-Dash, step {self.steps} (switch at {self.pre_launch}): {states}{why}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A table of the layers and the summary.

        Yields:
            What rich prints.
        """
        table = Table("layer", "status", "change rates", "singular values", "share", "note", title="LoRA-Dash")
        for each in self.layers:
            rates = "" if each.rates is None else f"{each.rates[0]:.1e} to {each.rates[1]:.1e}"
            sigma = "" if each.sigma is None else f"{each.sigma[0]:.1e} to {each.sigma[1]:.1e}"
            share = "" if each.share is None else f"{100 * each.share:.0f} %"
            table.add_row(short_name(each.name), each.status, rates, sigma, share, each.reason)
        yield table
        yield Text(self.summary())


def launched(name: str, found: Selection) -> DashLayer:
    """The entry of a layer that has its directions."""
    rates = float(found.rates[0]), float(found.rates[-1])
    scale = found.largest if found.largest > 0 else 1.0
    sigma = float(found.sigma.max()) / scale, float(found.sigma.min()) / scale
    note = "" if rates[0] > 0 else "the adapter has changed nothing: the directions are arbitrary"
    return DashLayer(name, "launched", note, rates, sigma, found.share)
