"""A look at the optimizer's first steps: does rounding leave the parameters where they are?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lora_kernels.runtime.modes import local

STEPS = 8  # without a rise of the learning rate, before it judges
NARROW = (torch.bfloat16, torch.float16)
_watched: WeakSet[Optimizer] = WeakSet()


def trained_names(model: nn.Module) -> dict[int, str]:
    """The names of the parameters that a model trains, by id."""
    return {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}


class Movement:
    """Compares parameters of 16 bits before and after some steps of an optimizer, and goes away.

    A step of less than half the distance to the next number leaves a parameter as it is. During warm-up that is no
    fault, so steps count from the last rise of the learning rate. Entries whose gradient stays zero do not count.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], *, strict: bool) -> None:
        """Watch those parameters of an optimizer that are in `names`, by id."""
        self.names, self.strict = names, strict
        self.steps, self.rate = 0, 0.0
        self.before: dict[torch.Tensor, torch.Tensor] = {}
        self.reached: dict[torch.Tensor, torch.Tensor] = {}  # entries with a gradient
        self.handles: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _watched.add(optimizer)

    @classmethod
    def watch(cls, optimizer: Optimizer, names: Mapping[int, str], *, strict: bool = False) -> Movement | None:
        """Watch an optimizer that holds parameters of 16 bits and is not watched yet; raise, not warn, if `strict`."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if getattr(optimizer, "rounding", "nearest") == "stochastic":
            return None  # entries move rarely, and in the mean as far as they should
        narrow = any(id(parameter) in names and parameter.dtype in NARROW for parameter in parameters)
        return cls(optimizer, names, strict=strict) if narrow and optimizer not in _watched else None

    @classmethod
    def watch_next(cls, names: Mapping[int, str], *, strict: bool) -> None:
        """Watch whichever optimizer steps the named parameters next."""
        found = False

        def attach(optimizer: Optimizer, *_: Any) -> None:
            nonlocal found
            held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
            if not found and any(parameter in names for parameter in held):
                found = True
                movement = cls.watch(optimizer, names, strict=strict)
                if movement is not None:  # (a hook may not remove itself while hooks run)
                    movement.handles.append(handle)

        handle = register_optimizer_step_pre_hook(attach)

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if rate > self.rate:
            self.rate, self.steps = rate, 0
            self.before.clear()
            self.reached.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self.names or parameter.dtype not in NARROW or parameter.grad is None:
                    continue
                nonzero = local(parameter.grad.detach()) != 0
                if parameter in self.before:
                    self.reached[parameter] |= nonzero
                else:
                    self.before[parameter], self.reached[parameter] = local(parameter.detach()).clone(), nonzero

    def _after_step(self, *_: Any) -> None:
        self.steps += self.rate > 0
        if self.steps >= STEPS:
            self._judge()

    def _judge(self) -> None:
        counts = {
            parameter: torch.stack((((local(parameter.detach()) != before) & reached).sum(), reached.sum()))
            for (parameter, before), reached in zip(self.before.items(), self.reached.values(), strict=True)
        }
        for handle in self.handles:
            handle.remove()
        shares = {}
        for parameter, count in counts.items():
            moved, reached = count.tolist()
            if reached:
                shares[parameter] = moved / reached
        self.before, self.reached, self.handles = {}, {}, []
        still = [parameter for parameter, share in shares.items() if share < 0.5]
        if not still:
            return
        first = min(still, key=lambda parameter: shares[parameter])
        dtype = str(first.dtype).removeprefix("torch.")
        message = (
            f"rounding to {dtype} swallows the optimizer's steps: {len(still)} of {len(shares)} trained parameters "
            f"moved in fewer than half of their entries in {STEPS} steps at a learning rate of {self.rate:.3g} (least: "
            f"{self.names[id(first)]}, {100 * shares[first]:.0f} %). Train the adapter in float32 "
            "(autocast_adapter_dtype=True in PEFT), raise the rate, or let "
            'lora_kernels.create_lora_pro_optimizer(..., rounding="stochastic") round bfloat16'
        )
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
