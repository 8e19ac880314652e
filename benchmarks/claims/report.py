"""The claims' tables, the headings first, and their figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.demo import study_report

Rows = list[list[str]]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
HUNDRED = 100
COSTS = "rates_gsm8k"  # the record that `costs` are read from


def equivalent_rows(entry: Mapping[str, Any]) -> Rows:
    """Distances from the gradient of the full weight: the first step's, and means over the others."""
    rows = [["steps of", "first step", "later steps", "with the best scale", "least that B and A allow", "after Adam"]]
    for arm, one in entry["arms"].items():
        later = [statistics.fmean(one[measure][1:]) for measure in ("distance", "scaled", "closest", "taken")]
        rows.append([arm, f"{one['distance'][0]:.4f}", *(f"{value:.4f}" for value in later)])
    return rows


def direction_rows(entry: Mapping[str, Any]) -> Rows:
    """Hit rates by the step of the selection, with random factors and chance."""
    rows = [["selection", "hits, by rate", "hits, by size", "own end, by rate", "own end, by size"]]
    for step, rates in entry["hits_of_full"].items():
        own = entry["hits_of_own_end"].get(step)
        cells = [f"{rates[ranking]:.1%}" for ranking in ("rate", "size")]
        cells += ["–"] * 2 if own is None else [f"{own[ranking]:.1%}" for ranking in ("rate", "size")]
        rows.append([f"LoRA after {step} steps", *cells])
    rows.append(["random factors", *(f"{entry['random_factors'][key]:.1%}" for key in ("rate", "size")), "–", "–"])
    return [*rows, ["chance", *[f"{entry['chance']:.1%}"] * 4]]


def end_rows(entry: Mapping[str, Any]) -> Rows:
    """One end a row; of its layers, values are separated by a comma."""
    rows = [["decay", "start", "verdict", "objective / best", "loss", "rank", "of W", "s G / lambda", "balance"]]
    for run in entry["runs"]:
        layers = run["layers"]
        columns = [
            ", ".join(str(layer["numerical_rank"]) for layer in layers),
            ", ".join(f"{layer['frobenius_share']:.2g}" for layer in layers),
            ", ".join("–" if layer["ratio"] is None else f"{layer['ratio']:.3f}" for layer in layers),
            ", ".join(f"{layer['balance']:.0e}" for layer in layers),
        ]
        settings = [f"{run['decay_share']:g}", f"{run['start']:g}", run["verdict"].replace("_", " ")]
        rows.append([*settings, f"{run['over_best']:.3f}", f"{run['loss']:.3f}", *columns])
    return rows


def costs(record: Mapping[str, Any]) -> dict[str, tuple[float, float, int]]:
    """By start of a rate study: medians of its seconds and of their share of 100 steps, and how many runs."""
    steps = record["protocol"]["evaluate_at"][-1]
    by_arm: dict[str, list[tuple[float, float]]] = {}
    for run in record["runs"]:
        reads = run["arm"] == study_report.BASELINE or record["arms"][run["arm"]]["recipe"]["method"] is not None
        if reads and "init_seconds" in run:  # advice and diverged runs have no times
            share = run["init_seconds"] / (run["train_seconds"] * HUNDRED / steps)
            by_arm.setdefault(run["arm"], []).append((run["init_seconds"], share))
    return {
        arm: (*(statistics.median(column) for column in zip(*values, strict=True)), len(values))  # type: ignore[misc]
        for arm, values in by_arm.items()
    }


def cost_rows(record: Mapping[str, Any]) -> Rows:
    """Seconds of every start, over those of the run's training and of 100 steps, and of how many steps it is 1%."""
    steps = record["protocol"]["evaluate_at"][-1]
    rows = [["start", "runs", "s", f"of {steps} training steps", f"of {HUNDRED} training steps", "1% of (steps)"]]
    for arm, (seconds, share, count) in costs(record).items():
        shares = [f"{share * HUNDRED / steps:.1%}", f"{share:.1%}", f"{HUNDRED * share / 0.01:.0f}"]
        rows.append([study_report.title(arm), str(count), f"{seconds:.3g}", *shares])
    return rows


def equivalent_verdict(entry: Mapping[str, Any]) -> str:
    """Whether LoRA-Pro's claim shows, before Adam and after it."""
    means = {
        arm: {key: statistics.fmean(one[key][1:]) for key in ("distance", "scaled", "closest", "taken")}
        for arm, one in entry["arms"].items()
    }
    plain, efficient, full = means.values()
    excess = max(one["distance"] / one["closest"] - 1 for one in (efficient, full))
    before = max(efficient["distance"], full["distance"]) < plain["scaled"]
    after = [
        f"{_shows(one['taken'] < plain['taken'])} for {name}"
        for name, one in (("efficient", efficient), ("full", full))
    ]
    return (
        f"Before Adam the claim {_shows(before)}: both modes come within {excess:.1%} of the least distance that their "
        f"factors allow, plain LoRA stays at {plain['distance']:.3f} ({plain['scaled']:.3f} with the best scale). "
        f"After Adam it {' and '.join(after)} ({efficient['taken']:.3f} and {full['taken']:.3f} against LoRA's "
        f"{plain['taken']:.3f}). All are far from G: chance, the least distance that random factors of rank "
        f"{entry['rank']} allow, is {entry['baselines']['chance']:.3f}, and the first Adam step on W itself, "
        f"whose entries are signs, is at {entry['baselines']['sign']:.3f}."
    )


def direction_verdict(entry: Mapping[str, Any]) -> str:
    """Whether LoRA finds most directions of full training, and more than random factors do."""
    step, last = list(entry["hits_of_full"].items())[-1]
    lines = []
    for ranking in ("rate", "size"):
        hit, random = last[ranking], entry["random_factors"][ranking]
        more = f"{hit / random:.1f} times as many as" if hit > random else "no more than"
        lines.append(
            f"That LoRA finds most of them {_shows(hit > max(0.5, random))} by {ranking}: {hit:.0%} after {step} "
            f"steps, {more} random factors ({random:.0%})."
        )
    return " ".join(lines)


def end_verdict(entry: Mapping[str, Any]) -> str:
    """How many ends are low-rank minima, from which start; and how many are loud."""
    starts = sorted({run["start"] for run in entry["runs"]})
    counts = []
    for start in starts:
        kinds = [run["verdict"] for run in entry["runs"] if run["start"] == start]
        words = ", ".join(f"{kinds.count(kind)} {kind.replace('_', ' ')}" for kind in dict.fromkeys(kinds))
        counts.append(f"from {start:g} {words}")
    loud = any(run["verdict"] == "loud_failure" for run in entry["runs"])
    alike = sum(run["over_best"] < 1.001 for run in entry["runs"])
    return (
        f"Ends by start: {'; '.join(counts)}. That small starts end at certified minima of low rank "
        f"{_shows(all(run['verdict'] == 'low_rank_minimum' for run in entry['runs'] if run['start'] == starts[0]))}; "
        f"that large ones fail loudly {_shows(loud)}. {alike} of {len(entry['runs'])} ends have the lowest objective "
        "of their decay within 0.1%, whatever their start."
    )


def cost_verdict(record: Mapping[str, Any]) -> str:
    """Which starts are cheap already in 100 steps."""
    by_arm = {arm: share for arm, (_, share, _) in costs(record).items() if arm != study_report.BASELINE}
    cheap = [study_report.title(arm) for arm, share in by_arm.items() if share < 0.01]
    return (
        f"In {HUNDRED} steps a start below 1% {_shows(len(cheap) == len(by_arm))} for all methods: it is "
        f"{', '.join(cheap) or 'none'} of {len(by_arm)}. A start costs the same whatever follows, so that its share "
        "falls with the length of training."
    )


def _shows(does: bool) -> str:
    return "shows" if does else "does not show"


def draw(entries: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> Any:
    """The four claims, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    (distance, hit), (end, cost) = figure.subplots(2, 2)
    _draw_distances(distance, entries["equivalent"])
    _draw_hits(hit, entries["directions"])
    _draw_ends(end, entries["ends"])
    shares = {study_report.title(arm): share for arm, (_, share, _) in costs(record).items()}
    cost.barh(range(len(shares)), [100 * share for share in shares.values()], color=COLOURS[0])
    cost.set_yticks(range(len(shares)), list(shares))
    cost.invert_yaxis()
    cost.set(xlabel=f"start, % of {HUNDRED} training steps", title="seconds of the start")
    for axes in (distance, hit, end, cost):
        axes.grid(alpha=0.3)
    return figure


def _draw_distances(axes: Any, entry: Mapping[str, Any]) -> None:
    for (arm, one), colour in zip(entry["arms"].items(), COLOURS, strict=False):
        steps = range(1, 1 + len(one["distance"]))
        axes.plot(steps, one["distance"], color=colour, marker="o", markersize=3, label=arm)
        axes.plot(steps, one["closest"], color=colour, linestyle=":", linewidth=2)
    axes.axhline(
        entry["baselines"]["chance"], color="0.3", linestyle="--", linewidth=1, label="random B and A, at best"
    )
    axes.set(xlabel="step", ylabel="|G - E| / |G|", title="distance from the full gradient (dotted: least possible)")
    axes.legend(fontsize=7)


def _draw_hits(axes: Any, entry: Mapping[str, Any]) -> None:
    for ranking, colour in zip(("rate", "size"), COLOURS, strict=False):
        hits = {int(step): rates[ranking] for step, rates in entry["hits_of_full"].items()}
        axes.plot(
            hits.keys(), [100 * value for value in hits.values()], color=colour, marker="o", label=f"by {ranking}"
        )
        random = 100 * entry["random_factors"][ranking]
        axes.axhline(random, color=colour, linestyle="--", linewidth=1, label=f"random factors, by {ranking}")
    axes.axhline(100 * entry["chance"], color="0.3", linestyle=":", label="chance")
    axes.set(xlabel="steps of LoRA before the selection", ylabel="%", ylim=(0, 1.5 * axes.get_ylim()[1]))
    axes.set_title("selected directions that full training changes most")
    axes.legend(fontsize=7)


def _draw_ends(axes: Any, entry: Mapping[str, Any]) -> None:
    starts = sorted({run["start"] for run in entry["runs"]})
    for share, colour in zip(sorted({run["decay_share"] for run in entry["runs"]}), COLOURS, strict=False):
        runs = {run["start"]: run for run in entry["runs"] if run["decay_share"] == share}
        ranks = [_mean_rank(runs[start]["layers"]) for start in starts]
        axes.plot(range(len(starts)), ranks, color=colour, marker="o", label=f"decay {share:g}")
    axes.axhline(entry["rank"], color="0.3", linestyle=":", linewidth=1)
    axes.set_xticks(range(len(starts)), [f"{start:g}" for start in starts])
    axes.set(xlabel="|s B A| / |W| at the start", ylabel="numerical rank, mean", title="rank at the end (dotted: r)")
    axes.set_ylim(0, None)
    axes.legend(fontsize=7)


def _mean_rank(layers: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(layer["numerical_rank"] for layer in layers) if layers else math.nan
