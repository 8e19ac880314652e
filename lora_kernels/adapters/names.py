"""PEFT's rules of configs: names of layers, patterns of ranks and alphas, and the scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lora_kernels.reports import PREFIX

_Number = TypeVar("_Number", int, float)


def config_name(name: str, module: Any = None) -> str:
    """The name in the base model, which the keys of a config's patterns are matched with, of a LoRA layer."""
    # A layer that adapts a parameter (such as one of many experts) has the parameter's path; PEFT nests several.
    name = name.removeprefix(PREFIX)
    parameter = getattr(module, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """The scaling s by which PEFT multiplies `B A`."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that, a regular expression, is all of the name or its tail after a dot."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def matches(key: str, name: str) -> bool:
    """Whether `of_pattern` finds a name by a key, which may be no regular expression."""
    try:
        return of_pattern({key: True}, name, False) is True
    except re.error:
        return False


def patterns(layers: Mapping[str, tuple[int, float]], config: Any) -> tuple[dict[str, int], dict[str, float]]:
    """`rank_pattern` and `alpha_pattern` that give every layer its rank and alpha, by `config_name`."""
    # No layer matches two keys of different values: the first match would count, but files sort their keys. Keys of the
    # config stay if they are true of all layers that they match; its `r` and `lora_alpha` are the default.
    ranks = _pattern({name: rank for name, (rank, _) in layers.items()}, config.r, config.rank_pattern or ())
    alphas = {name: alpha for name, (_, alpha) in layers.items()}
    return ranks, _pattern(alphas, config.lora_alpha, config.alpha_pattern or ())


def _pattern(values: Mapping[str, _Number], default: _Number, keys: Iterable[str]) -> dict[str, _Number]:
    pattern: dict[str, _Number] = {}
    covered: set[str] = set()
    for key in keys:
        matched = [name for name in values if matches(key, name)]
        if len({values[name] for name in matched}) == 1:
            covered.update(matched)
            if values[matched[0]] != default:
                pattern[key] = values[matched[0]]
    for name, value in values.items():
        if name not in covered and value != default:
            # An expression that matches nothing else, if the name would match a layer of another value.
            alike = all(values[other] == value for other in values if matches(name, other))
            pattern[name if alike and re.fullmatch(r"[\w.]+", name) else f"^{re.escape(name)}"] = value
    return pattern
