"""EVA: ours, PEFT's, and the bare forward passes over the same batches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import models, records
from benchmarks.rates import Floor, here
from benchmarks.subject import Row, Subject

CASES = (*models.LLAMAS, "minilm")


def check(
    model: torch.nn.Module, batches: Sequence[Any], ours: Any, peft: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Per layer, the variance that each side's directions capture on the exact covariance, at equal rank.

    Args:
        model: the base model.
        batches: the data.
        ours: a PEFT model that we initialised.
        peft: PEFT's state dict.

    Returns:
        Worst and mean difference (ours minus PEFT's) over the layers that both gave a rank, and both rank sums.
    """
    prefix = "base_model.model."
    our_rows = {
        name.removeprefix(prefix): module.lora_A["default"].weight.detach()
        for name, module in ours.named_modules()
        if hasattr(module, "lora_A")
    }
    theirs = {name.removeprefix(prefix): value for name, value in peft.items()}
    both = [name for name in our_rows if name in theirs and theirs[name].shape[0] > 0]
    truth = models.exact_covariances(model, batches, both)
    differences = []
    for name in both:
        rank = min(our_rows[name].shape[0], theirs[name].shape[0])
        mine, other = (models.captured(factors[name][:rank], truth[name]) for factors in (our_rows, theirs))
        differences.append(mine - other)
    return {
        "layers_compared": len(both),
        "captured_minus_peft_worst": min(differences),
        "captured_minus_peft_mean": sum(differences) / len(differences),
        "rank_sum": sum(factors.shape[0] for factors in our_rows.values()),
        "rank_sum_peft": sum(factors.shape[0] for factors in theirs.values()),
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time EVA against PEFT's (once: it takes minutes on the large case) and against the bare forward passes.

    Args:
        name: the case.
        options: of the command line.

    Returns:
        The entry.

    Raises:
        SystemExit: if a layer captures less variance than PEFT's.
    """
    model, batches = models.case(name)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    reports: list[Any] = []
    adapters: list[torch.nn.Module] = []

    def adapter() -> None:
        adapters[:] = [models.wrap(model, "stock")]

    def ours() -> None:
        reports[:] = [lk.initialize(adapters[0], batches, lk.init.EVA(rho=models.RHO, min_rank=0), progress=False)]

    state: dict[str, torch.Tensor] = {}
    entry: dict[str, Any] = {"rank": models.RANK, "rho": models.RHO}
    if options.peft:
        from peft.tuners.lora.eva import get_eva_state_dict

        theirs = models.wrap(model, "eva")

        def peft() -> None:
            state.update(get_eva_state_dict(theirs, batches, show_progress_bar=sys.stderr.isatty()))

        # Both sides once before anything is timed: what they find must agree.
        seconds = records.quantiles([records.seconds(peft)])
        adapter()
        ours()
        entry["quality"] = check(model, batches, adapters[0], state)
        if entry["quality"]["captured_minus_peft_worst"] < -1e-6:
            raise SystemExit(f"a layer captures less variance than PEFT's: {entry['quality']}")
    times = records.interleaved({"forward": bare, "ours": ours}, options.rounds, {"ours": adapter})
    work = models.work(model, batches)
    entry |= {"seconds": times, "parts": reports[0].seconds, "tokens": reports[0].tokens}
    entry["ours_over_forward"] = times["ours"]["p50"] / times["forward"]["p50"]
    entry["floor"] = Floor(work.forward + work.covariance, 0.0, here(), "float32").record()
    if options.peft:
        times["peft"] = seconds
        entry["peft_over_ours"] = times["peft"]["p50"] / times["ours"]["p50"]
    return entry


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Against PEFT."""
    times, floor = entry["seconds"], entry.get("floor", {}).get("seconds")
    if "peft" not in times:
        return []
    return [Row("EVA", "PEFT", times["ours"]["p50"], times["peft"]["p50"], floor)]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """The bare forward passes, and what was checked."""
    times = {side: f"{value['p50']:.2f} s" for side, value in entry["seconds"].items()}
    ratio = f"{entry['ours_over_forward']:.2f} times those"
    lines = [f"ours {times['ours']}, the bare forward passes {times['forward']}: {ratio}"]
    return [*lines, str(entry["quality"])] if "quality" in entry else lines


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-peft", dest="peft", action="store_false", help="ours and the bare forward passes only")


SUBJECT = Subject(
    name="eva",
    about="EVA against PEFT's and the bare forward passes; on exact float64 covariances every layer must capture at "
    "least the variance that PEFT's does.",
    cases={name: partial(measure, name) for name in CASES},
    rows=rows,
    notes=notes,
    full=("small", "llama", "minilm"),
    quick=("small",),
    options=_options,
)
