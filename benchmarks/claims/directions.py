"""Does LoRA-Dash select the directions that training changes most?

The weights of a few decoder layers are trained in full; of the change dW of each, the task-specific directions are the
core directions of W with the largest rates `|u_i^T dW v_i| / (sigma_i + eps)`. LoRA is trained on the same layers, on
other batches, and LoRA-Dash's selection is made after some steps of it. The hit rate is the share of selected
directions that are among the task-specific ones. Beside it: chance, and the hits of random factors, since the
division by sigma_i prefers some directions whatever dW is. `size` ranks by `|u_i^T dW v_i|` alone.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.claims.small import TEXTS, TOKENS, model_and_batches
from benchmarks.demo.side import shared_copy
from benchmarks.demo.texts import Batch
from lora_kernels import LoraDash
from lora_kernels.adapters.view import lora_layers
from lora_kernels.linalg import core_basis
from lora_kernels.training.dash import along_directions

RANK = 8
STEPS, LAUNCHES, BLOCKS = 30, (5, 10, 20, 30), (28, 29)
LORA_RATE, FULL_RATE = 1e-3, 1e-4
RANDOM_DRAWS = 8
RANKINGS = ("rate", "size")
Basis = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def selected(basis: Basis, along: torch.Tensor) -> dict[str, set[int]]:
    """The k core directions that are changed most, by both rankings; `along` are the `u_i^T dW v_i`."""
    dash, sigma = LoraDash(), basis[1].to(torch.float64)
    rates = along.abs() / (sigma + dash.epsilon * sigma[0])
    return {
        ranking: set(values.argsort(descending=True, stable=True)[: dash.k].tolist())
        for ranking, values in (("rate", rates), ("size", along.abs()))
    }


def hits(chosen: Sequence[Mapping[str, set[int]]], truth: Sequence[Mapping[str, set[int]]]) -> dict[str, float]:
    """By ranking, the mean share of the chosen directions that are among the true ones, over layers."""
    return {
        ranking: statistics.fmean(len(one[ranking] & other[ranking]) / len(one[ranking]) for one, other in pairs)
        for ranking in RANKINGS
        for pairs in [list(zip(chosen, truth, strict=True))]
    }


def _train(model: Any, parameters: list[torch.nn.Parameter], rate: float, batches: Sequence[Batch]) -> Iterator[float]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def _full(base: Any, names: Sequence[str], batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[float]]:
    """The changes of the weights under full training, and its losses."""
    weights = [base.get_submodule(name).weight for name in names]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    losses = list(_train(base, weights, FULL_RATE, batches))
    changes = []
    for weight, old in zip(weights, before, strict=True):
        weight.requires_grad_(False)
        changes.append(weight - old)
        weight.copy_(old)
    return changes, losses


def measure(quick: bool = False) -> dict[str, Any]:
    """Train the weights, then LoRA, and compare directions.

    Args:
        quick: two steps of a small model.

    Returns:
        The entry.
    """
    from peft import LoraConfig, get_peft_model

    steps, launches, blocks = (2, (1, 2), (1,)) if quick else (STEPS, LAUNCHES, BLOCKS)
    name, base, (mine, theirs) = model_and_batches(quick, steps, [0, 1])
    places = tuple(f".layers.{block}." for block in blocks)
    linear = {key: module for key, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    names = [key for key in linear if any(place in key for place in places)]
    changes, full_losses = _full(base, names, theirs)
    bases = [core_basis(linear[key].weight) for key in names]
    truth = [
        selected(basis, ((basis[0].mT @ change) * basis[2]).sum(1).to(torch.float64))
        for basis, change in zip(bases, changes, strict=True)
    ]
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
    model: Any = get_peft_model(shared_copy(base), config)
    layers = [layer for _, layer in lora_layers(model)]

    def chosen() -> list[dict[str, set[int]]]:
        factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 1.0) for layer in layers]
        with torch.no_grad():
            return [
                selected(basis, along_directions(basis[0], basis[2], [pair]))
                for basis, pair in zip(bases, factors, strict=True)
            ]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run, losses, at = _train(model, trained, LORA_RATE, mine), [], {}
    for step in launches:
        losses += itertools.islice(run, step - len(losses))
        at[step] = chosen()
    end = at[launches[-1]]
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(RANDOM_DRAWS):
        random = [
            (torch.randn(RANK, vh.shape[1], generator=generator), torch.randn(len(u), RANK, generator=generator), 1.0)
            for u, _, vh in bases
        ]
        draws.append(
            hits([selected(b, along_directions(b[0], b[2], [f])) for b, f in zip(bases, random, strict=True)], truth)
        )
    return {
        "model": name,
        "rank": RANK,
        "k": LoraDash().k,
        "epsilon": LoraDash().epsilon,
        "layers": names,
        "texts": TEXTS,
        "max_tokens": TOKENS,
        "steps": steps,
        "learning_rates": {"LoRA": LORA_RATE, "full": FULL_RATE},
        "losses": {"LoRA": losses, "full": full_losses},
        "hits_of_full": {str(step): hits(one, truth) for step, one in at.items()},
        "hits_of_own_end": {str(step): hits(one, end) for step, one in at.items() if step < launches[-1]},
        "random_factors": {ranking: statistics.fmean(draw[ranking] for draw in draws) for ranking in RANKINGS},
        "chance": statistics.fmean(LoraDash().k / len(sigma) for _, sigma, _ in bases),
    }


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Hit rates."""
    lines = [
        f"{what}, after {step} steps: " + ", ".join(f"{value:.1%} by {ranking}" for ranking, value in rates.items())
        for what, key in (("of full training's directions", "hits_of_full"), ("of LoRA's own end", "hits_of_own_end"))
        for step, rates in entry[key].items()
    ]
    random = ", ".join(f"{value:.1%} by {ranking}" for ranking, value in entry["random_factors"].items())
    return [*lines, f"random factors: {random}; chance {entry['chance']:.1%}"]
