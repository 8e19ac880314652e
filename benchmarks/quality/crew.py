"""The runs of a study of quality: what does them, in this process or in others, and where they are kept."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.demo.batches import Batches, load_tokenizer, model_folder
from benchmarks.demo.config import DemoConfig
from benchmarks.demo.run import quiet_transformers
from benchmarks.demo.task import DivergedError, RunRecord, train_run
from benchmarks.quality.protocol import Job, Setup, read

CONSOLE = Console(width=None if sys.stdout.isatty() else 160)
CURVE_EVERY = 10


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
