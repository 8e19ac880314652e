"""What the demo prints: the comparison table and the sentences under it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from benchmarks.demo.intervals import MEASURES, Comparison, compare, format_difference, mean_and_deviation, stages
from benchmarks.demo.training import Result

Arms = dict[str, list[Result]]
_FORMS = {"loss": ".3f", "accuracy": ".1%", "count": ",.0f", "seconds": ".1f"}
_WORDS = {"ahead": "ahead", "behind": "behind", "level": "not distinguishable"}


def group_by_arm(results: Sequence[Result]) -> Arms:
    """Arm to its results, both in the order of first appearance."""
    groups: Arms = {}
    for result in results:
        groups.setdefault(result.arm, []).append(result)
    return groups


def _values(results: Sequence[Result], measure: str, index: int) -> list[float]:
    return [getattr(result.evaluations[index], measure) for result in results]


def comparisons(results: Sequence[Result], measure: str) -> list[tuple[int, Comparison]]:
    """The second arm against the first, by step."""
    first, second = list(group_by_arm(results).values())[:2]
    return [
        (point.step, compare(_values(first, measure, index), _values(second, measure, index), MEASURES[measure]))
        for index, point in enumerate(results[0].evaluations)
    ]


def table(results: Sequence[Result]) -> Table:
    """Mean and standard deviation over seeds by arm, and the paired difference; every arm has the same seeds."""
    by_arm = group_by_arm(results)
    arms, seeds = list(by_arm), len(results) // len(by_arm)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    grid = Table(
        title=f"LoRA fine-tuning, {' vs '.join(arms)}: {spread}",
        caption="@: after so many steps; difference: paired by seed, with its 95 % t interval",
    )
    grid.add_column("measure")
    for arm in arms:
        grid.add_column(arm, justify="right")
    if len(arms) > 1:
        grid.add_column(f"{arms[1]} − {arms[0]}", justify="right")
        grid.add_column(arms[1])
    for title, name, kind in (
        ("initialisation", "init_seconds", "seconds"),
        ("training", "train_seconds", "seconds"),
        ("trained parameters", "trainable_parameters", "count"),
    ):
        grid.add_row(title, *(_cell([getattr(run, name) for run in runs], kind) for runs in by_arm.values()))
    for measure in MEASURES:
        grid.add_section()
        differences = comparisons(results, measure) if len(arms) > 1 else []
        for index, point in enumerate(results[0].evaluations):
            cells = [_cell(_values(runs, measure, index), measure) for runs in by_arm.values()]
            if differences:
                _, comparison = differences[index]
                cells += [format_difference(comparison, measure), comparison.verdict]
            grid.add_row(f"held-out {measure} @ {point.step}", *cells)
    return grid


def _cell(values: Sequence[float], kind: str) -> str:
    mean, deviation = mean_and_deviation(values)
    unit = " s" if kind == "seconds" else ""
    text = f"{mean:{_FORMS[kind]}}{unit}"
    if deviation is None or (kind == "count" and deviation == 0):
        return text
    return f"{text} ± {deviation:{_FORMS[kind]}}{unit}"


def verdict(results: Sequence[Result]) -> list[str]:
    """Sentences about the numbers, also where the method does not help; none where there is one arm."""
    by_arm = group_by_arm(results)
    if len(by_arm) < 2:
        return []
    name = list(by_arm)[1].upper()
    losses, accuracies = (comparisons(results, measure) for measure in MEASURES)
    last, right = losses[-1][1], accuracies[-1][1]
    if last.verdict == "one seed":
        return [f"One seed shows no spread, so no verdict: {name} ends {last.difference:+.3f} away in held-out loss."]
    amount = format_difference(last, "loss")
    ends = {
        "ahead": f"{name} ends with the lower loss ({amount}).",
        "behind": f"{name} ends with the HIGHER loss ({amount}).",
        "level": f"At the end the difference, {amount}, is within what the seeds alone can do.",
    }
    per_step = statistics.fmean(run.train_seconds / len(run.train_loss) for run in results)
    init = statistics.fmean(run.init_seconds for run in by_arm[list(by_arm)[1]])
    return [
        f"Held-out loss, {name} against random LoRA: {stages(losses, _WORDS)}.",
        ends[last.verdict],
        f"Held-out accuracy at the end: {name} is {_WORDS[right.verdict]} ({format_difference(right, 'accuracy')}).",
        f"The initialisation took {init:.1f} s, the time of {init / per_step:.0f} training steps.",
    ]


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """For the record, by arm: steps, and per step mean and standard deviation (None with one seed) of the measures."""
    summaries: dict[str, Any] = {}
    for arm, runs in group_by_arm(results).items():
        points = runs[0].evaluations
        summaries[arm] = {"steps": [point.step for point in points]}
        for measure in MEASURES:
            pairs = [mean_and_deviation(_values(runs, measure, index)) for index in range(len(points))]
            means, deviations = zip(*pairs, strict=True)
            summaries[arm] |= {f"{measure}_mean": list(means), f"{measure}_deviation": list(deviations)}
    return summaries
