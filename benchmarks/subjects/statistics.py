"""One pass that collects all statistics, against ordinary training passes; and EVA from sketches."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import models, records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject

WANTS = ("input_second", "gradient", "fisher")


def check(model: torch.nn.Module, batches: Sequence[Any], values: Any) -> dict[str, float]:
    """How far the collected sums are from those of plain autograd and plain float64 hooks.

    Args:
        model: the model, its weight gradients those of the summed losses of all batches.
        batches: the data.
        values: the statistics.

    Returns:
        Largest relative Frobenius errors over all layers.
    """
    worst = {"gradient": 0.0, "input_second": 0.0}
    names = list(values)
    truth = models.exact_covariances(model, batches, [names[0], names[-2]])
    for name in names:
        expected = model.get_submodule(name).weight.grad
        error = torch.linalg.norm(values[name].sums["gradient"].total - expected) / torch.linalg.norm(expected)
        worst["gradient"] = max(worst["gradient"], float(error))
    for name, expected in truth.items():
        error = torch.linalg.norm(values[name].input.covariance() - expected) / torch.linalg.norm(expected)
        worst["input_second"] = max(worst["input_second"], float(error))
    return worst


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the collection of all statistics against ordinary training passes, and sketched EVA against bare ones.

    Args:
        name: the case.
        options: of the command line.

    Returns:
        The entry.

    Raises:
        SystemExit: if the sums are wrong.
    """
    model, batches = models.case(name)
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    results: dict[str, Any] = {}
    adapters: list[torch.nn.Module] = []

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def clear() -> None:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(True)

    def training() -> None:
        for batch in batches:
            items = (batch["labels"][:, 1:] != -100).sum()
            (model(**batch).loss * items).backward()

    def everything() -> None:
        results["statistics"] = lk.collect(model, batches, WANTS, progress=False)

    def adapter() -> None:
        adapters[:] = [models.wrap(model, "stock")]

    def sketched_eva() -> None:
        results["report"] = lk.initialize(
            adapters[0], batches, lk.init.EVA(rho=models.RHO, min_rank=0), form="sketch", progress=False
        )

    clear()
    training()
    everything()
    errors = check(model, batches, results["statistics"])
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"the sums are wrong: {errors}")
    clear()
    calls = {"forward": forward, "training": training, "statistics": everything, "sketched_eva": sketched_eva}
    prepare = {"training": clear, "statistics": clear, "sketched_eva": adapter}
    times = records.interleaved(calls, options.rounds, prepare)
    statistics, report = results["statistics"], results["report"]
    truth = models.exact_covariances(
        model, batches, [layer.name.removeprefix("base_model.model.") for layer in report.layers]
    )
    shares = []
    for layer in report.layers:
        covariance = truth[layer.name.removeprefix("base_model.model.")]
        factor = adapters[0].get_submodule(layer.name).lora_A["default"].weight.detach()
        best = torch.linalg.eigvalsh(covariance)[-factor.shape[0] :].sum() / covariance.trace()
        shares.append(models.captured(factor, covariance) / float(best))
    work = models.work(model, batches)
    return {
        "rank": models.RANK,
        "rho": models.RHO,
        "layers": len(statistics),
        "tokens": statistics.tokens,
        "seconds": times,
        "statistics_over_training": times["statistics"]["p50"] / times["training"]["p50"],
        "sketched_eva_over_forward": times["sketched_eva"]["p50"] / times["forward"]["p50"],
        "errors": errors,
        "sketched_eva_parts": report.seconds,
        "sketched_eva_captured_of_best": {"worst": min(shares), "mean": sum(shares) / len(shares)},
        "floor": Floor(3 * work.forward + work.covariance, 0.0, here(), "float32").record(),
    }


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Against the passes that a training step makes anyway, which leave no input second moments and no Fisher."""
    times, floor = entry["seconds"], entry.get("floor", {}).get("seconds")
    return [Row("all statistics", "training passes alone", times["statistics"]["p50"], times["training"]["p50"], floor)]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Sketched EVA, and what was checked."""
    share = entry["sketched_eva_captured_of_best"]
    return [
        f"EVA from sketches takes {entry['sketched_eva_over_forward']:.2f} of the bare forward passes and captures "
        f"{share['mean']:.2%} of the best variance (worst layer {share['worst']:.2%})",
        f"errors {entry['errors']}; parts {entry['sketched_eva_parts']}",
    ]


SUBJECT = Subject(
    name="statistics",
    about="All statistics in one pass against ordinary forward and backward passes with all weight gradients, and EVA "
    "from sketches against bare forward passes; the sums must be those of autograd and of float64 hooks.",
    cases={name: partial(measure, name) for name in (*models.LLAMAS, "smollm2")},
    rows=rows,
    notes=notes,
    full=("small", "llama", "smollm2"),
    quick=("small",),
    table=("llama", "smollm2"),
)
