"""Ends of training under weight decay, by decay and by start, with the certificate of each.

A small decoder is pretrained on questions, and LoRA of two of its layers is trained on 64 fixed answers in one batch,
on loss plus `(lambda / 2)(|A|^2 + |B|^2)`, by L-BFGS in float64 until it stands still. lambda is a share of `s |G|_2`
at the pretrained weights: from 1 on, zero would be a minimum. A start of size 0 is the usual one (B = 0); of others,
`|s B A|_F` is so many times `|W|_F`. What `lk.diagnose` says of an end is set beside its objective over the lowest of
the ends that have its decay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

import lora_kernels as lk
from benchmarks.claims.small import SMALL, decoder, questions_and_answers
from benchmarks.demo.side import shared_copy
from benchmarks.records import CONSOLE
from lora_kernels.adapters.view import lora_layers

TEXTS, RANK, PRETRAINING = 64, 8, 200
LAYERS = ("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj")
SHARES, STARTS = (0.1, 0.3, 0.6), (0.0, 1.0, 10.0, 100.0)
ITERATIONS = 400


def _pretrained(words: Any, batches: list[Any], steps: int) -> Any:
    model = decoder(words)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for number in range(steps):
        model(**batches[number % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double().requires_grad_(False)


def _largest_decay(base: Any, batch: Any) -> float:
    """The largest `|G|_2` of the layers' gradients: with a decay from that on (s = 1) zero is stationary in all."""
    weights = [base.get_submodule(name).weight.requires_grad_(True) for name in LAYERS]
    gradients = torch.autograd.grad(base(**batch).loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return max(float(torch.linalg.matrix_norm(gradient, 2)) for gradient in gradients)


def _started(base: Any, size: float) -> Any:
    """LoRA on the layers, from the usual start or with `|s B A|_F = size |W|_F`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS))
    model: Any = get_peft_model(shared_copy(base), config, autocast_adapter_dtype=False).double()
    for _, layer in lora_layers(model) if size > 0 else ():
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        a.normal_(std=1 / math.sqrt(a.shape[1]))
        b.normal_(std=1 / math.sqrt(b.shape[0]))
        grow = math.sqrt(size * float(layer.get_base_layer().weight.norm() / (b @ a).norm()))
        a.mul_(grow)
        b.mul_(grow)
    return model


def _train(model: Any, batch: Any, decay: float, iterations: int) -> tuple[float, float]:
    """Minimise loss and decay; returns the loss and the objective at the end."""
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=iterations,
        max_eval=2 * iterations,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(**batch).loss
        return loss, loss + 0.5 * decay * sum(factor.square().sum() for factor in factors)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = objective()[1]
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        loss, total = objective()
    return float(loss), float(total)


def _end(base: Any, batch: Any, share: float, decay: float, size: float, iterations: int) -> dict[str, Any]:
    model = _started(base, size)
    loss, total = _train(model, batch, decay, iterations)
    diagnosis = lk.diagnose(model, [batch], weight_decay=decay, progress=False)
    layers = []
    for layer in diagnosis:
        certificate = layer.certificate
        layers.append(
            {
                "name": layer.name,
                "verdict": layer.verdict.kind,
                "numerical_rank": layer.spectrum.numerical_rank,
                "stable_rank": layer.spectrum.stable_rank,
                "frobenius_share": layer.spectrum.frobenius_share,
                "balance": layer.spectrum.balance,
                "ratio": None if certificate is None else certificate.ratio,
                "alignment": None if certificate is None else certificate.alignment,
                "stationarity": None if certificate is None else certificate.stationarity,
            }
        )
    return {
        "decay_share": share,
        "weight_decay": decay,
        "start": size,
        "loss": loss,
        "objective": total,
        "verdict": diagnosis.verdict.kind,
        "layers": layers,
    }


def measure(quick: bool = False) -> dict[str, Any]:
    """Train to the end from every start with every decay.

    Args:
        quick: two ends, few iterations.

    Returns:
        The entry.
    """
    pretraining, iterations = (2, 3) if quick else (PRETRAINING, ITERATIONS)
    shares, starts = ((0.1,), (0.0, 1.0)) if quick else (SHARES, STARTS)
    words, questions, answers = questions_and_answers(TEXTS)
    base = _pretrained(words, questions, pretraining)
    largest = _largest_decay(base, answers)
    with torch.no_grad():
        before = float(base(**answers).loss)
    runs = []
    for share, start in itertools.product(shares, starts):
        runs.append(_end(base, answers, share, share * largest, start, iterations))
        CONSOLE.print(f"decay {share:g}, start {start:g}: {runs[-1]['verdict']}")
    for run in runs:
        best = min(other["objective"] for other in runs if other["decay_share"] == run["decay_share"])
        run["over_best"] = run["objective"] / best
    return {
        "model": SMALL.replace("random weights", f"pretrained for {pretraining} steps on questions"),
        "texts": TEXTS,
        "rank": RANK,
        "adapted": list(LAYERS),
        "iterations": iterations,
        "largest_decay": largest,
        "loss_before": before,
        "runs": runs,
    }


def notes(entry: Mapping[str, Any]) -> list[str]:
    """An end a line."""
    return [
        f"decay {run['decay_share']:g}, start {run['start']:g}: {run['verdict']}, objective {run['objective']:.4f} "
        f"({run['over_best']:.3f} of the best), loss {run['loss']:.4f}; "
        + "; ".join(
            f"rank {layer['numerical_rank']}, {layer['frobenius_share']:.2g} of |W|, s|G|/lambda "
            f"{layer['ratio'] or 0:.4f}, balance {layer['balance']:.1e}"
            for layer in run["layers"]
        )
        for run in entry["runs"]
    ]
