"""Parameters of many experts, forward and backward: PEFT's fold of all weights against low-rank parts of the rows."""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.layers import worst
from benchmarks.gpu.part import Run
from benchmarks.lora_layers import gradients
from benchmarks.subjects import experts as subject

# Experts, inputs, inner size, experts of a token, rank.
SIZES, TINY = ((128, 2048, 768, 8, 16), (32, 1024, 512, 4, 16), (8, 4096, 14336, 2, 16)), ((4, 48, 32, 2, 4),)
TOKENS = (4096, 256)


def experts(run: Run) -> None:
    """Of several mixtures, with many tokens and few."""
    names = ("experts", "size", "inner", "top", "rank")
    cases = [
        {"tokens": tokens, **dict(zip(names, sizes, strict=True))}
        for tokens in run.pick(TOKENS, (24,))
        for sizes in run.pick(SIZES, TINY)
    ]
    run.each(cases, _layer)


def _layer(run: Run, tokens: int, **numbers: int) -> dict[str, Any]:
    sizes = (numbers["experts"], numbers["size"], numbers["inner"], numbers["top"], numbers["rank"])
    sides = subject.sides(sizes, torch.bfloat16, "grouped_mm")
    x, index, weights, g = inputs = subject.routed(tokens, sizes, torch.bfloat16)
    calls = {name: subject.both_ways(layer, inputs) for name, layer in sides.items()}
    exact = copy.deepcopy(sides["peft"]).double()
    exact.get_base_layer().config._experts_implementation = "eager"
    truth = subject.both_ways(exact, [each.double() if each.is_floating_point() else each for each in inputs])()
    errors = {name: worst(call(), truth) for name, call in calls.items()}
    del exact, truth
    base, leaf = sides["ours"].get_base_layer(), x.detach().requires_grad_()
    calls["base"] = lambda: gradients(base(leaf, index, weights), [leaf], g)
    floor = subject.floor(tokens, sizes, "bfloat16", run.rates)
    found = run.compare(calls, errors, judge="peft", floor=floor)
    if "error" not in found:
        found["peak_bytes"] = {name: timing.peak_bytes(call, run.device) for name, call in calls.items()}
    return found
