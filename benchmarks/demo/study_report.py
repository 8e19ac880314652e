"""What a record of `benchmarks.demo.study` says: comparisons with random LoRA, tables, figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.demo.intervals import MEASURES, Comparison, compare, format_difference, mean_and_deviation

BASELINE = "random"
TITLES = {
    BASELINE: "random LoRA",
    "eva": "EVA",
    "lora_da": "LoRA-DA",
    "lora_ga": "LoRA-GA",
    "lora_one": "LoRA-One",
    "corda": "CorDA",
    "pissa": "PiSSA",
    "task_directions": "task directions",
    "lora_pro": "LoRA-Pro",
    "lora_pro_efficient": "LoRA-Pro, efficient",
    "lora_dash": "LoRA-Dash",
    "dora": "DoRA",
    "rslora": "rsLoRA",
}
WORDS = {"ahead": "helps", "behind": "harms"}
# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow, and others; the shapes
# differ as well.
_COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F"),
    *("#882255", "#332288", "#999933", "#44AA99", "#AA4466"),
)
_MARKERS = "osD^vPX*<h>dp"

Comparisons = dict[str, list[tuple[int, Comparison]]]  # by measure: step and comparison


def title(arm: str) -> str:
    """How an arm is written."""
    return TITLES.get(arm, arm)


def final_runs(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Arm to its final runs in the order of the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {arm: [] for arm in record["arms"]}
    for run in sorted(record["runs"], key=lambda run: run["seed"]):
        if run["part"] == "final":
            groups[run["arm"]].append(run)
    return groups


def measures(record: Mapping[str, Any]) -> list[str]:
    """What was measured: `loss`, and `accuracy` of classifiers or `general_loss` of language models."""
    point = next(point for run in record["runs"] if run["part"] == "final" for point in run.get("evaluations", ()))
    return [measure for measure in MEASURES if measure in point]


def name(measure: str) -> str:
    """How a measure is written."""
    return measure.replace("_", " ")


def before(record: Mapping[str, Any]) -> str:
    """The losses before training, in a sentence; nothing in a record without them."""
    point = next((run["before"] for run in record["runs"] if "before" in run and run["arm"] == BASELINE), {})
    losses = [f"{name(measure)} {point[measure]:.3f}" for measure in MEASURES if measure in point]
    return f"Before training: {', '.join(losses)}." if losses else ""


def values(runs: Sequence[Mapping[str, Any]], measure: str, step: int) -> list[float]:
    """One value per seed that finished, in the order of the runs."""
    points = [point for run in runs for point in run.get("evaluations", ()) if point["step"] == step]
    return [point[measure] for point in points]


def compare_all(record: Mapping[str, Any]) -> dict[str, Comparisons | None]:
    """Every arm but the baseline against it, paired by seed; None where a seed of either diverged."""
    by_arm, steps = final_runs(record), record["protocol"]["evaluate_at"]
    baseline = by_arm.pop(BASELINE)
    return {
        arm: None
        if any("diverged" in run for run in (*runs, *baseline))
        else {
            measure: [
                (step, compare(values(baseline, measure, step), values(runs, measure, step), lower)) for step in steps
            ]
            for measure, lower in ((measure, MEASURES[measure]) for measure in measures(record))
        }
        for arm, runs in by_arm.items()
    }


def short_verdict(comparisons: Sequence[tuple[int, Comparison]]) -> str:
    """Such as "helps at 25 and 50"; "not distinguishable" where the intervals of all steps hold zero."""
    if any(comparison.verdict == "one seed" for _, comparison in comparisons):
        return "one seed: no verdict"
    parts = []
    for verdict, word in WORDS.items():
        steps = [str(step) for step, comparison in comparisons if comparison.verdict == verdict]
        if steps:
            parts.append(f"{word} at {' and '.join([', '.join(steps[:-1]), steps[-1]] if len(steps) > 1 else steps)}")
    return "; ".join(parts) or "not distinguishable"


def findings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is computed from a record's runs, for the record: `advice`; of final runs `summary` and `comparisons`."""
    if not record["protocol"]["seeds"]:
        return {"advice": advice(record)}
    summary = {
        arm: {
            measure: [_mean_and_spread(values(runs, measure, step)) for step in record["protocol"]["evaluate_at"]]
            for measure in measures(record)
        }
        for arm, runs in final_runs(record).items()
    }
    compared = {
        arm: comparisons
        and {
            measure: [{"step": step, **asdict(comparison)} for step, comparison in by_step]
            for measure, by_step in comparisons.items()
        }
        for arm, comparisons in compare_all(record).items()
    }
    return {"summary": summary, "comparisons": compared, "advice": advice(record)}


def best_rate(losses: Mapping[float, float]) -> float:
    """The best rate of a sweep: the lowest point of the parabola, over log(rate), through the best and its neighbours.

    At an edge it is the grid's own.
    """
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if not 0 < place < len(rates) - 1:
        return rates[place]
    x = [math.log(rate) for rate in rates[place - 1 : place + 2]]
    y = [losses[rate] for rate in rates[place - 1 : place + 2]]
    rise, fall = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (fall - rise) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - rise / (2 * bend))


def advice(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm, what was advised beside what the sweep found, means over the tuning seeds.

    `share` is the sweep's best rate over the rate at which the line turns, `ratio` the suggestion over the best rate,
    and `excess` how far the loss at the suggestion is above the lowest of the sweep, as a share of that.
    """
    by_arm: dict[str, dict[str, Any]] = {}
    for arm, choice in record["tuning"].items():
        runs = [run for run in record["runs"] if run["part"] == "advice" and run["arm"] == arm]
        if not runs:
            continue
        swept = {float(rate): loss for rate, loss in choice["losses"].items() if loss is not None}
        best, lowest = best_rate(swept), min(swept.values())
        row: dict[str, Any] = {"optimizer": runs[0].get("optimizer"), "best": best, "lowest": lowest}
        turns = [run["turn"] for run in runs if run.get("turn") is not None]
        if turns:
            row |= {"turn": statistics.geometric_mean(turns)}
            row |= {"share": best / row["turn"]}
        rates = {run["seed"]: float(f"{run['rate']:.1e}") for run in runs if run.get("rate") is not None}
        losses = [
            run["final_loss"]
            for run in record["runs"]
            if run["part"] == "tune" and run["arm"] == arm and rates.get(run["seed"]) == run["learning_rate"]
        ]
        if rates:
            row["rate"] = statistics.geometric_mean(rates.values())
            row["ratio"] = row["rate"] / best
        if losses and None not in losses:
            row["loss"] = statistics.fmean(losses)
            row["excess"] = row["loss"] / lowest - 1
        row["reasons"] = [run["reason"] for run in runs if run.get("reason")]
        by_arm[arm] = row
    return by_arm


def advice_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A table with its headings: by arm the sweep's best rate, the suggestion, and the losses at both."""
    rows = [["start", "best rate", "loss there", "line turns at", "suggested", "ratio", "loss there"]]
    for arm, row in record["advice"].items():
        cells = [
            title(arm),
            f"{row['best']:.1e}",
            f"{row['lowest']:.3f}",
            f"{row['turn']:.1e}" if "turn" in row else "-",
        ]
        if "rate" in row:
            cells += [f"{row['rate']:.1e}", f"{row['ratio']:.2f}"]
            cells.append(f"{row['loss']:.3f} ({row['excess']:+.1%})" if "loss" in row else "not run")
        else:
            cells += ["none", "-", "-"]
        rows.append(cells)
    return rows


def hits(record: Mapping[str, Any]) -> str:
    """How often the advice was within a factor of 2 of the best rate, and its loss within 1 %."""
    rows = record["advice"].values()
    near = sum("ratio" in row and 0.5 <= row["ratio"] <= 2 for row in rows)
    ends = [row["excess"] for row in rows if "excess" in row]
    good = sum(excess <= 0.01 for excess in ends)
    text = f"Of {len(rows)} arms the suggestion is within a factor of 2 of the sweep's best rate for {near}"
    if not ends:
        return f"{text}; none was run."
    return f"{text}; of {len(ends)} runs at a suggestion {good} end within 1 % of the sweep's lowest loss."


def _mean_and_spread(numbers: Sequence[float]) -> dict[str, float | int | None]:
    mean, deviation = mean_and_deviation(numbers)
    return {"mean": mean, "deviation": deviation, "seeds": len(numbers)}


def mean_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A table with its headings: by arm the rate, and mean loss and accuracy by step."""
    steps = record["protocol"]["evaluate_at"]
    rows = [["start", "rate", *(f"{name(measure)} @ {step}" for measure in measures(record) for step in steps)]]
    for arm, summary in record["summary"].items():
        choice = record["tuning"][arm]
        cells = [title(arm), f"{choice['rate']:g}{' (edge)' if choice['at_edge'] else ''}"]
        for measure in measures(record):
            form = ".1%" if measure == "accuracy" else ".3f"
            means = [point["mean"] for point in summary[measure]]
            cells += ["diverged" if mean is None else f"{mean:{form}}" for mean in means]
        rows.append(cells)
    return rows


def comparison_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A table with its headings: by arm the differences from random LoRA after the last step, and verdicts by step."""
    names = [name(measure) for measure in measures(record)]
    rows = [["start", *(f"{one} at the end" for one in names), *(f"by {one}" for one in names)]]
    for arm, comparisons in compare_all(record).items():
        if comparisons is None:
            rows.append([title(arm), *["diverged"] * 2 * len(names)])
            continue
        ends = [format_difference(by_step[-1][1], measure) for measure, by_step in comparisons.items()]
        rows.append([title(arm), *ends, *(short_verdict(by_step) for by_step in comparisons.values())])
    return rows


def chance(record: Mapping[str, Any]) -> str:
    """How many of the comparisons are expected to differ by chance."""
    seeds = len(record["protocol"]["seeds"])
    arms = sum(comparisons is not None for comparisons in compare_all(record).values())
    count = arms * len(measures(record)) * len(record["protocol"]["evaluate_at"])
    return f"{seeds} seeds; of {count} comparisons at 95 %, {0.05 * count:.1f} are expected to differ by chance."


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables, for a terminal."""
    contents = [(advice_rows(record), f"learning rates, on the validation texts. {hits(record)}")]
    if "summary" in record:
        contents = [
            (mean_rows(record), f"held-out; means over seeds. {before(record)}"),
            (comparison_rows(record), f"minus random LoRA, with 95 % t intervals. {chance(record)}"),
            *contents,
        ]
    grids = []
    for rows, caption in contents:
        grid = Table(title=record["data"]["name"], caption=caption)
        for index, heading in enumerate(rows[0]):
            grid.add_column(heading, justify="left" if index == 0 else "right")
        for row in rows[1:]:
            grid.add_row(*row)
        grids.append(grid)
    return grids


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draws the held-out measures against the step, and their differences from random LoRA; loss against seconds too.

    Above: mean over seeds, with bars from the lowest to the highest seed. Below: paired differences with their 95 % t
    intervals. The arms stand side by side at each step, in the order of the legend.
    """
    from matplotlib.figure import Figure

    by_arm, compared, steps = final_runs(record), compare_all(record), record["protocol"]["evaluate_at"]
    columns = measures(record)
    timed = all("seconds" in point for runs in by_arm.values() for run in runs for point in run.get("evaluations", ()))
    figure = Figure(figsize=(12, 13 if timed else 9), layout="constrained")
    grid = figure.add_gridspec(3 if timed else 2, len(columns))
    top = [figure.add_subplot(grid[0, column]) for column in range(len(columns))]
    bottom = [figure.add_subplot(grid[1, column], sharex=top[column]) for column in range(len(columns))]
    places = list(range(len(steps)))
    for index, (arm, runs) in enumerate(by_arm.items()):
        shift = (index - (len(by_arm) - 1) / 2) * 0.9 / max(10, len(by_arm))
        xs = [place + shift for place in places]
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 6}
        label = f"{title(arm)}, rate {record['tuning'][arm]['rate']:g}"
        for column, measure in enumerate(columns):
            scale = 100 if measure == "accuracy" else 1
            groups = [[scale * value for value in values(runs, measure, step)] for step in steps]
            if all(groups):
                means = [statistics.fmean(group) for group in groups]
                bars = [
                    [mean - min(group) for mean, group in zip(means, groups, strict=True)],
                    [max(group) - mean for mean, group in zip(means, groups, strict=True)],
                ]
                # The lines join the true places: shifted ones would look like a delay.
                top[column].plot(places, means, linewidth=1, alpha=0.6, color=style["color"])
                top[column].errorbar(xs, means, yerr=bars, linestyle="none", elinewidth=1.5, label=label, **style)
            comparisons = compared.get(arm)
            if comparisons is not None:
                differences = [scale * comparison.difference for _, comparison in comparisons[measure]]
                widths = [scale * (comparison.half_width or 0.0) for _, comparison in comparisons[measure]]
                bottom[column].errorbar(
                    xs, differences, yerr=widths, linestyle="none", elinewidth=1.5, capsize=2, **style
                )
    if timed:
        _draw_seconds(figure.add_subplot(grid[2, :]), by_arm, steps)
    for column, measure in enumerate(columns):
        above, below = top[column], bottom[column]
        unit = "%" if measure == "accuracy" else "nats"
        above.set_title(f"held-out {name(measure)}: mean, lowest and highest seed")
        above.set_ylabel(f"{name(measure)} ({unit})")
        better = "below" if MEASURES[measure] else "above"
        below.set_title(f"minus random LoRA, 95 % interval; {better} 0 is better")
        below.set_ylabel(f"difference ({'percentage points' if unit == '%' else unit})")
        below.axhline(0.0, color=_COLOURS[0], linewidth=1)
        below.set_xlabel("step")
        for axes in (above, below):
            axes.set_xticks(places, [str(step) for step in steps])
            axes.grid(axis="y", alpha=0.3)
            for place in places[1:]:
                axes.axvline(place - 0.5, color="0.9", linewidth=1, zorder=0)
    handles, labels = top[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"{record['data']['name']}; {record['model']['name']}, rank {record['protocol']['rank']}")
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_rates(record: Mapping[str, Any], path: Path) -> None:
    """Draws a panel per arm: losses of the sweep by rate, the line along the first step, and the suggested range."""
    from matplotlib.figure import Figure

    by_arm = record["advice"]
    columns = min(5, len(by_arm))
    rows = math.ceil(len(by_arm) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 2.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(by_arm) :]:
        axes.set_visible(False)
    for axes, (arm, row) in zip(panels.flat, by_arm.items(), strict=False):
        sweep = {float(rate): loss for rate, loss in record["tuning"][arm]["losses"].items() if loss is not None}
        runs = [run for run in record["runs"] if run["part"] == "advice" and run["arm"] == arm]
        start = runs[0]["line"][0][1]
        axes.plot(*zip(*sorted(sweep.items()), strict=True), "o-", color=_COLOURS[1], label="after training")
        points = [(rate, loss) for rate, loss in runs[0]["line"] if rate > 0 and loss <= 1.1 * start]
        axes.plot(*zip(*points, strict=True), "s--", color=_COLOURS[2], markersize=4, label="along the first step")
        if "rate" in row:
            axes.axvspan(runs[0]["low"], runs[0]["high"], color=_COLOURS[3], alpha=0.15, label="range")
            axes.axvline(row["rate"], color=_COLOURS[3], label="suggestion")
        axes.set(title=title(arm), xscale="log", xlabel="learning rate")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("loss (nats)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(
        f"{record['data']['name']}; {record['model']['name']}, {record['protocol']['evaluate_at'][-1]} steps"
    )
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_seconds(axes: Any, by_arm: Mapping[str, Sequence[Mapping[str, Any]]], steps: Sequence[int]) -> None:
    for index, runs in enumerate(by_arm.values()):
        seconds, losses = ([values(runs, measure, step) for step in steps] for measure in ("seconds", "loss"))
        if all(losses):
            axes.plot(
                [statistics.fmean(group) for group in seconds],
                [statistics.fmean(group) for group in losses],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
            )
    axes.set(
        title="held-out loss, means over seeds", xlabel="seconds of start and training steps", ylabel="loss (nats)"
    )
    axes.grid(alpha=0.3)
