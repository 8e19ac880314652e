"""What the switch asks of an optimizer, of torch's own interface alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def was_left_out(optimizer: Any) -> bool:
    """Whether the last call of `step` of an optimizer of accelerate's changed nothing.

    Args:
        optimizer: any optimizer.

    Returns:
        True while gradients accumulate, or after an overflow in float16.
    """
    gradients = getattr(optimizer, "gradient_state", None)
    if gradients is not None and not gradients.sync_gradients:
        return True
    return bool(getattr(optimizer, "step_was_skipped", False))


def check(optimizer: Any, factors: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer of something else.

    Args:
        optimizer: with `param_groups` and `state`, as torch's have.
        factors: A and B of the adapter.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: if it holds none of the factors.
    """
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "add_param_group"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if _group_of(optimizer, factors) is None:
        raise ValueError(
            "the optimizer holds no factor of the adapter (another model's optimizer, or one that keeps flat shards, "
            "as ZeRO's do, which is not supported)"
        )


def _group_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any] | None:
    wanted = {id(each) for each in parameters}
    for group in optimizer.param_groups:
        if any(id(each) in wanted for each in group["params"]):
            found: dict[str, Any] = group
            return found
    return None


def hold(optimizer: Any, coordinates: Sequence[nn.Parameter], factors: Sequence[nn.Parameter]) -> None:
    """Put coordinates that an optimizer does not hold into the group of the factors.

    A group of their own would have to be known to the learning rate schedule, which may have been made before.

    Args:
        optimizer: that of `check`.
        coordinates: what it is to train.
        factors: A and B.
    """
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    missing = [each for each in coordinates if id(each) not in held and each.requires_grad]
    group = _group_of(optimizer, factors)
    if not missing or group is None:
        return
    if "param_names" in group:  # an optimizer of named parameters; it wants all to have a name
        group["param_names"] += [f"lora_dash.{index}" for index in range(len(missing))]
    group["params"] += missing


def start_afresh(optimizer: Any, coordinates: Sequence[nn.Parameter], factors: Sequence[nn.Parameter]) -> None:
    """Forget the state of the coordinates, so that Adam corrects its moments from here; add those that are missing.

    Args:
        optimizer: that of `check`.
        coordinates: what it is to train from now on.
        factors: A and B.
    """
    hold(optimizer, coordinates, factors)
    for each in coordinates:
        optimizer.state.pop(each, None)
