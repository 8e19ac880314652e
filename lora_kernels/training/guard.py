"""A look at the first backward pass: does every adapter learn?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_kernels.statistics.observe import is_sharded


def _problem(gradients: Sequence[torch.Tensor | None]) -> str | None:
    """What is wrong with the gradients of A and B, if neither is of use."""
    found = [each for each in gradients if each is not None]
    if not found:
        return "no gradient reached it"
    sizes = [float(each.detach().abs().max()) if each.numel() else 0.0 for each in found]
    if not any(size == size and size != float("inf") for size in sizes):
        return "its gradients are not finite"
    return "its gradients are zero" if all(size == 0.0 for size in sizes) else None


class Guard:
    """Watches one backward pass and goes away."""

    _ATTRIBUTE = "_lora_kernels_guard"

    def __init__(self, pairs: dict[str, tuple[nn.Parameter, nn.Parameter]], *, strict: bool) -> None:
        """Set hooks on the factors of each adapter."""
        self.pairs, self.strict = pairs, strict
        self._queued = False
        self._handles = [
            factor.register_post_accumulate_grad_hook(self._seen)  # type: ignore[no-untyped-call]
            for pair in pairs.values()
            for factor in pair
            if factor.requires_grad
        ]

    @classmethod
    def watch(cls, model: nn.Module, layers: Sequence[tuple[str, Any]], *, strict: bool) -> None:
        """Watch the next backward pass of a model.

        Args:
            model: keeps the guard.
            layers: name and LoRA layer; sharded adapters, of which a process sees a part, are not watched.
            strict: raise instead of warning.
        """
        cls.stop(model)
        pairs = {}
        for name, layer in layers:
            for adapter in layer.active_adapters:
                if adapter not in getattr(layer, "lora_A", {}):
                    continue
                pair = (getattr(layer.lora_A[adapter], "weight", None), getattr(layer.lora_B[adapter], "weight", None))
                trained = [each for each in pair if isinstance(each, nn.Parameter) and each.requires_grad]
                if len(trained) == 2 and not any(is_sharded(each) for each in trained):
                    pairs[f"{name}, adapter {adapter!r}"] = (trained[0], trained[1])
        if pairs:
            model.__dict__[cls._ATTRIBUTE] = cls(pairs, strict=strict)

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

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """A copy of the model is not watched: the hooks are on the original's parameters."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nor is a pickled one."""
        return type(None), ()

    def _seen(self, _parameter: torch.Tensor) -> None:
        if not self._queued:
            self._queued = True
            # At the end of this backward pass, when every gradient is there.
            torch.autograd.Variable._execution_engine.queue_callback(self._judge)  # type: ignore[attr-defined]

    def _judge(self) -> None:
        self.close()
        found = {name: _problem([each.grad for each in pair]) for name, pair in self.pairs.items()}
        bad = {name: problem for name, problem in found.items() if problem is not None}
        self.pairs = {}
        if not bad:
            return
        name, problem = next(iter(bad.items()))
        message = (
            f"{len(bad)} of {len(found)} adapters learn nothing in the first backward pass (first: {name}: {problem})"
        )
        if self.strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
