"""The learning-rate study behind the demo's default rates: `python -m benchmarks.demo_rates`.

Every rate of the grid is tried for every initialisation on seeds that the demo does not use, and judged by the loss on
a part of the training files that is held out once more: the demo's test files play no part. The record, with every
curve and the choice, goes to `benchmarks/results/demo_rates.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quality.choice import choose

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ARMS = ("random", "eva")
SEEDS = (100, 101)
RESULT = Path(__file__).parent / "results" / "demo_rates.json"


def main() -> int:
    """Runs the study.

    Returns:
        Exit status: 0.
    """
    parser = argparse.ArgumentParser(description="Learning-rate study behind the demo's defaults")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from benchmarks.demo.batches import load_tokenizer, model_folder
    from benchmarks.demo.config import DemoConfig
    from benchmarks.demo.data import docstring_task, hold_out
    from benchmarks.demo.run import quiet_transformers, versions
    from benchmarks.demo.task import train_run

    torch.set_num_threads(arguments.threads)
    quiet_transformers()
    config = DemoConfig()
    task = hold_out(docstring_task())
    folder = model_folder(None)
    tokenizer = load_tokenizer(folder)
    runs: list[dict[str, Any]] = []
    for rate in RATES:
        for seed in SEEDS:
            for arm in ARMS:
                entry: dict[str, Any] = {"arm": arm, "seed": seed, "learning_rate": rate, "final_loss": None}
                try:
                    _, record = train_run(folder, tokenizer, task, config, arm, seed, rate)
                except ValueError as error:
                    entry["diverged"] = str(error)
                else:
                    entry["final_loss"] = record.evaluations[-1].loss
                    entry["final_accuracy"] = record.evaluations[-1].accuracy
                    entry["train_loss"] = [round(loss, 5) for loss in record.train_loss]
                    entry["evaluations"] = [asdict(evaluation) for evaluation in record.evaluations]
                runs.append(entry)
                print(f"{arm:8s} seed {seed} rate {rate:g}: held-out loss {entry['final_loss']}", flush=True)
    result = {
        "task": {"name": task.name, "labels": task.labels, "train": len(task.train), "held_out": len(task.test)},
        "task_sha256": task.fingerprint,
        "rank": config.rank,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "max_tokens": config.max_tokens,
        "seeds": SEEDS,
        "rates": RATES,
        "versions": versions(),
        "machine": platform.machine(),
        "choice": choose(runs),
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["choice"], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
