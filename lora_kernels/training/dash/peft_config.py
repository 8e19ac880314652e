"""The config of an adapter with coordinates. Imported only where PEFT is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig


@dataclass
class DashLoraConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's config and the settings of LoRA-Dash, which `save_pretrained` writes with it.

    Stock PEFT does not know the key and says so when it loads the folder; it then has the adapter without coordinates.
    """

    lora_dash: dict[str, Any] | None = None


def extend(config: LoraConfig, settings: dict[str, Any]) -> None:
    """Make a config say that its adapter has coordinates.

    Args:
        config: changed in place, since others hold it.
        settings: what is written.

    Raises:
        TypeError: if it is of a class of its own already.
    """
    if type(config) not in (LoraConfig, DashLoraConfig):
        raise TypeError(f"the adapter's config is a {type(config).__name__}, but must be peft's LoraConfig")
    config.__class__ = DashLoraConfig
    config.lora_dash = settings


def reduce(config: LoraConfig) -> None:
    """Undo `extend`.

    Args:
        config: changed in place.
    """
    if type(config) is DashLoraConfig:
        del config.lora_dash
        config.__class__ = LoraConfig
