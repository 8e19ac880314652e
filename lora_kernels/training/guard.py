"""A look at the first backward pass and the first steps: does every adapter learn?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.runtime.modes import is_sharded
from lora_kernels.training.movement import NARROW, Movement


def _problem(sizes: Sequence[float]) -> str | None:
    """What is wrong with the gradients of A and B, given their largest magnitudes, if neither is of use."""
    if not sizes:
        return "no gradient reached it"
    if not any(math.isfinite(size) for size in sizes):
        return "its gradients are not finite"
    return "its gradients are zero" if all(size == 0.0 for size in sizes) else None


class Guard:
    """Watches one backward pass and goes away; parameters of 16 bits are handed to `Movement`.

    It judges when the last of the watched factors has its gradient. Where some never get one, nothing says when a
    backward pass is over (reentrant checkpoints run several inside of one): it then judges when the model is next
    called.
    """

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
        guard = model.__dict__.pop(cls._ATTRIBUTE, None)
        if guard is not None:
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
        narrow = [
            (factor, f"{which} of {name}")
            for name, pair in self.pairs.items()
            for which, factor in zip("AB", pair, strict=True)
            if factor.dtype in NARROW
        ]
        self.close()
        bad = {name: problem for name, problem in problems.items() if problem is not None}
        if not bad:
            if narrow:
                Movement.watch_next(narrow, strict=self.strict)
            return
        name, problem = next(iter(bad.items()))
        message = f"{len(bad)} of {len(problems)} adapters learn nothing in the first backward pass"
        message += f" (first: {name}: {problem})"
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
