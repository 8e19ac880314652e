"""What the demo says: the comparison table and the sentences under it.

All comparisons are paired by seed, since both arms of one seed share the head's start, the order of the batches and
the dropout masks. "Ahead" and "behind" are said only where the 95 % t interval of the mean difference excludes zero;
with one seed no verdict is given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.demo.data import TextTask
from benchmarks.demo.task import RunRecord

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves all above, on the safe side.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Of the loss of blind guessing, ln(number of classes): the first training losses lie there.
LOSS_SHARES = (0.75, 0.6, 0.45)
SMOOTHING_SHARE = 0.1

Values = dict[str, list[float | None]]


@dataclass(frozen=True)
class Measure:
    """One row of the comparison.

    Attributes:
        name: What was measured.
        values: Per arm one value per seed, in the order of the seeds; None where a run has none.
        kind: How to print a value: "loss", "accuracy", "steps", "count" or "seconds".
        lower_is_better: Direction; None where no verdict makes sense.
        step: The step it belongs to, if any.
    """

    name: str
    values: Values
    kind: str
    lower_is_better: bool | None
    step: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A method against random LoRA.

    Attributes:
        difference: Mean over seeds of method minus random.
        half_width: Half of the 95 % t interval of that mean; None with one seed.
        verdict: "ahead", "behind", "level" or "one seed".
    """

    difference: float
    half_width: float | None
    verdict: str


def compare(random: Sequence[float], method: Sequence[float], lower_is_better: bool) -> Comparison:
    """Compares two arms, paired by seed.

    Args:
        random: One value per seed.
        method: One value per seed, the same seeds in the same order.
        lower_is_better: Direction of the measure.

    Returns:
        Mean difference, its uncertainty and the verdict on the method.

    Raises:
        ValueError: The two have different lengths or none.
    """
    if not random or len(random) != len(method):
        raise ValueError(f"method had {len(method)} values, must have as many as random, {len(random)}, at least one")
    differences = [b - a for a, b in zip(random, method, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Comparison(mean, None, "one seed")
    quantile = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1]
    half_width = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= half_width:
        return Comparison(mean, half_width, "level")
    return Comparison(mean, half_width, "ahead" if (mean < 0) == lower_is_better else "behind")


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Trailing means.

    Args:
        losses: One value per step.
        window: Number of values per mean, at most `len(losses)`.

    Returns:
        `len(losses) - window + 1` means; the first one belongs to step `window`.
    """
    return [statistics.fmean(losses[i : i + window]) for i in range(len(losses) - window + 1)]


def steps_to_reach(losses: Sequence[float], threshold: float, window: int) -> int | None:
    """Finds the first step at which the trailing mean of the training loss is at or below a threshold.

    Args:
        losses: One value per step.
        threshold: Loss in nats.
        window: Number of values per mean.

    Returns:
        The step, counted from 1; None where it is never reached.
    """
    return next((i + window for i, value in enumerate(smooth(losses, window)) if value <= threshold), None)


def window_of(steps: int) -> int:
    """Chooses the smoothing window of a run.

    Args:
        steps: Length of the run.

    Returns:
        A tenth of the steps, at least 1.
    """
    return max(1, round(SMOOTHING_SHARE * steps))


def measures(records: Sequence[RunRecord], classes: int) -> list[Measure]:
    """Collects everything that the table shows.

    Args:
        records: All runs, every arm with the same seeds.
        classes: Number of classes.

    Returns:
        The rows in order.
    """
    by_arm = group_by_arm(records)
    steps = len(records[0].train_loss)
    window = window_of(steps)
    rows = [
        Measure("initialisation", {a: [r.init_seconds for r in rs] for a, rs in by_arm.items()}, "seconds", None),
        Measure("training", {a: [r.train_seconds for r in rs] for a, rs in by_arm.items()}, "seconds", None),
        Measure(
            "trained parameters",
            {a: [float(r.trainable_parameters) for r in rs] for a, rs in by_arm.items()},
            "count",
            None,
        ),
    ]
    points = [evaluation.step for evaluation in records[0].evaluations]
    for index, step in enumerate(points):
        losses: Values = {arm: [run.evaluations[index].loss for run in runs] for arm, runs in by_arm.items()}
        rows.append(Measure(f"held-out loss @ {step}", losses, "loss", True, step))
    for index, step in enumerate(points):
        right: Values = {arm: [run.evaluations[index].accuracy for run in runs] for arm, runs in by_arm.items()}
        rows.append(Measure(f"held-out accuracy @ {step}", right, "accuracy", False, step))
    for share in LOSS_SHARES:
        threshold = round(share * math.log(classes), 2)
        reached: Values = {
            arm: [steps_to_reach(run.train_loss, threshold, window) for run in runs] for arm, runs in by_arm.items()
        }
        rows.append(Measure(f"steps to loss {threshold:.2f}", reached, "steps", True))
    return rows


def comparison_of(measure: Measure) -> Comparison | None:
    """Compares the second arm of a measure with the first.

    Args:
        measure: A row.

    Returns:
        None where there is one arm, no direction, or a run without a value.
    """
    arms = list(measure.values.values())
    if len(arms) < 2 or measure.lower_is_better is None:
        return None
    first, second = ([value for value in arm if value is not None] for arm in arms[:2])
    if len(first) < len(arms[0]) or len(second) < len(arms[1]):
        return None
    return compare(first, second, measure.lower_is_better)


def table(records: Sequence[RunRecord], task: TextTask) -> Table:
    """Makes the table: mean and standard deviation over seeds per arm, and the paired difference.

    Args:
        records: All runs, every arm with the same seeds.
        task: The data they were trained on.

    Returns:
        A rich table.
    """
    arms = list(group_by_arm(records))
    seeds = len(records) // len(arms)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    window = window_of(len(records[0].train_loss))
    grid = Table(
        title=f"LoRA fine-tuning, {' vs '.join(arms)}: {spread}",
        caption=f"@: after so many steps; steps to loss: training loss, mean of the last {window} steps; "
        "difference: paired by seed, with its 95 % t interval",
    )
    grid.add_column("measure")
    for arm in arms:
        grid.add_column(arm, justify="right")
    if len(arms) > 1:
        grid.add_column(f"{arms[1]} − {arms[0]}", justify="right")
        grid.add_column(arms[1])
    group = ""
    for measure in measures(records, len(task.labels)):
        if group and group != measure.kind and measure.kind in {"loss", "accuracy", "steps"}:
            grid.add_section()
        group = measure.kind
        cells = [_cell(measure.values[arm], measure.kind) for arm in arms]
        found = comparison_of(measure)
        if len(arms) > 1 and found is not None:
            cells += [format_difference(found, measure.kind), found.verdict]
        grid.add_row(measure.name, *cells)
    return grid


def verdict(records: Sequence[RunRecord]) -> list[str]:
    """Says in words what the numbers show, also where the method does not help.

    Args:
        records: All runs, every arm with the same seeds.

    Returns:
        Sentences, computed from the held-out results and the times alone; none where there is one arm.
    """
    by_arm = group_by_arm(records)
    if len(by_arm) < 2:
        return []
    name = list(by_arm)[1].upper()
    rows = measures(records, classes=2)  # the number of classes sets the training-loss thresholds, not used here
    found = [(row.step, result) for row in rows if row.kind == "loss" and (result := comparison_of(row)) is not None]
    if found[0][1].verdict == "one seed":
        difference = found[-1][1].difference
        return [f"One seed shows no spread, so no verdict: {name} ends {difference:+.3f} away in held-out loss."]
    words = {"ahead": "ahead", "behind": "behind", "level": "not distinguishable"}
    lines = [f"Held-out loss, {name} against random LoRA: {stages(found, words)}."]
    last = found[-1][1]
    amount = format_difference(last, "loss")
    ends = {
        "ahead": f"{name} ends with the lower loss ({amount}).",
        "behind": f"{name} ends with the HIGHER loss ({amount}).",
        "level": f"At the end the difference, {amount}, is within what the seeds alone can do.",
    }
    lines.append(ends[last.verdict])
    right = [result for row in rows if row.kind == "accuracy" and (result := comparison_of(row)) is not None][-1]
    lines.append(
        f"Held-out accuracy at the end: {name} is {words[right.verdict]} ({format_difference(right, 'accuracy')})."
    )
    method_runs = list(by_arm.values())[1]
    seconds_per_step = statistics.fmean(run.train_seconds / len(run.train_loss) for run in records)
    init = statistics.fmean(run.init_seconds for run in method_runs)
    lines.append(f"The initialisation took {init:.1f} s, the time of {init / seconds_per_step:.0f} training steps.")
    return lines


def stages(found: Sequence[tuple[int | None, Comparison]], words: Mapping[str, str]) -> str:
    """Puts the verdicts of increasing steps into words, equal neighbours together.

    Args:
        found: Step and comparison, in order.
        words: What to say for each verdict that occurs.

    Returns:
        A phrase such as "ahead at steps 10 and 25, then level at step 50".
    """
    groups: list[tuple[str, list[int | None]]] = []
    for step, result in found:
        if groups and groups[-1][0] == result.verdict:
            groups[-1][1].append(step)
        else:
            groups.append((result.verdict, [step]))
    return ", then ".join(f"{words[kind]} at step{'s' if len(s) > 1 else ''} {_enumerate(s)}" for kind, s in groups)


def summary(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Gives mean and standard deviation of every evaluated quantity, for the record.

    Args:
        records: All runs.

    Returns:
        Per arm: steps, and per step the mean and standard deviation (None with one seed) of loss and accuracy.
    """
    result: dict[str, Any] = {}
    for arm, runs in group_by_arm(records).items():
        points = list(zip(*(run.evaluations for run in runs), strict=True))
        losses = [[point.loss for point in group] for group in points]
        accuracies = [[point.accuracy for point in group] for group in points]
        result[arm] = {
            "steps": [group[0].step for group in points],
            "loss_mean": [statistics.fmean(group) for group in losses],
            "loss_deviation": [_deviation(group) for group in losses],
            "accuracy_mean": [statistics.fmean(group) for group in accuracies],
            "accuracy_deviation": [_deviation(group) for group in accuracies],
        }
    return result


def group_by_arm(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Sorts runs by initialisation.

    Args:
        records: Any runs.

    Returns:
        Arm to its runs, both in the order of first appearance.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.arm, []).append(record)
    return groups


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _format(value: float, kind: str) -> str:
    forms = {"loss": ".3f", "accuracy": ".1%", "steps": ".0f", "count": ",.0f", "seconds": ".1f"}
    return f"{value:{forms[kind]}}" + (" s" if kind == "seconds" else "")


def _cell(values: Sequence[float | None], kind: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    text = _format(statistics.fmean(known), kind)
    deviation = _deviation(known)
    if deviation is not None and not (kind == "count" and deviation == 0):
        text += f" ± {_format(deviation, kind)}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)} seeds)"


def format_difference(found: Comparison, kind: str) -> str:
    """Writes a difference with its uncertainty.

    Args:
        found: What was compared.
        kind: "loss", "accuracy" or another of `Measure.kind`.

    Returns:
        Such as "+0.105 ± 0.164"; that of two percentages is in percentage points.
    """
    scale, form, unit = (100, ".1f", " pp") if kind == "accuracy" else (1, ".3f" if kind == "loss" else ".0f", "")
    text = f"{scale * found.difference:+{form}}"
    return text + unit if found.half_width is None else f"{text} ± {scale * found.half_width:{form}}{unit}"


def _enumerate(steps: Sequence[int | None]) -> str:
    words = [str(step) for step in steps]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
