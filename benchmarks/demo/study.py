"""Which start, which optimizer, which variant helps a language model? `python -m benchmarks.demo.study [--data FILE]`.

FILE is a `.jsonl` or `.csv` file with `question` and `answer`, or with `text`; the record keeps counts and digests
alone. Without it the texts are the demo's generated word problems.

Protocol:

- SmolLM2-135M-Instruct, LoRA (alpha = rank, so scaling 1, but for rsLoRA) on every linear layer but the head, on
  accelerated layers, AdamW without weight decay, linear warm-up over a tenth of the steps, then a constant rate, so
  that losses at equal seconds can be compared, gradients clipped to norm 1. All arms of a seed share the order of the
  batches.
- Data-aware methods read the first batches that training will read. Methods that keep the model's function subtract
  their start beside the adapter (`base="intact"`). LoRA-Pro, LoRA-Dash, DoRA and rsLoRA start from random LoRA;
  LoRA-Dash selects its directions after half of the steps.
- The rate is tuned for every arm by itself, over one grid, for the loss after the last step; where the best is at the
  edge the grid is extended on that side, twice at most, and `at_edge` says if that was not enough. Rates are chosen
  with seeds that are not used again, on validation texts that no run trains on; the test texts play no part in it.
  The results at earlier steps are those of the same runs: no rate is tuned for them.
- `general_loss` is the loss on docstrings of the standard library, text that no run trains on: what it gains over its
  value before training is forgotten.
- Arms are compared with random LoRA, paired by seed: a 95 % t interval of the mean difference.
- `advice` sets what `lk.suggest_learning_rate` says, before training and on the batches that the start read, beside the
  sweep: the turn of the line, the suggestion, and the validation loss of a run at the suggested rate. The advice for a
  seed sees no text of the sweep's evaluation. `--rates` stops there: rates and advice, without final runs.

Every run is a function of (arm, seed, rate) alone, on one thread; `--workers` of them go on at a time. Seconds in the
record are those of runs side by side: `--workers 1` on a quiet machine if they are to be quoted.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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

import lora_kernels as lk
from benchmarks import language_model, records
from benchmarks.demo import study_report as report
from benchmarks.demo.model import load, quiet_transformers
from benchmarks.demo.side import GRADIENT_CLIP, WARMUP_SHARE, DivergedError, Recipe, Side, mean_loss, prepare
from benchmarks.demo.study_report import BASELINE
from benchmarks.demo.texts import Batch, Encoder, Example, Task, read_task, word_problems
from benchmarks.docstrings import MASK, docstring_task
from lora_kernels.api.learning_rate import SHARES
from lora_kernels.init import EVA, CorDA, LoraDA, LoraGA, LoraOne, PiSSA, TaskDirections

CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
CURVE_EVERY = 10  # the record keeps means of so many training losses


@dataclass(frozen=True)
class Arm:
    """What is compared: how an adapter starts and trains, and its grid of rates."""

    recipe: Recipe = Recipe(accelerate=True)
    rates: tuple[float, ...] | None = None

    def settings(self) -> dict[str, Any]:
        """For the record: what a run of it depends on."""
        settings: dict[str, Any] = {"recipe": asdict(self.recipe)}
        if self.recipe.method is not None:
            settings["method"] = getattr(self.recipe.method, "name", self.recipe.method)
        return settings


# What `lk.suggest_learning_rate` calls the optimizer of a recipe.
ADVISED = {"adamw": "adamw", "lora_pro": "lora_pro_full", "lora_pro_efficient": "lora_pro"}


# Variants, such as {"eva_rho2": _start(EVA(rho=2.0))}, are added here.
def _start(method: Any) -> Arm:
    return Arm(Recipe(method, accelerate=True))


ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "eva": _start(EVA()),
    "lora_da": _start(LoraDA()),
    "lora_ga": _start(LoraGA()),
    "lora_one": _start(LoraOne()),
    "corda": _start(CorDA()),
    "pissa": _start(PiSSA()),
    "task_directions": _start(TaskDirections()),
    # Its full mode moves W by its rate, as full fine-tuning does, so its rates are those of full fine-tuning.
    "lora_pro": Arm(Recipe(accelerate=True, optimizer="lora_pro"), rates=(1e-5, 3e-5, 1e-4, 3e-4)),
    "lora_pro_efficient": Arm(Recipe(accelerate=True, optimizer="lora_pro_efficient")),
    "lora_dash": Arm(Recipe(accelerate=True, dash=0.5)),
    "dora": Arm(Recipe(accelerate=True, use_dora=True)),
    "rslora": Arm(Recipe(accelerate=True, use_rslora=True)),
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a result depends on, but for the model, the data and the arms.

    Attributes:
        rank: of the adapter.
        evaluate_at: steps after which the test texts are evaluated; the last one is the length of a run.
        batch_size: texts per step.
        max_tokens: texts are cut to this length.
        init_batches: batches that a start reads.
        rates: the grid of rates.
        extensions: how often a grid may grow by one value at an edge.
        tuning_seeds: of the runs that choose rates, by their mean loss.
        seeds: of the final runs; there are none without.
        held_out: test texts, and as many validation texts.
        general: texts of which the general loss is measured.
    """

    rank: int = 8
    evaluate_at: tuple[int, ...] = (5, 10, 20, 40, 60)
    batch_size: int = 4
    max_tokens: int = 160
    init_batches: int = 8
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    extensions: int = 2
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 64
    general: int = 64

    @property
    def steps(self) -> int:
        """Length of a run."""
        return self.evaluate_at[-1]


QUICK = Protocol(
    rank=4,
    evaluate_at=(2, 4, 8),
    init_batches=2,
    rates=(1e-3, 1e-2),
    extensions=0,
    tuning_seeds=(100,),
    seeds=(0,),
    held_out=4,
    general=4,
)


SHORT = Protocol(
    evaluate_at=(10, 30), max_tokens=128, tuning_seeds=(100,), held_out=48, general=32, rates=(3e-4, 1e-3, 3e-3)
)


class Job(NamedTuple):
    """One run. `part` is `tune` (evaluated once, on the validation texts), `final` or `advice` (rate 0, untrained)."""

    part: str
    arm: str
    seed: int
    rate: float


@dataclass(frozen=True)
class Setup:
    """What a process needs to do any job.

    Attributes:
        data: a file of texts; generated word problems where None.
        model: a model folder; SmolLM2-135M-Instruct where None.
        protocol: the protocol.
        arms: by name.
        cores: a folder for the decompositions of the base weights; made anew in every run where None.
    """

    data: Path | None = None
    model: Path | None = None
    protocol: Protocol = field(default_factory=Protocol)
    arms: Mapping[str, Arm] = field(default_factory=lambda: dict(ARMS))
    cores: Path | None = None

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return language_model.folder() if self.model is None else self.model


def read(setup: Setup) -> dict[str, Task]:
    """The tasks: `final` with the test texts, `tune` with the validation texts, both with the same training texts."""
    wanted = 2 * setup.protocol.held_out
    task = word_problems(wanted) if setup.data is None else read_task(setup.data, wanted)
    half = len(task.test) // 2
    if not half:
        raise ValueError(f"data is {str(setup.data)!r}, but must have at least 10 different texts")
    return {"final": replace(task, test=task.test[half:]), "tune": replace(task, test=task.test[:half])}


def general_texts(count: int) -> tuple[Example, ...]:
    """Docstrings of the standard library, evenly from all of its packages."""
    texts = [example.text for example in docstring_task().test if MASK not in example.text]
    return tuple(Example("", text) for text in texts[:: max(1, len(texts) // count)][:count])


class Worker:
    """Does jobs, on one thread; reads data and model once."""

    def __init__(self, setup: Setup) -> None:
        quiet_transformers()
        self.setup = setup
        protocol = setup.protocol
        self.base, tokenizer = load(setup.folder, "cpu")
        self.encoder = Encoder(tokenizer, protocol.max_tokens)
        tasks = read(setup)
        self.train = self.encoder.usable(tasks["final"].train)
        self.held_out = {part: self.encoder.by_length(self.encoder.usable(task.test)) for part, task in tasks.items()}
        self.general = self.encoder.by_length(self.encoder.usable(general_texts(protocol.general)))

    def run(self, job: Job) -> dict[str, Any]:
        """The run's entry in the record."""
        entry = {"part": job.part, "arm": job.arm, "seed": job.seed, "learning_rate": job.rate}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        try:
            entry |= self._advice(job) if job.part == "advice" else self._train(job)
        except DivergedError as error:
            entry |= {"final_loss": None, "diverged": str(error)}
        finally:
            torch.set_num_threads(threads)
        return {**entry, "seconds": round(time.perf_counter() - started, 2)}

    def _prepared(self, job: Job) -> tuple[Side, list[Batch]]:
        """The side of a job, and the batches of its steps."""
        protocol = self.setup.protocol
        stream = self.encoder.shuffled(self.train, protocol.batch_size, job.seed)
        batches = list(itertools.islice(stream, max(protocol.steps, protocol.init_batches)))
        recipe = self.setup.arms[job.arm].recipe
        options = {"steps": protocol.steps, "rank": protocol.rank, "seed": job.seed, "cores": self.setup.cores}
        return prepare(job.arm, recipe, self.base, job.rate, batches[: protocol.init_batches], **options), batches

    def _advice(self, job: Job) -> dict[str, Any]:
        side, batches = self._prepared(job)
        optimizer = ADVISED[self.setup.arms[job.arm].recipe.optimizer]
        advice = lk.suggest_learning_rate(
            side.model, batches[: self.setup.protocol.init_batches], optimizer=optimizer
        ).to_dict()
        return {key: advice[key] for key in ("optimizer", "turn", "rate", "low", "high", "reason", "line")}

    def _train(self, job: Job) -> dict[str, Any]:
        protocol = self.setup.protocol
        side, batches = self._prepared(job)
        final = job.part == "final"
        before = self._measured(side, job.part) if final else None
        evaluations = []
        for number, batch in enumerate(batches[: protocol.steps], start=1):
            side.step(batch)
            if number == protocol.steps or (final and number in protocol.evaluate_at):
                evaluations.append(self._measured(side, job.part))
        curve = [side.train_loss[i : i + CURVE_EVERY] for i in range(0, protocol.steps, CURVE_EVERY)]
        return {
            "final_loss": evaluations[-1]["loss"],
            **({} if before is None else {"before": before}),
            "evaluations": evaluations,
            "init_seconds": round(side.start_seconds, 3),
            "train_seconds": round(sum(side.step_seconds), 2),
            "trainable_parameters": sum(parameter.numel() for parameter in side.parameters),
            "train_loss": [round(statistics.fmean(part), 4) for part in curve],
        }

    def _measured(self, side: Side, part: str) -> dict[str, Any]:
        point = side.evaluate(self.held_out[part])
        general = {"general_loss": mean_loss(side.model, self.general)} if part == "final" else {}
        return {"step": point.step, "seconds": round(point.seconds, 3), "loss": point.loss, **general}


_WORKERS: list[Worker] = []  # of this process


def _start(setup: Setup) -> None:
    _WORKERS[:] = [Worker(setup)]


def _work(job: Job) -> dict[str, Any]:
    return _WORKERS[0].run(job)


# What a protocol says of which runs there are; a run does not depend on it. Runs that are evaluated once, at their end,
# depend on their length alone.
_LISTS = ("rates", "extensions", "tuning_seeds", "seeds")


def _identities(common: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """By part and arm, a digest of all that a run depends on, but for its seed and its rate."""
    protocol = {key: value for key, value in common.get("protocol", {}).items() if key not in _LISTS}
    once = {**protocol, "evaluate_at": protocol.get("evaluate_at", ())[-1:]}
    return {
        (part, arm): hashlib.sha256(
            json.dumps(
                {**common, "protocol": protocol if part == "final" else once, "arms": settings}, sort_keys=True
            ).encode()
        ).hexdigest()
        for arm, settings in common.get("arms", {}).items()
        for part in ("tune", "advice", "final")
    }


class Runs:
    """Does jobs once, in `workers` processes (1: in this one), and keeps their entries, also in a file of JSON lines.

    A study that was killed goes on from that file: entries of another study, and a line that was cut off, do not count.
    `common` is the study's, with all arms. A run depends on its own arm and on no list of what else is run, so arms,
    rates and seeds may be added later, also to the runs of `records`, those of other studies that count.
    """

    def __init__(
        self,
        setup: Setup,
        workers: int,
        path: Path | None,
        common: Mapping[str, Any],
        records: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.entries: dict[Job, dict[str, Any]] = {}
        self._path = path
        self._studies = _identities(common)
        for record in records:
            settings = {key: record[key] for key in ("model", "protocol", "data", "arms")}
            theirs = _identities({**settings, "versions": record["environment"]["versions"]})
            for entry in record["runs"]:
                key = entry["part"], entry["arm"]
                if theirs.get(key) == self._studies.get(key):
                    self.entries[_job(entry)] = entry
        for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.pop("study") == self._studies.get((entry["part"], entry["arm"])):
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
                    file.write(
                        "\n"
                        + json.dumps({"study": self._studies[entry["part"], entry["arm"]], **entry}, allow_nan=False)
                    )
            end = f"diverged: {entry['diverged']}" if "diverged" in entry else _outcome(entry)
            CONSOLE.print(
                f"{number}/{len(missing)} {entry['part']} {entry['arm']}, seed {entry['seed']}, rate "
                f"{entry['learning_rate']:g}: {end} ({entry['seconds']:.0f} s)",
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


def _outcome(entry: Mapping[str, Any]) -> str:
    return f"turn {entry['turn']}" if entry["part"] == "advice" else f"loss {entry['final_loss']:.4f}"


def _job(entry: Mapping[str, Any]) -> Job:
    return Job(entry["part"], entry["arm"], entry["seed"], entry["learning_rate"])


Losses = dict[tuple[str, float], float | None]


def _suggested(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """What today's shares suggest for a line that was measured, perhaps with others."""
    if entry["reason"] is not None or entry["turn"] is None:
        return {"rate": None, "low": None, "high": None}
    return {name: entry["turn"] * share for name, share in SHARES[entry["optimizer"]]._asdict().items()}


def _rounded(rate: float) -> float:
    """A suggested rate as one would type it: two digits."""
    return float(f"{rate:.1e}")


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


def study(
    setup: Setup, workers: int = 1, resume: Path | None = None, check: bool = True, extend: Sequence[Path] = ()
) -> dict[str, Any]:
    """Run a whole study.

    Args:
        setup: data, model, protocol, arms.
        workers: how many runs go on at a time.
        resume: where finished runs are kept, and read from.
        check: whether the suggested rates are tried as well.
        extend: records of other studies, whose runs count where everything that they depend on is the same.

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
            "schedule": "constant after the warm-up",
            "warmup_share": WARMUP_SHARE,
            "gradient_clip": GRADIENT_CLIP,
            "threads_per_run": 1,
        },
        "data": _data(setup),
        "arms": {name: arm.settings() for name, arm in setup.arms.items()},
    }

    here = records.environment()
    others = [json.loads(path.read_text(encoding="utf-8")) for path in extend]
    with Runs(setup, workers, resume, {**common, "versions": here["versions"]}, others) as runs:

        def of_arms(wanted: list[tuple[str, float]]) -> Losses:
            tried = {
                (arm, rate): [Job("tune", arm, seed, rate) for seed in protocol.tuning_seeds] for arm, rate in wanted
            }
            runs.do([job for jobs in tried.values() for job in jobs])
            return {pair: runs.mean_loss(jobs) for pair, jobs in tried.items()}

        grids = {name: arm.rates or protocol.rates for name, arm in setup.arms.items()}
        tuning = tune(grids, protocol.extensions, of_arms)
        CONSOLE.print(f"rates: { {arm: choice['rate'] for arm, choice in tuning.items()} }", highlight=False)
        # LoRA-Dash starts as random LoRA does, and is random LoRA until it selects its directions.
        asked = [
            Job("advice", arm, seed, 0.0) for arm in setup.arms if arm != "lora_dash" for seed in protocol.tuning_seeds
        ]
        advice = {job: {**entry, **_suggested(entry)} for job, entry in zip(asked, runs.do(asked), strict=True)}
        if check:
            of_arms([(entry["arm"], _rounded(entry["rate"])) for entry in advice.values() if entry["rate"] is not None])
        final = [Job("final", arm, seed, tuning[arm]["rate"]) for seed in protocol.seeds for arm in setup.arms]
        runs.do(final)
    order = list(setup.arms)
    tuned = sorted(
        (job for job in runs.entries if job.part == "tune"),
        key=lambda job: (order.index(job.arm), job.rate, job.seed),
    )
    record = {
        **common,
        "processors": sorted({here["processor"]}.union(*map(processors, others))),
        "workers": workers,
        "tuning": tuning,
        "seconds": {
            "this process": round(time.perf_counter() - started, 1),
            "all runs": round(sum(entry["seconds"] for entry in runs.entries.values()), 1),
        },
        "runs": [advice.get(job) or runs.entries[job] for job in (*tuned, *asked, *final)],
    }
    return {**record, **report.findings(record)}


def processors(record: Mapping[str, Any]) -> list[str]:
    """Those that the runs of a record may have been done on."""
    return record.get("processors") or [record["environment"]["processor"]]


def _model(setup: Setup) -> dict[str, str]:
    if setup.model is None:
        return {"name": language_model.NAME, "weights": language_model.WEIGHTS, "sha256": language_model.SHA256}
    weights = next(iter(sorted(setup.model.glob("*.safetensors"))), setup.model / "config.json")
    return {"name": setup.model.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}


def _data(setup: Setup) -> dict[str, Any]:
    tasks = read(setup)
    final, tuning = tasks["final"], tasks["tune"]
    return {
        "name": final.name,
        "train": len(final.train),
        "validation": len(tuning.test),
        "test": len(final.test),
        "sha256": {"final": final.fingerprint, "tune": tuning.fingerprint},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study and write its record and its figure."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="a .jsonl or .csv file; default: generated word problems")
    parser.add_argument("--name", help="of the record: quality_NAME; default: that of the data")
    parser.add_argument("--model", type=Path, help="a model folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rank", type=int, help="of the adapters; default: 8, and 4 with --quick")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished runs here, and go on from them")
    parser.add_argument(
        "--cores", type=Path, metavar="FOLDER", help="keep decompositions of base weights here, which take minutes"
    )
    parser.add_argument(
        "--extend", nargs="+", type=Path, default=[], metavar="RECORD", help="runs of these records are not done again"
    )
    parser.add_argument("--rates", action="store_true", help="rates and advice only: the record is rates_NAME")
    parser.add_argument("--unchecked", action="store_true", help="no runs at the suggested rates")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--short", action="store_true", help="30 steps and one tuning seed")
    length.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the record and the figure")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    if options.rank is not None and options.rank < 1:
        parser.error("--rank must be at least 1")
    # For the workers, which import everything anew.
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    arms = {name: arm for name, arm in ARMS.items() if name == BASELINE or name in options.arms}
    protocol = QUICK if options.quick else SHORT if options.short else Protocol()
    if options.rates:
        protocol = replace(protocol, seeds=())
    if options.rank is not None:
        protocol = replace(protocol, rank=options.rank)
    setup = Setup(options.data, options.model, protocol, arms, options.cores)
    record = study(setup, options.workers, options.resume, not options.unchecked, options.extend)
    data = "word_problems" if options.data is None else options.data.resolve().stem
    kind = "rates" if options.rates else "quality"
    file = records.save(f"{kind}_{options.name or data}{'_quick' if options.quick else ''}", record, options.out)
    (report.draw_rates if options.rates else report.draw)(record, file.with_suffix(".png"))
    CONSOLE.print(*report.tables(record))
    CONSOLE.print(f"record: {file}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
