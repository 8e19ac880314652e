"""Layers that read the same tensor (q, k, v; gate, up) share one set of sums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lora_kernels.runtime.feed import call_model
from lora_kernels.statistics.store import Target
from lora_kernels.statistics.sums import InputSums


@dataclass
class InputGroup:
    """Layers with one input; of the current batch the inputs that were added, and how often a layer was called."""

    sums: InputSums
    born: int
    members: list[str] = field(default_factory=list)
    inputs: list[Hashable] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    strangers: set[str] = field(default_factory=set)  # members that read another input than the group's


class InputSharing:
    """Decides, call by call, whether an input is new to the sums."""

    def __init__(self, *, share: bool, apart: Iterable[str] = ()) -> None:
        """Start without groups; layers in `apart`, or all with `share=False`, are alone."""
        self.share, self.apart = share, set(apart)
        self.groups: dict[str, InputGroup] = {}
        self.left_out: set[str] = set()
        self.batch = 0
        self._references: dict[int, StorageWeakRef] = {}
        self._first: dict[Hashable, InputGroup] = {}

    def begin(self, batch: int) -> None:
        """Forget the inputs of the batch before."""
        self.batch = batch
        self._references.clear()
        self._first.clear()
        for group in self.groups.values():
            group.inputs.clear()
            group.calls.clear()
            group.strangers.clear()

    def distinct(self) -> list[InputGroup]:
        """The groups without repetitions, in the order of their first call."""
        return list({id(group): group for group in self.groups.values()}.values())

    def assign(self, name: str, x: torch.Tensor, make: Callable[[], Any]) -> InputSums | None:
        """The sums (of a new group those of `make`) that a layer's input `(..., n)` must be added to."""
        # `None` if another layer of the group has added it already.
        if name in self.left_out:
            return None
        identity = self._identity(x) if self.share and name not in self.apart else object()
        group = self.groups.get(name)
        if group is None:
            group = self._first.get(identity)
            if group is None or group.born != self.batch:
                group = InputGroup(make(), self.batch)
            group.members.append(name)
            self.groups[name] = group
        call = group.calls.get(name, 0)
        group.calls[name] = call + 1
        if call < len(group.inputs):
            if group.inputs[call] != identity:
                group.strangers.add(name)
            return None
        group.inputs.append(identity)
        self._first.setdefault(identity, group)
        return group.sums

    def _identity(self, x: torch.Tensor) -> Hashable:
        """A key that equals another's if and only if both tensors are the same view of one storage at one version."""
        if x.is_inference():
            return object()  # inference tensors have no version: a change between two reads would go unseen
        storage = x.untyped_storage()
        key = storage._cdata
        # A reference, so that the address is not given to another storage; weak, so that no activation is kept alive.
        self._references.setdefault(key, StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        rows = x.shape[:-1].numel()
        layout = (rows, x.shape[-1]) if x.is_contiguous() else (*x.shape, *x.stride())
        return (key, x.storage_offset(), layout, x.dtype, x._version)

    def deviating(self) -> list[str]:
        """After a forward pass, the layers whose inputs of this batch are not those that their groups added."""
        return [
            name
            for group in self.distinct()
            for name in group.members
            if name in group.strangers or group.calls.get(name, 0) != len(group.inputs)
        ]

    def leave_out(self, name: str) -> None:
        """Drop a layer from its group: the sums are no longer those of its inputs."""
        self.groups.pop(name).members.remove(name)
        self.left_out.add(name)


def find_groups(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> list[list[str]]:
    """Names of layers that read the same tensors in all their calls; the model may be on `meta`."""
    sharing = InputSharing(share=True)

    def hook(name: str) -> Callable[..., None]:
        def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
            if x is not None:
                sharing.assign(name, x, lambda: None)

        return observe

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for target in targets:
            hooks.enter_context(target.module.register_forward_pre_hook(hook(target.name), with_kwargs=True))
        (forward or call_model)(model, batch)
    for name in (alone := sharing.deviating()):
        sharing.leave_out(name)
    return [group.members for group in sharing.distinct()] + [[name] for name in alone]
