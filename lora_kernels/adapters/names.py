"""The rank and alpha patterns of PEFT's configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "base_model.model."


def patterns(layers: Mapping[str, tuple[int, float]], config: Any) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha patterns that give every layer its own values under PEFT's matching rule (first match wins).

    Args:
        layers: rank and alpha by the layer's name in the base model.
        config: with the values of all other layers, `r` and `lora_alpha`.

    Returns:
        `rank_pattern` and `alpha_pattern`.
    """
    from peft.utils.other import get_pattern_key  # noqa: PLC0415  (peft is an optional dependency)

    def build(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
        # Longest name first: a name can be the tail of a longer one, and PEFT matches tails.
        pattern = {name: values[name] for name in sorted(values, key=len, reverse=True) if values[name] != default}
        for name in sorted(values, key=len, reverse=True):
            if pattern.get(get_pattern_key(pattern.keys(), name), default) != values[name]:
                pattern = {name: values[name], **pattern}
        return pattern

    ranks = build({name: rank for name, (rank, _) in layers.items()}, config.r)
    alphas = build({name: alpha for name, (_, alpha) in layers.items()}, config.lora_alpha)
    return ranks, alphas
