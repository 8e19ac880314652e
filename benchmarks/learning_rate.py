"""Does `lk.suggest_learning_rate` find the rates that sweeps find? `python -m benchmarks.learning_rate`.

Two parts, both of which go on from the record (`learning_rate.json`) where they were interrupted:

- `minilm`: the sweeps of the quality studies (`quality_docstrings.json`, `quality_banking77.json`) and of the demo
  (`demo_rates.json`) say which rate trained each arm best on validation texts. Here the line of each of these arms is
  measured from the same start: the study's model, seed, order of batches and number of initialisation batches. Where
  the study's head has a rate of its own the head is frozen while the line is measured.
- `smollm2`: SmolLM2-135M-Instruct with LoRA (rank 8, alpha 8) on all linear layers, AdamW at a constant rate; for each
  arm the line, and the held-out loss after a few steps at each rate. Tasks: answers of GSM8K (`--gsm8k FOLDER`, with
  train.jsonl and test.jsonl), and docstrings of the standard library as plain text.

The best rate of a sweep is the lowest point of the parabola, in the logarithm of the rate, through its best rate and
the two neighbours. The record's `shares` are that rate over the rate at which the line turns. The share of an optimizer
is calibrated on docstrings, and the other tasks are the test of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import language_model, records
from benchmarks.demo import study
from benchmarks.demo.data import docstring_task
from benchmarks.demo.model import quiet_transformers
from benchmarks.demo.training import INIT_BATCHES, Run

NAME = "learning_rate"
SEED = 100  # of the studies' tuning runs
OPTIMIZERS = {"lora_pro": "lora_pro_full", "lora_pro_efficient": "lora_pro"}  # by the studies' arms; AdamW else
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ARMS: tuple[str, ...] = ("random", "eva", "lora_ga")
STEPS, BATCH, LENGTH, HELD_OUT = 20, 2, 128, 6


def best_rate(losses: Mapping[float, float]) -> float:
    """The best rate of a sweep, between the grid's; at an edge the grid's own."""
    rates = sorted(losses)
    place = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if not 0 < place < len(rates) - 1:
        return rates[place]
    x = [math.log(rate) for rate in rates[place - 1 : place + 2]]
    y = [losses[rate] for rate in rates[place - 1 : place + 2]]
    rise, fall = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (fall - rise) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - rise / (2 * bend))


class Record:
    """The entries so far, by part, task and arm, written after each."""

    def __init__(self, folder: Path) -> None:
        self.folder, file = folder, folder / f"{NAME}.json"
        self.entries: dict[str, dict[str, Any]] = json.loads(file.read_text())["entries"] if file.exists() else {}

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Add to an entry."""
        self.entries[key] = {**self.entries.get(key, {}), **entry}
        records.save(NAME, {"entries": self.entries, **summary(self.entries)}, self.folder)


def _finished(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("turn")) and len(entry.get("losses", {})) >= 3


def summary(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Shares by optimizer: calibrated ones, and how far the suggestions are from the sweeps' best."""
    shares: dict[str, dict[str, float]] = {}
    for key, entry in entries.items():
        if _finished(entry):
            best = best_rate({float(rate): loss for rate, loss in entry["losses"].items()})
            shares.setdefault(entry["optimizer"], {})[key] = best / entry["turn"]
    calibrated = {
        optimizer: statistics.geometric_mean(values)
        for optimizer, by_key in shares.items()
        if (values := [value for key, value in by_key.items() if "docstrings" in key])
    }
    return {"shares": shares, "calibrated": calibrated}


def _line(model: Any, loader: Any, optimizer: str) -> dict[str, Any]:
    advice = lk.suggest_learning_rate(model, loader, optimizer=optimizer)
    measured = advice.to_dict()
    return {"optimizer": optimizer, "turn": advice.turn, "line": measured["line"], "reason": advice.reason}


def minilm(record: Record, banking77: Path | None) -> None:
    """Measure the lines of the arms whose sweeps are recorded."""
    torch.set_num_threads(1)
    folders = {"quality_docstrings": None, "demo_rates": None} | ({"quality_banking77": banking77} if banking77 else {})
    for name, folder in folders.items():
        sweep = json.loads((records.RESULTS / f"{name}.json").read_text())
        protocol = study.Protocol() if folder is not None else study.SHORT
        worker = study.Worker(study.Setup(data=folder, protocol=protocol))
        inputs, own_head = worker.inputs["tune"], name != "demo_rates"
        for arm, tuning in sweep["tuning"].items():
            key = f"minilm/{name}/{arm}"
            if arm == "lora_dash" or key in record.entries:  # LoRA-Dash starts as random LoRA does
                continue
            run = Run(arm, SEED, 1e-3, None, study.ARMS[arm].method, study.ARMS[arm].recipe)
            model = inputs.model(run)
            if run.method is not None:
                loader = inputs.loader(run)
                options = {"max_batches": INIT_BATCHES, "progress": False, "suggest_rate": False}
                lk.initialize(model, loader, method=run.method, **options)
            for parameter_name, parameter in model.named_parameters():
                if own_head and ".modules_to_save." in parameter_name:
                    parameter.requires_grad_(False)
            entry = _line(model, inputs.loader(run), OPTIMIZERS.get(arm, "adamw"))
            record.put(key, {**entry, "losses": {k: v for k, v in tuning["losses"].items() if v is not None}})
            records.CONSOLE.print(key, entry["turn"], tuning["rate"], highlight=False)


def _answers(folder: Path, part: str, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    for row in rows:
        question = tokenizer(f"Question: {row['question']}\nAnswer: ")["input_ids"]
        answer = tokenizer(row["answer"] + tokenizer.eos_token)["input_ids"]
        yield question + answer, [-100] * len(question) + answer


def _docstrings(part: str, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    texts = [example.text for example in getattr(docstring_task(), part)]
    random.Random(0).shuffle(texts)
    for text in texts:
        ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
        yield ids, ids


def _batches(rows: Iterator[tuple[list[int], list[int]]], count: int, pad: int) -> list[dict[str, torch.Tensor]]:
    batches = []
    for _ in range(count):
        texts = [next(rows) for _ in range(BATCH)]
        length = min(LENGTH, max(len(tokens) for tokens, _ in texts))
        ids, labels = torch.full((BATCH, length), pad), torch.full((BATCH, length), -100)
        mask = torch.zeros((BATCH, length), dtype=torch.long)
        for row, text in enumerate(texts):
            tokens, wanted = (torch.tensor(values[:length]) for values in text)
            ids[row, : len(tokens)], labels[row, : len(wanted)], mask[row, : len(tokens)] = tokens, wanted, 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def _started(arm: str, batches: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(language_model.load(), config)
    if arm != "random":
        lk.initialize(model, batches[:8], method=arm, progress=False, suggest_rate=False)
    return model


@torch.no_grad()
def _held_out(model: Any, batches: Any) -> float:
    model.eval()
    return statistics.fmean(float(model(**batch).loss) for batch in batches)


def smollm2(record: Record, tasks: Mapping[str, Path | None]) -> None:
    """Lines and short sweeps of SmolLM2."""
    tokenizer = language_model.tokenizer()
    for task, folder in tasks.items():
        rows = [
            _answers(folder, part, tokenizer) if folder is not None else _docstrings(part, tokenizer)
            for part in ("train", "test")
        ]
        pad = tokenizer.pad_token_id
        train, test = _batches(rows[0], STEPS, pad), _batches(rows[1], HELD_OUT, pad)
        for arm in ARMS:
            key = f"smollm2/{task}/{arm}"
            if "turn" not in record.entries.get(key, {}):
                record.put(key, _line(_started(arm, train), train, "adamw"))
                records.CONSOLE.print(key, record.entries[key]["turn"], highlight=False)
        for rate in sorted(RATES, key=lambda rate: abs(math.log(rate / 1e-3))):
            for arm in ARMS:
                key = f"smollm2/{task}/{arm}"
                losses = record.entries.get(key, {}).get("losses", {})
                if str(rate) in losses:
                    continue
                model = _started(arm, train)
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
                for batch in train:
                    model.train()(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                losses = {**losses, str(rate): _held_out(model, test)}
                record.put(key, {"losses": losses, "steps": STEPS, "batch": BATCH, "length": LENGTH})
                records.CONSOLE.print(key, rate, losses[str(rate)], highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the study.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=("minilm", "smollm2"), default=("minilm", "smollm2"))
    parser.add_argument("--banking77", type=Path, help="folder with train.csv and test.csv; else the task is left out")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl; else the task is left out")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the record")
    options = parser.parse_args(arguments)
    quiet_transformers()
    record = Record(options.out)
    if "minilm" in options.parts:
        minilm(record, options.banking77)
    if "smollm2" in options.parts:
        smollm2(record, {**({"gsm8k": options.gsm8k} if options.gsm8k else {}), "docstrings": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
