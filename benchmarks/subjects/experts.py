"""LoRA on the parameters of many experts, forward and backward: ours against PEFT's fold of all weights.

A module of experts as transformers has it (Qwen3's), random routing. Outputs and all gradients must be PEFT's before
any time is taken. What the low-rank part costs is our time without it taken off ours, beside the time of the experts
alone, as transformers has them. The memory that a step takes at most is measured in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import lora_kernels as lk
from benchmarks import lora_layers, records
from benchmarks.rates import Floor, Rates, here
from benchmarks.subject import Row, Subject
from lora_kernels.adapters.experts import chain_of
from lora_kernels.training import experts as fused_experts

# Experts, inputs, inner size, experts of a token, rank.
SIZES, SMALL = (32, 1024, 512, 4, 16), (8, 64, 48, 2, 4)
TOKENS, SMALL_TOKENS = (1024, 4096), (32,)
DTYPES = ("float32", "bfloat16")
# Relative differences from PEFT's numbers, which rounds the sum of its weights to their dtype.
BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}
# PEFT's time over ours, the experts' over that of the low-rank part, our memory over PEFT's.
TIMES, PART, MEMORY = 2.0, 4.0, 0.6


class _Model(nn.Module):
    def __init__(self, experts: int, size: int, inner: int, implementation: str) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(num_experts=experts, hidden_size=size, moe_intermediate_size=inner)
        config._experts_implementation = implementation
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def stock(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, implementation: str) -> Any:
    """PEFT's wrappers around a module of experts, their B no longer zero."""
    from peft import LoraConfig, get_peft_model

    experts, size, inner, _, rank = sizes
    torch.manual_seed(0)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=names)
    base: Any = _Model(experts, size, inner, implementation).to(dtype)
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.train().to(device)


def sides(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, implementation: str) -> dict[str, Any]:
    """The outermost wrappers, PEFT's and ours, with the same frozen weights."""
    model = stock(sizes, dtype, implementation)
    ours = lora_layers.shared_copy(model)
    lk.accelerate(ours, strict=True, guard=False)
    return {"peft": model.base_model.model.experts, "ours": ours.base_model.model.experts}


def routed(tokens: int, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs, the experts of each token, their weights, and the gradient of the output."""
    experts, size, _, top, _ = sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    weights, index = torch.rand(tokens, experts).softmax(-1).topk(top, dim=-1)
    x, g = torch.randn(tokens, size), torch.randn(tokens, size)
    return [each.to(device, dtype if each.is_floating_point() else None) for each in (x, index, weights, g)]


def both_ways(layer: Any, inputs: list[torch.Tensor], of: nn.Module | None = None) -> Callable[[], list[torch.Tensor]]:
    """Output and gradients of inputs and factors: those of the layer, or `of` another module."""
    x, index, weights, g = inputs
    leaf = x.detach().requires_grad_()
    trained = [parameter for parameter in (of or layer).parameters() if parameter.requires_grad]

    def step() -> list[torch.Tensor]:
        y = layer(leaf, index, weights)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *trained], g)]

    return step


def without_adapters(layer: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """The frozen experts inside of our wrappers: as transformers runs them, and as the wrappers do but for adapters."""
    base = chain_of(layer)[-1].base_layer
    call = fused_experts._Call(base.config._experts_implementation, {})
    return {"base": base, "bare": partial(fused_experts._forward, call, base)}


def peak(side: str, tokens: int, sizes: tuple[int, int, int, int, int], dtype: str, implementation: str) -> int:
    """Bytes that a side's steps take beyond what is there before them, in this process: the median of three."""
    kind = getattr(torch, dtype)
    step = both_ways(sides(sizes, kind, implementation)[side], routed(tokens, sizes, kind))
    step()
    return sorted(records.extra_peak(lambda: [step(), None][1]) for _ in range(3))[1]


def floor(tokens: int, sizes: tuple[int, int, int, int, int], dtype: str, rates: Rates | None) -> Floor:
    """Two products of the base in each direction of x, six of rank r; weights and rows read once each way."""
    experts, size, inner, top, rank = sizes
    rows, width = tokens * top, getattr(torch, dtype).itemsize
    flops = rows * (4.0 * 3 * size * inner + 6.0 * rank * (2 * size + 3 * inner))
    moved = width * (2.0 * experts * 3 * size * inner + 5.0 * tokens * size + rows * (4.0 * size + 6 * inner))
    return Floor(flops, moved, rates, dtype)


def layer(
    tokens: int, sizes: tuple[int, int, int, int, int], dtype: str, implementation: str, rounds: int
) -> dict[str, Any]:
    """Check, time and measure one layer.

    Args:
        tokens: of the batch.
        sizes: experts, inputs, inner size, experts of a token, rank.
        dtype: of everything.
        implementation: of the experts, as transformers calls it.
        rounds: timed calls of each side.

    Returns:
        An entry.

    Raises:
        SystemExit: if ours gives other numbers than PEFT's.
    """
    kind = getattr(torch, dtype)
    inputs = routed(tokens, sizes, kind)
    layers = sides(sizes, kind, implementation)
    calls = {name: both_ways(each, inputs) for name, each in layers.items()}
    programs = {
        name: f"from {__name__} import peak; print(peak({name!r}, *{(tokens, sizes, dtype, implementation)!r}))"
        for name in calls
    }
    pairs = zip(calls["ours"](), calls["peft"](), strict=True)
    difference = lora_layers.largest(lora_layers.relative(one, two) for one, two in pairs)
    if not difference <= BOUNDS[dtype]:
        raise SystemExit(f"{tokens} tokens, {dtype}: relative difference from PEFT's numbers {difference:.1e}")
    frozen = nn.Module()
    calls |= {name: both_ways(each, inputs, frozen) for name, each in without_adapters(layers["ours"]).items()}
    times = records.interleaved(calls, rounds)
    experts, size, inner, top, rank = sizes
    return {
        "tokens": tokens,
        "experts": experts,
        "size": size,
        "inner": inner,
        "top": top,
        "rank": rank,
        "dtype": dtype,
        "implementation": implementation,
        "difference": difference,
        "seconds": times,
        "peft_over_ours": times["peft"]["p50"] / times["ours"]["p50"],
        "low_rank_over_base": (times["ours"]["p50"] - times["bare"]["p50"]) / times["base"]["p50"],
        "ours_over_base": times["ours"]["p50"] / times["base"]["p50"],
        "floor": floor(tokens, sizes, dtype, here()).record(),
        "peak_extra_bytes": records.peaks(programs),
        "weight_bytes": experts * 3 * size * inner * kind.itemsize,
    }


def layers(options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of tokens, in both dtypes."""
    sizes, tokens = (SMALL, SMALL_TOKENS) if options.quick else (SIZES, TOKENS)
    found = []
    for dtype in DTYPES[:1] if options.quick else DTYPES:
        for number in tokens:
            found.append(layer(number, sizes, dtype, options.implementation, options.rounds))
            records.CONSOLE.print(f"{_named(found[-1])}: PEFT / ours {found[-1]['peft_over_ours']:.2f}")
    return {"entries": found}


def _named(each: Mapping[str, Any]) -> str:
    shape = f"{each['experts']} experts of {each['size']} x {each['inner']}, top {each['top']}, r = {each['rank']}"
    return f"{each['tokens']} tokens, {shape}, {each['dtype']}, {each['implementation']}"


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Each layer against PEFT's, and its low-rank part against the experts alone."""
    found = []
    for each in entry["entries"]:
        times = {side: quantiles["p50"] for side, quantiles in each["seconds"].items()}
        floor = each["floor"]["seconds"]
        found.append(Row(_named(each), "PEFT", times["ours"], times["peft"], floor, TIMES, each["dtype"]))
        part = max(times["ours"] - times["bare"], 1e-9)  # of noise alone it may be less than nothing
        what = f"{_named(each)}: the low-rank part"
        found.append(Row(what, "the experts alone", part, times["base"], None, PART, each["dtype"]))
    return found


def notes(entry: Mapping[str, Any]) -> list[str]:
    """Time over that of the experts alone; memory, beside that of the weights."""
    lines = []
    for each in entry["entries"]:
        lines.append(
            f"{_named(each)}: the low-rank part takes {each['low_rank_over_base']:.2f} of the experts' time alone, "
            f"all of ours {each['ours_over_base']:.2f}"
        )
        sizes = each["peak_extra_bytes"]
        if sizes:
            extra = ", ".join(f"{side} {size / 1e6:.0f} MB" for side, size in sizes.items())
            lines.append(
                f"{_named(each)}: extra memory at its peak {extra}: {sizes['ours'] / sizes['peft']:.2f} of PEFT's "
                f"({MEMORY:g} asked for); weights {each['weight_bytes'] / 1e6:.0f} MB"
            )
    return lines


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--implementation", default="grouped_mm", help="of the experts, as transformers calls it")


SUBJECT = Subject(
    name="experts",
    about="LoRA on the parameters of many experts, forward and backward, against PEFT's fold; outputs and all "
    "gradients must be PEFT's.",
    cases={"layers": layers},
    rows=rows,
    notes=notes,
    full=("layers",),
    quick=("layers",),
    options=_options,
)
