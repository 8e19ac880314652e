"""What the demo says of its two sides: rows with a judgement, a table, and sentences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.demo.config import OURS, STOCK
from benchmarks.demo.side import Evaluation, Side

# One run with one seed tells no finer differences; between good methods 1 to 2 % is all there is (arXiv 2602.04998).
LEVEL = 0.02
STYLES = {"better": "green", "level": "", "worse": "red"}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: what was measured; less is better.
        unit: "s", "B" or "nats".
        stock: of PEFT's side; None where there is no such value.
        ours: of our side.
        judged: whether the sides are compared.
    """

    measure: str
    unit: str
    stock: float | None
    ours: float | None
    judged: bool = True

    @property
    def verdict(self) -> str:
        """`better` and `worse` of our side, `level`, or nothing."""
        if not self.judged or (self.stock is None and self.ours is None):
            return ""
        if self.stock is None or self.ours is None:
            return "better" if self.stock is None else "worse"
        if abs(self.ours - self.stock) <= LEVEL * self.stock:
            return "level"
        return "better" if self.ours < self.stock else "worse"

    @property
    def difference(self) -> str:
        """In words, such as `1.12x as fast`."""
        if not self.verdict:
            return ""
        if self.stock is None or self.ours is None:
            return "only ours gets there" if self.stock is None else "ours does not get there"
        if self.unit == "s" and self.ours > 0:
            return f"{self.stock / self.ours:.2f}x as fast"
        change = self.ours / self.stock - 1
        return f"{abs(change):.0%} {'more' if change > 0 else 'less'}"

    def cell(self, value: float | None) -> str:
        """A value with its unit."""
        if value is None:
            return "–"
        return {"s": f"{value:.2f} s" if value < 10 else f"{value:.0f} s", "B": f"{value / 1e6:.0f} MB"}.get(
            self.unit, f"{value:.3f}"
        )


def loss_at(evaluations: Sequence[Evaluation], seconds: float) -> float:
    """Held-out loss when a side's clock shows so many seconds, linear between evaluations."""
    for before, after in zip(evaluations, evaluations[1:], strict=False):
        if before.seconds <= seconds <= after.seconds:
            share = (seconds - before.seconds) / ((after.seconds - before.seconds) or 1.0)
            return before.loss + share * (after.loss - before.loss)
    return evaluations[0].loss if seconds < evaluations[0].seconds else evaluations[-1].loss


def seconds_to(evaluations: Sequence[Evaluation], loss: float) -> float | None:
    """When a side's held-out loss first is as low as `loss`, linear between evaluations; None if it never is."""
    if evaluations[0].loss <= loss:
        return evaluations[0].seconds
    for before, after in zip(evaluations, evaluations[1:], strict=False):
        if after.loss <= loss < before.loss:
            return before.seconds + (before.loss - loss) / (before.loss - after.loss) * (after.seconds - before.seconds)
    return None


def rows(stock: Side, ours: Side, memory: dict[str, int]) -> list[Row]:
    """All measures of the two sides; `memory` is by side what a step needs beyond the weights, empty if not known."""
    goal = stock.evaluations[-1].loss
    seconds = min(stock.seconds, ours.seconds)
    return [
        Row("a training step (median)", "s", *(statistics.median(side.step_seconds) for side in (stock, ours))),
        Row(
            "peak memory of a step, beyond the weights",
            "B",
            memory.get(STOCK),
            memory.get(OURS),
            judged=all(memory.values()),
        ),
        Row(f"loss after {stock.evaluations[-1].step} steps", "nats", goal, ours.evaluations[-1].loss),
        Row(
            f"loss after {seconds:.0f} s, start included",
            "nats",
            *(loss_at(side.evaluations, seconds) for side in (stock, ours)),
        ),
        Row(
            f"time to PEFT's last loss, {goal:.3f}",
            "s",
            *(seconds_to(side.evaluations, goal) for side in (stock, ours)),
        ),
        Row("start, before the first step", "s", stock.start_seconds, ours.start_seconds, judged=False),
    ]


def table(measures: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    grid = Table()
    grid.add_column("held-out loss in nats per token")
    for name in (STOCK, OURS):
        grid.add_column(name, justify="right")
    grid.add_column("")
    for row in measures:
        grid.add_row(
            row.measure,
            row.cell(row.stock),
            row.cell(row.ours),
            f"{row.difference}  {row.verdict}",
            style=STYLES.get(row.verdict),
        )
    return grid


def verdict(measures: Sequence[Row], start_steps: float) -> list[str]:
    """What is gained and what is not; `start_steps` is the time of the start in training steps."""
    groups: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for row in measures:
        if row.verdict:
            groups[row.verdict].append(f"{row.measure} ({row.difference})")
    lines = [f"Gained: {'; '.join(groups['better']) or 'nothing'}."]
    if groups["level"]:
        lines.append(f"Nothing gained, within {LEVEL:.0%}: {'; '.join(groups['level'])}.")
    if groups["worse"]:
        lines.append(f"WORSE than stock PEFT: {'; '.join(groups['worse'])}.")
    if start_steps >= 0.1:
        lines.append(f"The start costs as much time as {start_steps:.1f} training steps, once.")
    return [*lines, "This is one run with one seed: python -m benchmarks.demo.study compares with seeds and intervals."]
