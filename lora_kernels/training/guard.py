"""A look at the first backward pass and the first steps: does every adapter learn, and does rounding let it move?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lora_kernels.runtime.modes import is_sharded, local

STEPS = 8  # without a rise of the learning rate, before it judges
NARROW = (torch.bfloat16, torch.float16)

Names: TypeAlias = WeakIdKeyDictionary  # of parameters, which it does not keep alive


def _problem(sizes: Sequence[float]) -> str | None:
    """What is wrong with the gradients of A and B, given their largest magnitudes, if neither is of use."""
    if not sizes:
        return "no gradient reached it"
    if not any(math.isfinite(size) for size in sizes):
        return "its gradients are not finite"
    return "its gradients are zero" if all(size == 0.0 for size in sizes) else None


class Guard:
    """Watches one backward pass and goes away; parameters of 16 bits are handed to `Movement`."""

    # It judges when the last of the watched factors has its gradient, or else when the model is next called: nothing
    # says when a backward pass is over (reentrant checkpoints run several inside of one).

    _ATTRIBUTE = "_lora_kernels_guard"

    def __init__(self, model: nn.Module, pairs: dict[str, tuple[nn.Parameter, nn.Parameter]], *, strict: bool) -> None:
        self.pairs, self.strict = pairs, strict
        self.seen: dict[int, torch.Tensor] = {}
        factors = [factor for pair in pairs.values() for factor in pair]
        self.expected = len({id(factor) for factor in factors})
        self._handles = [
            *(factor.register_post_accumulate_grad_hook(self._receive) for factor in factors),  # type: ignore[no-untyped-call]
            model.register_forward_pre_hook(self._judge),
        ]

    @classmethod
    def watch(cls, model: nn.Module, layers: Sequence[tuple[str, Any]], *, strict: bool) -> None:
        """Watch the next backward pass of a model, which keeps the guard, and raise instead of warning if `strict`."""
        # Sharded adapters, of which a process sees a part, are not watched.
        cls.stop(model)
        pairs = {}
        for name, layer in layers:
            for adapter in layer.active_adapters:
                if adapter not in getattr(layer, "lora_A", {}):
                    continue
                pair = (getattr(layer.lora_A[adapter], "weight", None), getattr(layer.lora_B[adapter], "weight", None))
                trained = [factor for factor in pair if isinstance(factor, nn.Parameter) and factor.requires_grad]
                if len(trained) == 2 and not any(is_sharded(factor) for factor in trained):
                    pairs[f"{name}, adapter {adapter!r}"] = (trained[0], trained[1])
        if pairs:
            model.__dict__[cls._ATTRIBUTE] = cls(model, pairs, strict=strict)

    @classmethod
    def stop(cls, model: nn.Module) -> None:
        """Stop watching, if it still does."""
        if (guard := model.__dict__.pop(cls._ATTRIBUTE, None)) is not None:
            guard.close()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.pairs, self.seen = {}, {}

    def __reduce__(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """A copy watches nothing: the factors it knows are those of the original."""
        return object.__new__, (type(self),), {"pairs": {}, "seen": {}, "_handles": [], "expected": 0, "strict": False}

    def _receive(self, factor: torch.Tensor) -> None:
        if factor.grad is None or not self.pairs:
            return
        # Taken now: the optimizer may clear it before anyone looks.
        self.seen[id(factor)] = factor.grad.detach().abs().max()
        if len(self.seen) == self.expected:
            self._judge()

    def _judge(self, *_: Any) -> None:
        if not self.seen:
            return
        problems = {
            name: _problem([float(self.seen[id(factor)]) for factor in pair if id(factor) in self.seen])
            for name, pair in self.pairs.items()
        }
        narrow = {
            factor: f"{which} of {name}"
            for name, pair in self.pairs.items()
            for which, factor in zip("AB", pair, strict=True)
            if factor.dtype in NARROW
        }
        self.close()
        if not (bad := {name: problem for name, problem in problems.items() if problem is not None}):
            if narrow:
                Movement.watch(Names(narrow), strict=self.strict)
            return
        name, problem = next(iter(bad.items()))
        message = f"{len(bad)} of {len(problems)} adapters learn nothing in the first backward pass"
        message += f" (first: {name}: {problem})"
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def trained_names(model: nn.Module) -> Names:
    """The names of the parameters of 16 bits that a model trains."""
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return Names({parameter: name for name, parameter in trained if parameter.dtype in NARROW})


class Movement:
    """Compares parameters of 16 bits before and after some steps of an optimizer.

    A step of less than half the distance to the next number leaves a parameter as it is. During warm-up that is no
    fault, so steps count from the last rise of the learning rate. Entries whose gradient stays zero do not count.
    """

    # Hooks of an optimizer cannot be removed while they run, if others come after them: two global ones are set once.

    watched: WeakKeyDictionary[Optimizer, Movement | None] = WeakKeyDictionary()  # `None` once it has judged
    awaited: list[tuple[Names, bool]] = []  # names and `strict`, until an optimizer steps one of them  # noqa: RUF012
    _handles: tuple[Any, ...] = ()

    def __init__(self, names: Names, *, strict: bool) -> None:
        self.names, self.strict = names, strict
        self.steps, self.rate = 0, 0.0
        self.before: dict[torch.Tensor, torch.Tensor] = {}
        self.reached: dict[torch.Tensor, torch.Tensor] = {}  # entries with a gradient

    @classmethod
    def watch(cls, names: Names, *, strict: bool = False) -> None:
        """Watch whichever optimizer steps one of these parameters of 16 bits next; raise, not warn, if `strict`."""
        cls.awaited.append((names, strict))
        if not cls._handles:
            before = register_optimizer_step_pre_hook(cls._before_any)
            cls._handles = before, register_optimizer_step_post_hook(cls._after_any)

    @classmethod
    def _before_any(cls, optimizer: Optimizer, *_: Any) -> None:
        for awaited in list(cls.awaited):
            names, strict = awaited
            held = any(parameter in names for group in optimizer.param_groups for parameter in group["params"])
            if held or not len(names):  # the model is gone
                cls.awaited.remove(awaited)
            # With stochastic rounding entries move rarely, and in the mean as far as they should.
            if held and optimizer not in cls.watched and getattr(optimizer, "rounding", "nearest") == "nearest":
                cls.watched[optimizer] = cls(names, strict=strict)
        if (movement := cls.watched.get(optimizer)) is not None:
            movement._before_step(optimizer)

    @classmethod
    def _after_any(cls, optimizer: Optimizer, *_: Any) -> None:
        if (movement := cls.watched.get(optimizer)) is not None:
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
                if parameter not in self.names or parameter.grad is None:
                    continue
                nonzero = local(parameter.grad.detach()) != 0
                if parameter in self.before:
                    self.reached[parameter] |= nonzero
                else:
                    self.before[parameter], self.reached[parameter] = local(parameter.detach()).clone(), nonzero

    def _judge(self) -> None:
        shares = {}
        for parameter, before in self.before.items():
            reached = self.reached[parameter]
            if count := int(reached.sum()):
                shares[parameter] = int(((local(parameter.detach()) != before) & reached).sum()) / count
        if not (still := [parameter for parameter, share in shares.items() if share < 0.5]):
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
