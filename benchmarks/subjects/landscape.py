"""The landscape diagnosis against what is known.

sensing: runs whose outcome is known; see `benchmarks.sensing`.
demo: a sane run of MiniLM-L6 on docstrings and one at 100 times its learning rate.
monitor: what the monitor costs of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import minilm, records
from benchmarks.records import CONSOLE
from benchmarks.sensing import PROBLEMS, sensing
from benchmarks.subject import Subject, nothing
from lora_kernels.landscape import Thresholds
from lora_kernels.landscape.verdict import LOUD_FAILURE

# Of the runs of MiniLM-L6: steps, a rate at which it trains well, and factors of it.
DEMO_STEPS, DEMO_RATE, DEMO_FACTORS = 40, 3e-3, (1, 100)


def _train(model: Any, batches: Any, optimizer: torch.optim.Optimizer, steps: int) -> float:
    loss = torch.tensor(math.nan)
    for _ in range(steps):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def demo(steps: int = DEMO_STEPS) -> dict[str, Any]:
    """Diagnose MiniLM-L6, trained at a good rate and at 100 times that, without data.

    Args:
        steps: of each run.

    Returns:
        The entry.
    """
    from lora_kernels import diagnose

    rows = []
    for factor in DEMO_FACTORS:
        torch.manual_seed(0)
        model, batches = minilm.classifier(0)
        rate = factor * DEMO_RATE
        loss = _train(model, batches, torch.optim.AdamW(minilm.parameter_groups(model, rate), weight_decay=0.0), steps)
        diagnosis = diagnose(model)
        shares = sorted(layer.spectrum.spectral_share or math.nan for layer in diagnosis)
        full = sum(layer.spectrum.numerical_rank == layer.spectrum.rank for layer in diagnosis)
        row = {
            "learning_rate": rate,
            "last_loss": loss if math.isfinite(loss) else None,
            "verdict": diagnosis.verdict.kind,
            "loud_layers": sum(layer.verdict.kind == LOUD_FAILURE for layer in diagnosis),
            "layers": len(diagnosis.layers),
            "full_rank_layers": full,
            "share": {"smallest": shares[0], "median": shares[len(shares) // 2], "largest": shares[-1]},
        }
        rows.append(row)
        CONSOLE.print(
            f"rate {rate:g}: last loss {loss:.3g}, {diagnosis.verdict.kind}, {row['loud_layers']} of {row['layers']} "
            f"layers loud, |sBA|/|W| from {shares[0]:.3g} to {shares[-1]:.3g}, {full} layers of full rank"
        )
    between = [rows[0]["share"]["largest"], rows[-1]["share"]["smallest"]]
    CONSOLE.print(f"loud_share {Thresholds().loud_share:g}; the runs leave {between[0]:.3g} to {between[1]:.3g}")
    return {"steps": steps, "loud_share": Thresholds().loud_share, "the_runs_leave": between, "runs": rows}


def monitor(rounds: int = 21, every: int = 50) -> dict[str, Any]:
    """What the monitor costs of a training step of MiniLM-L6, both in turn in one process.

    Args:
        rounds: how often each is timed.
        every: steps between two measurements.

    Returns:
        The entry.
    """
    from lora_kernels.api import LandscapeMonitor

    model, batches = minilm.classifier(0)
    optimizer = torch.optim.AdamW(minilm.parameter_groups(model, DEMO_RATE), weight_decay=0.0)
    watched = LandscapeMonitor(every)
    watched.begin(model)
    calls = {"step": lambda: _train(model, batches, optimizer, 1), "measurement": lambda: watched.measure(model)}
    times = records.interleaved(calls, rounds)
    share = times["measurement"]["p50"] / (every * times["step"]["p50"])
    return {"every": every, "layers": len(watched.latest), "seconds": times, "share_of_training": share}


def _notes(entry: Mapping[str, Any]) -> list[str]:
    """What a case found."""
    if "confusion" in entry:
        return [f"all verdicts right: {entry['all_right']}"]
    if "share_of_training" in entry:
        times = {name: f"{1e3 * value['p50']:.1f} ms" for name, value in entry["seconds"].items()}
        share = f"{entry['share_of_training']:.3%} of the training time at every={entry['every']}"
        return [f"a step {times['step']}, a measurement {times['measurement']}: {share}"]
    return [
        f"rate {run['learning_rate']:g}: {run['verdict']}, {run['loud_layers']} of {run['layers']} layers loud"
        for run in entry["runs"]
    ]


SUBJECT = Subject(
    name="landscape",
    about="The diagnosis against what is known: verdicts on runs with a known answer, a sane and a hostile run of "
    "MiniLM-L6, and what the monitor costs of a training step. Not against a peer: nothing else gives a verdict.",
    cases={
        "sensing": lambda options: sensing(2 if options.quick else PROBLEMS),
        "demo": lambda options: demo(6 if options.quick else DEMO_STEPS),
        "monitor": lambda options: monitor(options.rounds),
    },
    rows=nothing,
    notes=_notes,
    full=("sensing", "demo", "monitor"),
    quick=("monitor",),
    rounds=21,
)
