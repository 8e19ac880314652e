"""What a record of `benchmarks.quality` says: comparisons with random LoRA, sentences, table, figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.demo.report import Comparison, compare, format_difference, stages

BASELINE = "random"
TITLES = {
    BASELINE: "random LoRA",
    "eva": "EVA",
    "lora_da": "LoRA-DA",
    "lora_ga": "LoRA-GA",
    "corda": "CorDA",
    "pissa": "PiSSA",
    "task_directions": "task directions",
    "lora_pro": "LoRA-Pro",
    "lora_pro_efficient": "LoRA-Pro, efficient",
    "lora_dash": "LoRA-Dash",
}
WORDS = {"ahead": "helps", "behind": "harms", "level": "not distinguishable"}
MEASURES = {"loss": True, "accuracy": False}  # whether lower is better
# Okabe and Ito's colours, which the colour-blind tell apart too, without their yellow, and two
# of Tol's; the shapes differ as well.
_COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F"),
    *("#882255", "#332288"),
)
_MARKERS = "osD^vPX*<h"


def title(arm: str) -> str:
    """How an arm is written."""
    return TITLES.get(arm, arm)


def final_runs(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Sorts the final runs.

    Args:
        record: with `runs`, `arms` and `protocol`.

    Returns:
        Arm to its runs in the order of the seeds.
    """
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in record["arms"]}
    for run in record["runs"]:
        if run["part"] == "final":
            found[run["arm"]].append(run)
    return {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in found.items()}


def values(runs: Sequence[Mapping[str, Any]], measure: str, step: int) -> list[float]:
    """One value per seed that finished.

    Args:
        runs: of an arm.
        measure: `loss` or `accuracy`.
        step: an evaluated step.

    Returns:
        The values in the order of the runs.
    """
    points = [point for run in runs for point in run.get("evaluations", ()) if point["step"] == step]
    return [point[measure] for point in points]


def compare_all(record: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[int, Comparison]]] | None]:
    """Every arm against random LoRA, paired by seed.

    Args:
        record: as for `final_runs`.

    Returns:
        Per arm but the baseline and measure, step and comparison; None for an arm where a seed of it, or of the
        baseline, diverged.
    """
    by_arm, steps = final_runs(record), record["protocol"]["evaluate_at"]
    found: dict[str, dict[str, list[tuple[int, Comparison]]] | None] = {}
    for arm, runs in by_arm.items():
        if arm == BASELINE:
            continue
        if any("diverged" in run for run in (*runs, *by_arm[BASELINE])):
            found[arm] = None
            continue
        found[arm] = {
            measure: [
                (step, compare(values(by_arm[BASELINE], measure, step), values(runs, measure, step), lower))
                for step in steps
            ]
            for measure, lower in MEASURES.items()
        }
    return found


def short_verdict(found: Sequence[tuple[int, Comparison]] | None) -> str:
    """The verdict by held-out loss in a few words.

    Args:
        found: step and comparison.

    Returns:
        Such as "helps at 25, 50"; "does not help" where no step is ahead.
    """
    if found is None:
        return "diverged"
    kinds = {kind: [str(step) for step, each in found if each.verdict == kind] for kind in ("ahead", "behind")}
    if any(each.verdict == "one seed" for _, each in found):
        return "one seed: no verdict"
    parts = [f"{WORDS[kind]} at {', '.join(steps)}" for kind, steps in kinds.items() if steps]
    return "; ".join(parts) if kinds["ahead"] else "; ".join(["does not help", *parts])


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Says plainly what the numbers show.

    Args:
        record: with `tuning` beside what `final_runs` reads.

    Returns:
        One line per arm, and one on chance.
    """
    lines, judged = [], 0
    for arm, found in compare_all(record).items():
        edge = ", at the edge of the rates that were tried" if record["tuning"][arm]["at_edge"] else ""
        start = f"{title(arm)} (rate {record['tuning'][arm]['rate']:g}{edge})"
        if found is None:
            lines.append(f"{start}: a seed of it or of random LoRA diverged, so there is no comparison.")
            continue
        ends = {measure: format_difference(found[measure][-1][1], measure) for measure in MEASURES}
        at_end = f"At the end {ends['loss']} in loss, {ends['accuracy']} in accuracy."
        if found["loss"][0][1].verdict == "one seed":
            lines.append(f"{start}: one seed shows no spread, so no verdict. {at_end}")
            continue
        said = [f"held-out {measure} {stages(found[measure], WORDS)}" for measure in MEASURES]
        judged += sum(len(each) for each in found.values())
        helps = [any(each.verdict == "ahead" for _, each in found[measure]) for measure in MEASURES]
        plain = {
            (False, False): " It does not help on this task.",
            (False, True): " By loss it does not help on this task.",
            (True, False): " By accuracy it does not help on this task.",
        }.get((helps[0], helps[1]), "")
        lines.append(f"{start} against random LoRA: {'; '.join(said)}. {at_end}{plain}")
    if judged:
        seeds = len(record["protocol"]["seeds"])
        lines.append(
            f"{seeds} seeds; of {judged} comparisons at 95 %, {0.05 * judged:.1f} are expected to differ by chance."
        )
    return lines


def findings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is computed from a record's runs, for the record.

    Args:
        record: as for `sentences`.

    Returns:
        `summary`, `comparisons` and `verdict`.
    """
    summary = {
        arm: {
            measure: [_mean_and_spread(values(runs, measure, step)) for step in record["protocol"]["evaluate_at"]]
            for measure in MEASURES
        }
        for arm, runs in final_runs(record).items()
    }
    compared = {
        arm: None
        if found is None
        else {measure: [{"step": step, **asdict(each)} for step, each in found[measure]] for measure in MEASURES}
        for arm, found in compare_all(record).items()
    }
    return {"summary": summary, "comparisons": compared, "verdict": sentences(record)}


def _mean_and_spread(numbers: Sequence[float]) -> dict[str, float | int | None]:
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "deviation": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "seeds": len(numbers),
    }


def rows(record: Mapping[str, Any], spread: bool = True) -> list[list[str]]:
    """The cells of the table.

    Args:
        record: a whole record.
        spread: whether to give the standard deviations too.

    Returns:
        Per arm: title, rate, loss and accuracy by step, verdict.
    """
    compared = compare_all(record)
    table_rows = []
    for arm, summary in record["summary"].items():
        chosen = record["tuning"][arm]
        cells = [title(arm), f"{chosen['rate']:g}{' (edge)' if chosen['at_edge'] else ''}"]
        for measure, form in (("loss", ".3f"), ("accuracy", ".1%")):
            for point in summary[measure]:
                text = "diverged" if point["mean"] is None else f"{point['mean']:{form}}"
                cells.append(
                    text if not spread or point["deviation"] is None else f"{text} ± {point['deviation']:{form}}"
                )
        found = compared.get(arm)
        verdict = "" if arm == BASELINE else short_verdict(None if found is None else found["loss"])
        table_rows.append([*cells, verdict])
    return table_rows


def headings(record: Mapping[str, Any]) -> list[str]:
    """The headings of `rows`."""
    steps = record["protocol"]["evaluate_at"]
    return ["start", "rate", *(f"{measure} @ {step}" for measure in MEASURES for step in steps), "by loss"]


def table(record: Mapping[str, Any]) -> Table:
    """The table of a record.

    Args:
        record: a whole record.

    Returns:
        A rich table: mean and standard deviation over seeds.
    """
    grid = Table(title=record["data"]["name"], caption="held-out; mean ± standard deviation over seeds")
    for index, heading in enumerate(headings(record)):
        grid.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows(record):
        grid.add_row(*row)
    return grid


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draws held-out loss and accuracy against the step, and their differences from random LoRA.

    Above: mean over seeds, with bars from the lowest to the highest seed. Below: paired differences with their 95 % t
    intervals. The arms stand side by side at each step, in the order of the legend.

    Args:
        record: a whole record.
        path: file to write, in the format of its suffix.
    """
    from matplotlib.figure import Figure

    by_arm, compared, steps = final_runs(record), compare_all(record), record["protocol"]["evaluate_at"]
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    places = list(range(len(steps)))
    for index, (arm, runs) in enumerate(by_arm.items()):
        shift = (index - (len(by_arm) - 1) / 2) * 0.09
        xs = [place + shift for place in places]
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 6}
        label = f"{title(arm)}, rate {record['tuning'][arm]['rate']:g}"
        for column, measure in enumerate(MEASURES):
            scale = 100 if measure == "accuracy" else 1
            groups = [[scale * value for value in values(runs, measure, step)] for step in steps]
            if all(groups):
                means = [statistics.fmean(group) for group in groups]
                bars = [
                    [mean - min(group) for mean, group in zip(means, groups, strict=True)],
                    [max(group) - mean for mean, group in zip(means, groups, strict=True)],
                ]
                # The lines join the true places: shifted ones would look like a delay.
                panels[0][column].plot(places, means, linewidth=1, alpha=0.6, color=style["color"])
                panels[0][column].errorbar(xs, means, yerr=bars, linestyle="none", elinewidth=1.5, label=label, **style)
            found = compared.get(arm)
            if found is not None:
                differences = [scale * each.difference for _, each in found[measure]]
                widths = [scale * (each.half_width or 0.0) for _, each in found[measure]]
                panels[1][column].errorbar(
                    xs, differences, yerr=widths, linestyle="none", elinewidth=1.5, capsize=2, **style
                )
    for column, (measure, unit) in enumerate((("loss", "nats"), ("accuracy", "%"))):
        top, bottom = panels[0][column], panels[1][column]
        top.set_title(f"held-out {measure}: mean, lowest and highest seed")
        top.set_ylabel(f"{measure} ({unit})")
        better = "below" if MEASURES[measure] else "above"
        bottom.set_title(f"minus random LoRA, 95 % interval; {better} 0 is better")
        bottom.set_ylabel(f"difference ({'percentage points' if unit == '%' else unit})")
        bottom.axhline(0.0, color=_COLOURS[0], linewidth=1)
        bottom.set_xlabel("step")
        for axes in (top, bottom):
            axes.set_xticks(places, [str(step) for step in steps])
            axes.grid(axis="y", alpha=0.3)
            for place in places[1:]:
                axes.axvline(place - 0.5, color="0.9", linewidth=1, zorder=0)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"{record['data']['name']}; {record['model']['name']}, rank {record['protocol']['rank']}")
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
