"""Layers that read the same tensor (query, key and value; gate and up), found while they run and then run as one.

The first of a group works out the outputs of all and puts those of the others down; each of them, when it is called,
finds that it is given the very tensor that its output was made from, and takes it up. No model's source is touched and
nothing is assumed of its structure: where a layer is given something else it computes for itself.

A checkpointed function must do the same when it is computed again, also for a graph that was recorded long before. So
what was learned takes effect when the leader's adapter has been changed in place, by an optimizer's step: no graph that
was recorded before can be needed any more.

Under FSDP2 a layer runs on gathered copies, whose versions FSDP2 keeps as they were; the optimizer changes the shards,
which are not there while the layer runs. So there it is a step of an optimizer that holds the leader's shards that
counts as a change. Layers that are shards of different units are computed by themselves: while the first of them runs,
the weights of the others are not there.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_kernels.statistics.modes import is_sharded


@dataclass
class Group:
    """Layers that read the same tensor, in the order of their calls; the first is the leader.

    Attributes:
        layers: the members.
        version: of the leader's factors when the group was found; `None` if it is in effect.
        strayed: the version of the leader's factors when an output was not taken up; `None` while all were.
        steps: how often an optimizer has changed the leader's factors where they are shards.
    """

    layers: list[weakref.ref[nn.Module]] = field(default_factory=list)
    version: int | None = None
    strayed: int | None = None
    steps: int = 0


@dataclass(frozen=True)
class Ready:
    """An output that waits for its layer to be called.

    Attributes:
        x: what it was made from.
        version: of x, when it was made.
        key: what the layer was like.
        y: the output.
        group: the group it was made in.
    """

    x: torch.Tensor
    version: int
    key: tuple[Any, ...]
    y: torch.Tensor
    group: Group


_groups: weakref.WeakKeyDictionary[nn.Module, Group] = weakref.WeakKeyDictionary()
_ready: weakref.WeakKeyDictionary[nn.Module, Ready] = weakref.WeakKeyDictionary()
_alone: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # leaders of groups that did not hold


class _Last(threading.local):
    """What the layer before was given, in this thread."""

    x: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    group: Group | None = None


_last = _Last()


def applies(x: torch.Tensor) -> bool:
    """Whether layers called with x may be grouped: in eager training, that is.

    Args:
        x: the input.

    Returns:
        True if so.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not x.is_inference()
    )


def taken(layer: nn.Module, x: torch.Tensor, key: Callable[[], tuple[Any, ...]]) -> torch.Tensor | None:
    """The output that the group's leader has made for a layer.

    Args:
        layer: a follower, maybe.
        x: what it is called with.
        key: makes a list of all that its output depends on besides x and the values of its tensors.

    Returns:
        The output, or `None` if there is none, or if it was made from something else.
    """
    ready = _ready.pop(layer, None)
    if ready is None:
        return None
    if ready.x is x and ready.version == x._version and _equal(ready.key, key()):
        return ready.y
    _stray(ready.group)
    return None


def _equal(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        mine is yours or (not isinstance(mine, torch.Tensor) and mine == yours)
        for mine, yours in zip(one, other, strict=True)
    )


def _stray(group: Group) -> None:
    if group.strayed is None:
        leader: Any = group.layers[0]()
        group.strayed = -1 if leader is None else _version(leader, group)


def _weights(layer: Any) -> list[torch.Tensor]:
    return [each.weight for factors in (layer.lora_A, layer.lora_B) for each in factors.values()]


def _version(layer: Any, group: Group | None = None) -> int:
    return sum(each._version for each in _weights(layer)) + (0 if group is None else group.steps)


def _stepped(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Count a step on shards: outside of its forward a layer has them in the place of its factors."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for group in {id(each): each for each in list(_groups.values())}.values():
        leader = group.layers[0]()
        if leader is not None and any(is_sharded(each) and id(each) in held for each in _weights(leader)):
            group.steps += 1


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_stepped)


def followers(layer: nn.Module) -> list[nn.Module]:
    """The layers whose outputs a layer is to make along with its own; none unless it leads a group in effect.

    Args:
        layer: about to be computed.

    Returns:
        The others of its group, in order.
    """
    group = _groups.get(layer)
    if group is None or len(group.layers) < 2 or group.layers[0]() is not layer:
        return []
    version = _version(layer, group)
    if group.version == version:
        return []
    members = [each() for each in group.layers[1:]]
    found = [each for each in members if each is not None]
    for each in found:
        if _ready.pop(each, None) is not None:  # nobody came for the last one
            _stray(group)
    if len(found) < len(members) or (group.strayed is not None and group.strayed != version):
        _alone.add(layer)
        for each in (layer, *found):
            _groups.pop(each, None)
        warnings.warn(
            "LoRA layers that read the same tensor at first no longer do: each is computed by itself from now on",
            RuntimeWarning,
            stacklevel=2,
        )
        return []
    group.version = None
    return found


def put_down(leader: nn.Module, layer: nn.Module, x: torch.Tensor, key: tuple[Any, ...], y: torch.Tensor) -> None:
    """Keep the output that the leader has made for a layer until that is called.

    Args:
        leader: of a group in effect.
        layer: another of the group.
        x: what the output was made from.
        key: see `taken`.
        y: the output.
    """
    _ready[layer] = Ready(x, x._version, key, y, _groups[leader])


def learn(layer: nn.Module, x: torch.Tensor) -> None:
    """Remember that a layer, computed by itself, was given x.

    Args:
        layer: the layer.
        x: its input.
    """
    same = _last.x is not None and _last.x() is x and _last.version == x._version
    group = _last.group if same else None
    if group is None:
        _watch_optimizers()
        group = Group(version=_version(layer))
        _last.x, _last.version, _last.group = weakref.ref(x), x._version, group
    if layer in _alone or any(each() is layer for each in group.layers):
        return
    group.layers.append(weakref.ref(layer))
    _groups[layer] = group


def forget(layers: Sequence[nn.Module]) -> None:
    """Take layers out of their groups.

    Args:
        layers: the layers.
    """
    for layer in layers:
        for kept in (_groups, _ready):
            kept.pop(layer, None)
        _alone.discard(layer)


@contextlib.contextmanager
def afresh(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run layers as if nothing had been learned of them, and put back afterwards what was.

    Args:
        layers: the layers.

    Yields:
        Nothing.
    """
    kept = [(layer, _groups.get(layer), layer in _alone) for layer in layers]
    forget(layers)
    try:
        yield
    finally:
        forget(layers)
        for layer, group, alone in kept:
            if group is not None:
                _groups[layer] = group
            if alone:
                _alone.add(layer)


def settle(layers: Sequence[nn.Module]) -> None:
    """Let what was learned take effect at once: no graph that was recorded before is needed any more.

    Args:
        layers: whose groups.
    """
    for layer in layers:
        group = _groups.get(layer)
        if group is not None:
            group.version = None


def groups(layers: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, ...]]:
    """The groups that were found.

    Args:
        layers: names and layers.

    Returns:
        The names of the members of every group of two or more.
    """
    names = {id(layer): name for name, layer in layers}
    found: dict[int, tuple[str, ...]] = {}
    for _, layer in layers:
        group = _groups.get(layer)
        if group is not None and len(group.layers) > 1:
            found[id(group)] = tuple(names.get(id(each()), "?") for each in group.layers)
    return list(found.values())
