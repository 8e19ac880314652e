"""Floor 4: initialisation methods, pure functions of statistics. No module and no hook in here."""

from typing import Any

from lora_kernels.init.corda import CorDA
from lora_kernels.init.eva import EVA
from lora_kernels.init.factors import InitMethod, LayerFactors, LoraFactors
from lora_kernels.init.lora_da import LoraDA
from lora_kernels.init.lora_ga import LoraGA
from lora_kernels.init.pissa import PiSSA
from lora_kernels.init.ranks import Redistribution, redistribute
from lora_kernels.init.task_directions import TaskDirections

METHODS: dict[str, Any] = {each.name: each for each in (EVA, LoraDA, LoraGA, CorDA, PiSSA, TaskDirections)}


def resolve_method(method: str | InitMethod) -> InitMethod:
    """The method config for a name, or the config itself.

    Args:
        method: a name in `METHODS`, for that method with its defaults, or a config such as `EVA(rho=1.0)`.

    Returns:
        The config.

    Raises:
        ValueError: if the name is unknown; the message lists the names.
        TypeError: if it is neither a name nor a config.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, but must be one of {', '.join(map(repr, METHODS))}, or a config")
        made: InitMethod = METHODS[method]()
        return made
    if not isinstance(method, InitMethod):
        raise TypeError(f"method must be a name or a method config such as EVA(), got {type(method).__name__}")
    return method


__all__ = [
    "EVA",
    "METHODS",
    "CorDA",
    "InitMethod",
    "LayerFactors",
    "LoraDA",
    "LoraFactors",
    "LoraGA",
    "PiSSA",
    "Redistribution",
    "TaskDirections",
    "redistribute",
    "resolve_method",
]
