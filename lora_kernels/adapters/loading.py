"""Adding an adapter to a model, new or saved, and taking joined factors apart again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.folders import MARK, OWN
from lora_kernels.adapters.names import of_pattern
from lora_kernels.adapters.view import LoraView, lora_layers, require_peft
from lora_kernels.adapters.writing import set_rank


def _ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> list[tuple[LoraView, int, float]]:
    """The layers of an adapter, with the rank and alpha that a config's values mean."""
    settings = (("rank_pattern", own["r"]), ("alpha_pattern", own["lora_alpha"]))
    return [
        (view, *(of_pattern(own.get(pattern), view.config_name, default) for pattern, default in settings))
        for view in lora_layers(model, adapter)
    ]


def new_adapter(base: nn.Module, **settings: Any) -> Any:
    """PEFT's model of a base model and a new adapter; settings are those of `LoraConfig`."""
    require_peft()
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (peft is an optional dependency)

    return get_peft_model(base, LoraConfig(**settings))  # type: ignore[arg-type]


def wrap(base: nn.Module, folder: Path, adapter: str, **settings: Any) -> Any:
    """PEFT's model of a base model and a stock adapter."""
    from peft import PeftModel  # noqa: PLC0415  (peft is an optional dependency)

    return PeftModel.from_pretrained(base, str(folder), adapter_name=adapter, **settings)


def check_ranks(model: Any, adapter: str, own: Mapping[str, Any]) -> None:
    """Raise a ValueError if a layer has another rank or scaling than the file."""
    rslora = bool(own.get("use_rslora"))
    for view, rank, alpha in _ranks(model, adapter, own):
        has = view.rank(adapter), view.alpha(adapter)
        if (has[0], view.rslora(adapter)) != (rank, rslora) or not math.isclose(has[1], alpha):
            raise ValueError(
                f"layer {view.name} has rank {has[0]} and alpha {has[1]}, but the file was made for {rank} and {alpha}"
                f"{' with rsLoRA' * rslora}"
            )


def cut(model: Any, adapter: str, mark: Mapping[str, Any]) -> None:
    """Give a joined adapter, as PEFT has loaded it, its own ranks and config."""
    config = model.peft_config[adapter]
    for name in OWN:
        setattr(config, name, mark[name])
    config.auto_mapping = {key: value for key, value in config.auto_mapping.items() if key != MARK} or None
    for view, rank, alpha in _ranks(model, adapter, mark):
        set_rank(view.module, adapter, rank, alpha, rslora=mark["use_rslora"])


def fill(model: Any, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
    """Load tensors into an adapter of its own ranks, separated into its parts."""
    from peft import set_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    from lora_kernels.adapters.config import tidy_up  # noqa: PLC0415  (imports peft)

    set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    tidy_up(model, adapter)


def check_complete(model: Any, adapter: str, folder: Path, tensors: Iterable[str]) -> None:
    """Raise a ValueError if only the file or only the model has a factor, which PEFT would pass over."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415  (peft is an optional dependency)

    def factors(names: Iterable[str]) -> set[str]:
        return {name for name in names if ".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name}

    # Without embeddings: whether they have changed, older versions look up in the base model's folder, and warn.
    held = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    written, wanted = factors(tensors), factors(held)
    sides = (wanted - written, "the model", "the file"), (written - wanted, "the file", "the model")
    for missing, where, other in sides:
        if missing:
            what = f"{where} has {min(missing)}, which {other} has not ({len(missing)} such)"
            raise ValueError(f"adapter {str(folder)!r} does not fit this model: {what}")
