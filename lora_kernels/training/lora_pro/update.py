"""Parameter updates: AdamW, and the step along an adjusted direction."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from lora_kernels.runtime.modes import local
from lora_kernels.training.lora_pro.buckets import working_dtype


@dataclass(frozen=True)
class Entry:
    """A parameter to update, on this process."""

    group: int  # index of its parameter group
    value: torch.Tensor  # its own rows; shares the parameter's memory
    gradient: torch.Tensor  # for these rows, float32 (float64)
    state: dict[str, Any]  # of the parameter, moments included under AdamW


def _by_group(entries: list[Entry]) -> dict[tuple[int, bool], list[Entry]]:
    """Entries by group, and by whether torch's fused CPU kernel can run them (it ignores strides)."""
    groups: dict[tuple[int, bool], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.value.numel():
            dense = entry.value.is_contiguous() and entry.gradient.is_contiguous()
            groups[entry.group, dense and entry.value.device.type == "cpu"].append(entry)
    return groups


def _wide(entries: list[Entry]) -> list[torch.Tensor]:
    """Values in the working dtype: themselves, or copies."""
    return [entry.value.to(working_dtype(entry.value.dtype)) for entry in entries]


class Rounding:
    """Stochastic rounding to bfloat16: up with the probability of what is cut off, so that the mean is kept.

    Its bits are those of torch's generator of each device, seeded anew for every step.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """A float32 tensor whose numbers are those of bfloat16; infinities and NaN stay."""
        if value.device not in self.generators:
            self.generators[value.device] = torch.Generator(value.device).manual_seed(self.seed)
        generator = self.generators[value.device]
        random = torch.randint(2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
        bits = (value.view(torch.int32) + random) & -0x10000
        return torch.where(value.isfinite(), bits.view(torch.float32), value)


def _round_back(entries: list[Entry], wide: list[torch.Tensor], rounding: Rounding | None) -> None:
    narrow = [(entry.value, value) for entry, value in zip(entries, wide, strict=True) if value is not entry.value]
    if rounding is not None:
        narrow = [(own, rounding(value) if own.dtype == torch.bfloat16 else value) for own, value in narrow]
    if narrow:
        torch._foreach_copy_([value for value, _ in narrow], [value for _, value in narrow])


def adamw_(entries: list[Entry], groups: list[dict[str, Any]], rounding: Rounding | None = None) -> None:
    """One AdamW step, in float32 (float64), the result rounded to the parameters' dtype."""
    for entry in entries:
        if not entry.value.numel():
            entry.state["step"] += 1  # this process holds no row of it
    for (number, fused), members in _by_group(entries).items():
        group, wide = groups[number], _wide(members)
        adamw(
            wide,
            [entry.gradient for entry in members],
            [local(entry.state["exp_avg"]) for entry in members],
            [local(entry.state["exp_avg_sq"]) for entry in members],
            [],
            [entry.state["step"] for entry in members],
            foreach=not fused,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _round_back(members, wide, rounding)


def descend_(entries: list[Entry], groups: list[dict[str, Any]], rounding: Rounding | None = None) -> None:
    """`p <- (1 - lr weight_decay) p - lr gradient`, in float32 (float64), rounded to the parameters' dtype."""
    for (number, _), members in _by_group(entries).items():
        lr, decay, wide = float(groups[number]["lr"]), groups[number]["weight_decay"], _wide(members)
        if decay:
            torch._foreach_mul_(wide, 1.0 - lr * decay)
        torch._foreach_add_(wide, [entry.gradient for entry in members], alpha=-lr)
        _round_back(members, wide, rounding)
