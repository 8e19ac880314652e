"""A look at the optimizer's first steps: does rounding leave the parameters where they are?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lora_kernels.runtime.modes import local

STEPS = 8  # without a rise of the learning rate, before it judges
NARROW = (torch.bfloat16, torch.float16)

Names: TypeAlias = WeakIdKeyDictionary  # of parameters, which it does not keep alive


def trained_names(model: nn.Module) -> Names:
    """The names of the parameters that a model trains."""
    return _names((parameter, name) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _names(pairs: Iterable[tuple[torch.Tensor, str]]) -> Names:
    names = Names()
    for parameter, name in pairs:
        names[parameter] = name
    return names


class Movement:
    """Compares parameters of 16 bits before and after some steps of an optimizer.

    A step of less than half the distance to the next number leaves a parameter as it is. During warm-up that is no
    fault, so steps count from the last rise of the learning rate. Entries whose gradient stays zero do not count.

    Hooks of an optimizer cannot be removed while they run, if others come after them: two global ones are set once,
    and look here.
    """

    watched: WeakKeyDictionary[Optimizer, Movement | None] = WeakKeyDictionary()  # `None` once it has judged
    awaited: list[tuple[Names, bool]] = []  # names and `strict`, where the optimizer is not known yet  # noqa: RUF012
    _handles: tuple[Any, ...] = ()

    def __init__(self, names: Names, *, strict: bool) -> None:
        self.names, self.strict = names, strict
        self.steps, self.rate = 0, 0.0
        self.before: dict[torch.Tensor, torch.Tensor] = {}
        self.reached: dict[torch.Tensor, torch.Tensor] = {}  # entries with a gradient

    @classmethod
    def watch(cls, optimizer: Optimizer, names: Names, *, strict: bool = False) -> None:
        """Watch an optimizer that holds parameters of 16 bits and was not watched yet; raise, not warn, if `strict`."""
        if getattr(optimizer, "rounding", "nearest") == "stochastic":
            return  # entries move rarely, and in the mean as far as they should
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        narrow = any(parameter in names and parameter.dtype in NARROW for parameter in parameters)
        if narrow and optimizer not in cls.watched:
            cls.watched[optimizer] = cls(names, strict=strict)
            cls._set_hooks()

    @classmethod
    def watch_next(cls, factors: Iterable[tuple[torch.Tensor, str]], *, strict: bool) -> None:
        """Watch whichever optimizer steps one of these named parameters next."""
        cls.awaited.append((_names(factors), strict))
        cls._set_hooks()

    @classmethod
    def _set_hooks(cls) -> None:
        if not cls._handles:
            cls._handles = (
                register_optimizer_step_pre_hook(cls._before_any),
                register_optimizer_step_post_hook(cls._after_any),
            )

    @classmethod
    def _before_any(cls, optimizer: Optimizer, *_: Any) -> None:
        for awaited in list(cls.awaited):
            names, strict = awaited
            held = (parameter for group in optimizer.param_groups for parameter in group["params"])
            if not len(names):  # the model is gone
                cls.awaited.remove(awaited)
            elif any(parameter in names for parameter in held):
                cls.awaited.remove(awaited)
                cls.watch(optimizer, names, strict=strict)
        movement = cls.watched.get(optimizer)
        if movement is not None:
            movement._before_step(optimizer)

    @classmethod
    def _after_any(cls, optimizer: Optimizer, *_: Any) -> None:
        movement = cls.watched.get(optimizer)
        if movement is not None:
            movement.steps += movement.rate > 0
            if movement.steps >= STEPS:
                cls.watched[optimizer] = None
                movement._judge()

    def _before_step(self, optimizer: Optimizer) -> None:
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        if rate > self.rate:
            self.rate, self.steps = rate, 0
            self.before.clear()
            self.reached.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self.names or parameter.dtype not in NARROW or parameter.grad is None:
                    continue
                nonzero = local(parameter.grad.detach()) != 0
                if parameter in self.before:
                    self.reached[parameter] |= nonzero
                else:
                    self.before[parameter], self.reached[parameter] = local(parameter.detach()).clone(), nonzero

    def _judge(self) -> None:
        counts = {
            parameter: torch.stack((((local(parameter.detach()) != before) & reached).sum(), reached.sum()))
            for (parameter, before), reached in zip(self.before.items(), self.reached.values(), strict=True)
        }
        shares = {}
        for parameter, count in counts.items():
            moved, reached = count.tolist()
            if reached:
                shares[parameter] = moved / reached
        still = [parameter for parameter, share in shares.items() if share < 0.5]
        if not still:
            return
        first = min(still, key=lambda parameter: shares[parameter])
        dtype = str(first.dtype).removeprefix("torch.")
        message = (
            f"rounding to {dtype} swallows the optimizer's steps: {len(still)} of {len(shares)} trained parameters "
            f"moved in fewer than half of their entries in {STEPS} steps at a learning rate of {self.rate:.3g} (least: "
            f"{self.names[first]}, {100 * shares[first]:.0f} %). Train the adapter in float32 "
            "(autocast_adapter_dtype=True in PEFT), raise the rate, or let "
            'lora_kernels.create_lora_pro_optimizer(..., rounding="stochastic") round bfloat16'
        )
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
