"""Which layers of a model work on another input than the masked token sequence: towers for images or audio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

# Inputs of the sequence that masks are of, and those of a mask's shape (sound); other floating-point inputs
# (pixel_values, input_features) have rows of their own.
_SEQUENCE = ("inputs_embeds", "attention_mask", "labels")


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested arguments or outputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


class Towers:
    """Follows inputs without a mask through a forward pass: no mask holds for the layers in a tower.

    A tower is a module without a tensor of the token sequence whose first tensor is such an input, or a tower's output.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare; the first batch with such an input beside a mask sets hooks."""
        self._model = model
        self._handles: list[Any] = []
        self._inside = 0
        self._references: dict[int, StorageWeakRef] = {}
        self._sequence: set[int] = set()
        self._shapes: set[torch.Size] = set()

    def begin(self, batch: Any) -> None:
        """Prepare for a batch."""
        self._inside = 0
        self._references.clear()
        self._shapes.clear()
        if not isinstance(batch, Mapping):
            return
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        masks = {value.shape for key, value in tensors.items() if str(key).endswith("attention_mask")}
        others = {
            key
            for key, value in tensors.items()
            if value.is_floating_point() and not str(key).endswith(_SEQUENCE) and value.shape not in masks
        }
        for key in others:
            self._remember(batch[key])
            # The model may convert it to its own dtype first.
            self._shapes |= {batch[key].shape} if batch[key].dim() > 2 else set()
        rest = [value for key, value in tensors.items() if key not in others]
        self._sequence = {value.untyped_storage()._cdata for value in rest}
        if others and not self._handles:
            for name, module in self._model.named_modules():
                if name and any(True for _ in module.children()):
                    self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def holds(self, x: torch.Tensor) -> bool:
        """Whether a layer that is called with x now belongs to a tower."""
        return self._inside > 0 or self._known(x)

    def _remember(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        # A reference, so that the address is not given to another tensor.
        self._references.setdefault(storage._cdata, StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    def _known(self, x: torch.Tensor) -> bool:
        if not self._references:
            return False
        return x.untyped_storage()._cdata in self._references or (x.is_floating_point() and x.shape in self._shapes)

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._references and not self._inside:
            tensors = list(tensors_in([*args, *kwargs.values()]))
            known = bool(tensors) and self._known(tensors[0])
            self._inside += known and not any(value.untyped_storage()._cdata in self._sequence for value in tensors)
        elif self._inside:
            self._inside += 1

    def _leave(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if self._inside:
            self._inside -= 1
            for value in tensors_in(output):
                self._remember(value)
