"""A whole training step of SmolLM2-135M with LoRA on all 210 linear layers: forward, loss, backward and AdamW.

Ours, PEFT's layers, PEFT's layers by hand-written passes, and in some cases `torch.compile` of PEFT's model. The floor
is the base model without adapters, its forward pass and the gradient of its embeddings: no adapter takes less. The case
`4x128-r8-dropout` is 4 rows of 128 random tokens, rank 8 and dropout 0.05. The model is that of
`benchmarks.language_model`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import language_model, lora_layers, records
from benchmarks.lora_layers import PEERS
from benchmarks.subject import Row, Subject

DROPOUT = 0.05
# PEFT over ours without dropout, by tokens; and with it.
TARGETS = {128: 1.08, 512: 1.12, 2048: 1.25}
DROPOUT_TARGET = 1.35
# What is allowed of the loss and of every gradient. In float32, a relative difference from PEFT's. In bfloat16, an
# error against float32: of the loss half a step of the dtype, of a gradient so many times PEFT's (of that gradient, or
# the mean if that is larger: single ones are small by chance).
BOUND, TIMES_PEFTS = 1e-4, 4.0
# A step of 2048 tokens takes so long that few rounds must do.
LONG, LONG_ROUNDS = 2048, 3


@dataclass(frozen=True)
class Step:
    """A case.

    Attributes:
        batch: rows.
        length: tokens of each.
        rank: of the adapters.
        dropout: of their inputs.
        dtype: of the base model; adapters are float32, PEFT's default.
        compiler: whether `torch.compile` takes part, whose compilation takes minutes.
    """

    batch: int
    length: int
    rank: int
    dropout: float = 0.0
    dtype: str = "float32"
    compiler: bool = False

    @property
    def name(self) -> str:
        """On the command line and in the record."""
        extra = ("-dropout" if self.dropout else "") + ("" if self.dtype == "float32" else f"-{self.dtype}")
        return f"{self.batch}x{self.length}-r{self.rank}{extra}"


STEPS = [
    *(
        Step(batch, length, rank, dropout, compiler=rank == 8 and not dropout and batch != 1)
        for batch, length in ((1, 128), (4, 128), (8, 256))
        for dropout in (0.0, DROPOUT)
        for rank in (8, 16)
    ),
    Step(1, 128, 8, dtype="bfloat16"),
    *(Step(4, 128, 8, dropout, "bfloat16") for dropout in (0.0, DROPOUT)),
]


def _check(sides: Mapping[str, Any], batch: Any, step: Step) -> dict[str, Any]:
    """Compare losses and gradients; `SystemExit` if they are wrong, the compiled side's failure in words."""
    ask = partial(lora_layers.answers, batch=batch, training=not step.dropout)  # in training a compiler compiles once
    answers = ask({name: value for name, value in sides.items() if name != "compiled"})
    failed = {}
    if "compiled" in sides:
        try:
            answers |= ask({"compiled": sides["compiled"]})
        except Exception as error:  # whatever a compiler raises, the others are measured
            failed = {"compile_failed": f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]}
    if step.dtype == "float32":
        truth = answers.pop("peft")
        bounds = [BOUND] * (1 + len(truth[1]))
    else:
        truth = ask({"exact": copy.deepcopy(sides["peft"]).float()})["exact"]
        _, *errors = lora_layers.deviations(answers["peft"], truth)
        mean = statistics.fmean(errors)
        bounds = [torch.finfo(torch.bfloat16).eps / 2, *(TIMES_PEFTS * max(value, mean) for value in errors)]
    deviations = {name: lora_layers.deviations(value, truth) for name, value in answers.items()}
    shares = {
        name: lora_layers.largest(one / bound for one, bound in zip(value, bounds, strict=True))
        for name, value in deviations.items()
    }
    if not lora_layers.largest(shares.values()) <= 1:
        raise SystemExit(f"{step.name}: loss or gradients are wrong, differences over those allowed {shares}")
    means = {name: statistics.fmean(value) for name, value in deviations.items()}
    return {"differences": means, "differences_over_allowed": shares, **failed}


def bare(base: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The floor: a forward and a backward pass of the frozen model, down to its embeddings."""

    def run() -> torch.Tensor:
        embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
        loss = base(inputs_embeds=embeddings, labels=ids).loss
        (gradient,) = torch.autograd.grad(loss, [embeddings])
        return gradient

    return run


def measure(step: Step, options: argparse.Namespace) -> dict[str, Any]:
    """Check and time a training step.

    Args:
        step: the case.
        options: of the command line.

    Returns:
        The entry.

    Raises:
        SystemExit: if the model is not there, or a side gives other numbers than PEFT's.
    """
    try:
        base = language_model.load(getattr(torch, step.dtype)).requires_grad_(False)
    except FileNotFoundError as error:
        raise SystemExit(f"llm: {error}") from None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (step.batch, step.length), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    stock = lora_layers.adapted(base, step.rank, step.dropout)
    sides = {"peft": stock, "hand_written": lora_layers.hand_written(stock), "ours": lora_layers.shared_copy(stock)}
    report = lk.accelerate(sides["ours"], strict=True, guard=False)
    if step.compiler and options.compile:
        sides["compiled"] = lora_layers.compiled(stock)
    checked = _check(sides, batch, step)
    if "compile_failed" in checked:
        del sides["compiled"]
    calls: dict[str, Callable[[], Any]] = {"base": bare(base.train(), ids)}
    calls |= {name: lora_layers.trainer(model, batch) for name, model in sides.items()}
    tokens = step.batch * step.length
    rounds = min(options.rounds, LONG_ROUNDS) if tokens >= LONG else options.rounds
    times = records.interleaved(calls, rounds)
    if step.compiler and options.compile:
        torch._dynamo.reset()
    return {
        "model": language_model.NAME,
        "weights": language_model.WEIGHTS,
        "layers": len(report.layers),
        "batch": step.batch,
        "length": step.length,
        "tokens": tokens,
        "rank": step.rank,
        "dropout": step.dropout,
        "dtype": step.dtype,
        "rounds": rounds,
        **checked,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "ours_over_base": times["ours"]["p50"] / times["base"]["p50"],
    }


def _target(entry: Mapping[str, Any], side: str) -> float | None:
    if side == "hand_written":
        return 1.0
    if side != "peft" or entry["dtype"] != "float32":
        return None
    return DROPOUT_TARGET if entry["dropout"] else TARGETS.get(entry["tokens"])


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Against each peer; of the ranks of a size, the lowest ratio stands in the summary."""
    times = entry["seconds"]
    kind = [f"{entry['batch']} x {entry['length']} tokens", f"dropout {entry['dropout']:g}"]
    kind += [] if entry["dtype"] == "float32" else [entry["dtype"]]
    group = ", ".join(kind)
    return [
        Row(
            f"training step, r = {entry['rank']}, {group}",
            peer,
            times["ours"]["p50"],
            times[side]["p50"],
            times["base"]["p50"],
            _target(entry, side),
            group,
        )
        for side, peer in PEERS.items()
        if side in times
    ]


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Spreads, and why the compiler is not there."""
    spread = ", ".join(f"{side} {times['p20']:.3g} to {times['p80']:.3g}" for side, times in entry["seconds"].items())
    lines = [f"{entry['layers']} layers, {entry['rounds']} rounds; p20 to p80 in s: {spread}"]
    return lines + [f"torch.compile failed: {entry[key]}" for key in ("compile_failed",) if key in entry]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


SUBJECT = Subject(
    name="llm",
    about="A whole training step of SmolLM2-135M with LoRA on all linear layers, against PEFT, torch.compile of PEFT's "
    "model and hand-written passes; the loss and all gradients must be PEFT's.",
    cases={step.name: partial(measure, step) for step in STEPS},
    rows=rows,
    notes=notes,
    full=[step.name for step in STEPS],
    quick=[STEPS[0].name],
    pooled=True,
    options=_options,
)
