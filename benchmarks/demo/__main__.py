"""Fine-tune a real language model with stock PEFT and with lora_kernels, step by step in turn: `make demo`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lora_kernels as lk
from benchmarks import language_model, records
from benchmarks.demo import plots, report
from benchmarks.demo.config import OURS, QUICK, RANDOM, STOCK, STOCK_RATE, DemoConfig
from benchmarks.demo.model import load, quiet_transformers
from benchmarks.demo.roundtrip import check_round_trip
from benchmarks.demo.side import Recipe, Side, prepare, timed
from benchmarks.demo.texts import Batch, Encoder, Example, Task, read_task, word_problems

CHECKED_TEXTS = 4
UNTUNED = "PEFT's rate was not tuned, and at its best rate PEFT may end as low or lower: try --rate 3e-3 1e-3."
PROMPT_WORDS = 12  # of a text without a question, what is continued


def run(config: DemoConfig, console: Console | None = None) -> int:
    """Run the demo and write its results into `config.out`.

    Args:
        config: settings.
        console: where to print; standard output by default.

    Returns:
        0, or 1 if the saved adapter does not give the same logits in a fresh process.

    Raises:
        ValueError: if the data or the model cannot be used, or a side diverged.
    """
    # A log file has no width of its own; 80 columns would break the lines.
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    quiet_transformers()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return _Demo(config, console).run()
    finally:
        torch.set_num_threads(threads)


class _Demo:
    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.started = time.perf_counter()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.folder = language_model.folder() if config.model is None else config.model
        self.base, self.tokenizer = load(self.folder, device)
        self.encoder = Encoder(self.tokenizer, config.max_tokens, device)
        self.task = self._task()
        self.held_out = self.encoder.by_length(self.task.test)

    def _task(self) -> Task:
        config = self.config
        if config.data is None:
            task = word_problems(config.held_out, config.seed)
        else:
            task = read_task(config.data, config.held_out, config.seed)
        train, test = (self.encoder.usable(part) for part in (task.train, task.test))
        if not (train and test):
            raise ValueError(
                f"max_tokens is {config.max_tokens}, but must leave room for answers: of {len(task.train)} training "
                f"and {len(task.test)} held-out texts {len(train)} and {len(test)} have one"
            )
        return Task(task.name, train, test)

    def _batches(self) -> Any:
        return self.encoder.shuffled(self.task.train, self.config.batch_size, self.config.seed)

    def _print(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, highlight=False, markup=False)

    def run(self) -> int:
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        name = language_model.NAME if config.model is None else config.model.name
        self._print(
            f"Model: {name}, rank {config.rank} on every linear layer; {config.steps} steps of each side, in turn"
        )
        texts = f"{len(self.task.train)} training and {len(self.task.test)} held-out texts"
        self._print(
            f"Data:  {self.task.name}; {texts}; {config.batch_size} in a step, cut to {config.max_tokens} tokens"
        )
        shown = self.task.test[0]
        before = self._answer(self.base, shown)
        stock, ours = self._sides()
        memory = self._train(stock, ours)

        measures = report.rows(stock, ours, memory)
        self.console.print(report.table(measures))
        verdict = report.verdict(measures, ours.start_seconds / statistics.median(ours.step_seconds))
        if config.rate is None:
            verdict.append(UNTUNED)
        for line in verdict:
            self._print(line)
        curves = {f"{side.name}, rate {side.rate:g}": side.evaluations for side in (stock, ours)}
        plots.plot_losses(curves, config.out / "loss.png")
        answers = {"prompt": self._prompt(shown), "reference": shown.answer.strip(), "before": before}
        answers |= {side.name: self._answer(side.model, shown) for side in (stock, ours)}
        for title, text in zip(
            ("Prompt", "Right answer", "Before", "After, stock PEFT", "After, lora_kernels"),
            answers.values(),
            strict=True,
        ):
            self._print(f"\n{title}:", "bold")
            self._print(text)
        adapter = config.out / "adapter"
        ours.model.save_pretrained(str(adapter))
        outcome = check_round_trip(
            ours.model, self.encoder.encode(self.task.test[:CHECKED_TEXTS]), self.folder, adapter
        )
        record = {
            "model": {"name": name, "weights": language_model.WEIGHTS if config.model is None else None},
            "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
            "task": {
                "name": self.task.name,
                "train": len(self.task.train),
                "test": len(self.task.test),
                "sha256": self.task.fingerprint,
            },
            "sides": [_side_record(side) for side in (stock, ours)],
            "rows": [{**asdict(row), "verdict": row.verdict} for row in measures],
            "verdict": verdict,
            "answers": answers,
            "round_trip": asdict(outcome),
            "total_seconds": time.perf_counter() - self.started,
        }
        records.save("demo", record, config.out)
        self._print(f"\nAdapter: {outcome.message}.", None if outcome.ok else "bold red")
        self._print(f"Wrote {config.out}: loss.png, demo.json, adapter (a stock PEFT adapter).")
        self._print(f"Total: {record['total_seconds']:.0f} s with {torch.get_num_threads()} thread(s).")
        return 0 if outcome.ok else 1

    def _sides(self) -> tuple[Side, Side]:
        config = self.config
        seen = list(itertools.islice(self._batches(), config.init_batches))
        method = None if config.method == RANDOM else config.method
        sides = []
        for index, (name, start, recipe) in enumerate(
            (
                (STOCK, RANDOM, Recipe()),
                (OURS, config.method, Recipe(method, accelerate=True)),
            )
        ):
            side = prepare(
                name,
                recipe,
                self.base,
                STOCK_RATE if config.rate is None else config.rate[index],
                seen,
                steps=config.steps,
                rank=config.rank,
                dropout=config.dropout,
                seed=config.seed,
                progress=self.console.is_terminal,
            )
            source = "of many examples; PEFT advises none" if config.rate is None else "given"
            if config.rate is None and name == OURS:
                source = self._advise(side, seen)
            layers = "PEFT's layers" if name == STOCK else "accelerated layers"
            self._print(f"{name}: start {start}, {layers}, learning rate {side.rate:.2g} ({source})")
            sides.append(side)
        return sides[0], sides[1]

    def _advise(self, side: Side, batches: Sequence[Batch]) -> str:
        """Give a side the rate that is suggested for it, on its clock; returns where the rate comes from."""
        advice, seconds = timed(lambda: lk.suggest_learning_rate(side.model, batches))
        side.start_seconds += seconds
        if advice.rate is None:
            return f"of many examples: {advice.reason}"
        side.rate = advice.rate
        return f"suggested in {seconds:.0f} s; {advice.low:.1e} to {advice.high:.1e}"

    def _train(self, stock: Side, ours: Side) -> dict[str, int]:
        """Train both sides step by step in turn; returns by side what a step needs in memory, nothing if not known."""
        config, sides = self.config, (stock, ours)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        memory: dict[str, int] = {}
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as progress:
            bar = progress.add_task("held-out loss", total=2 * config.steps)
            self._evaluate(sides)
            for number, batch in enumerate(itertools.islice(self._batches(), config.steps), start=1):
                # Who begins alternates too: whatever comes first may find colder caches.
                for side in sides if number % 2 else reversed(sides):
                    loss = side.step(batch)
                    progress.update(bar, advance=1, description=f"step {number}  {side.name}  loss {loss:.2f}")
                if number in config.evaluate_at:
                    self._evaluate(sides)
        longest = max(self.held_out, key=lambda batch: batch["input_ids"].numel())
        for side in sides:
            needed = _memory(side, longest)
            if needed is not None:
                memory[side.name] = needed
        return memory

    def _evaluate(self, sides: Sequence[Side]) -> None:
        losses = ", ".join(f"{side.name} {side.evaluate(self.held_out).loss:.3f}" for side in sides)
        self._print(f"step {sides[0].evaluations[-1].step:3d}: held-out loss {losses}", "dim")

    def _prompt(self, example: Example) -> str:
        return example.prompt or " ".join(example.answer.split()[:PROMPT_WORDS])

    @torch.no_grad()
    def _answer(self, model: Any, example: Example) -> str:
        """What the model writes after a prompt, the likeliest token at every place."""
        encoded = self.tokenizer(self._prompt(example), return_tensors="pt").to(model.device)
        length = encoded["input_ids"].shape[1]
        was_training = model.training
        model.eval()
        try:
            ids = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=self.config.answer_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        finally:
            model.train(was_training)
        return str(self.tokenizer.decode(ids[0, length:], skip_special_tokens=True)).strip()


def _memory(side: Side, batch: Batch) -> int | None:
    """Bytes that a pass forward and backward needs at most; None where that is not known. Nothing is trained."""

    def passes() -> None:
        side.model(**batch).loss.backward()
        side.optimizer.zero_grad()

    if not torch.cuda.is_available() and not Path("/proc/self/clear_refs").exists():
        return None
    with contextlib.suppress(AttributeError, OSError):
        # What earlier steps have freed goes back to the system first; where the C library cannot, the peak is too low.
        ctypes.CDLL(None).malloc_trim(0)
    return records.extra_peak(passes)


def _side_record(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "rate": side.rate,
        "start_seconds": side.start_seconds,
        "advice": side.advice,
        "trainable_parameters": sum(parameter.numel() for parameter in side.parameters),
        "step_seconds": side.step_seconds,
        "train_loss": side.train_loss,
        "evaluations": [point._asdict() for point in side.evaluations],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with the options of the command line; 2 if one of them, or the data, cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller steps, under two minutes")
    parser.add_argument(
        "--data", type=Path, help=".jsonl or .csv with question and answer, or text (default: generated)"
    )
    parser.add_argument("--method", help="start of our side: eva, lora_ga, lora_da, ..., or random (default: eva)")
    parser.add_argument(
        "--rate",
        type=float,
        nargs="+",
        metavar="RATE",
        help="learning rate of both sides, or PEFT's and ours (default: 3e-4, and the suggested one)",
    )
    parser.add_argument("--model", type=Path, help="folder of a causal language model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dropout", type=float, help="of the adapters' inputs (default: 0)")
    parser.add_argument("--out", type=Path, help="output folder (default: demo-out)")
    for name in ("rank", "steps", "batch-size", "max-tokens", "init-batches", "held-out", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int)
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    rate = options.pop("rate", None)
    if rate is not None:
        if len(rate) > 2:
            parser.error("--rate takes one number, or two")
        options["rate"] = (rate[0], rate[-1])
    if options.pop("quick"):
        options = {**QUICK, **options}
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return run(DemoConfig(**options))
    except ModuleNotFoundError as error:
        print(f"benchmarks.demo: {error}; `make demo` installs what it needs", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"benchmarks.demo: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
