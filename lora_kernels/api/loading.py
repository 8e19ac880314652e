"""`lk.load`: a saved adapter with all its parts, to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lora_kernels.adapters import loading
from lora_kernels.adapters.folders import CONFIG, mark_of, read_config, read_tensors
from lora_kernels.adapters.layers import find_lora_layers, is_peft_model
from lora_kernels.adapters.view import require_peft
from lora_kernels.training.dash import LoraDash


def load(
    base: nn.Module, path: str | Path, *, adapter_name: str = "default", is_trainable: bool = True, **settings: Any
) -> nn.Module:
    """Load an adapter that `save_pretrained` wrote, to train on where it stood: frozen start and coordinates apart.

    (Stock `PeftModel.from_pretrained` loads the same function, all of it as factors of a larger rank.) A run of
    LoRA-Dash goes on by `LoraDash(...).attach(model)`, transformers' Trainer by `train(resume_from_checkpoint=...)`.

    Args:
        base: the unmodified base model; or a PEFT model that has the adapter already, of the same ranks, as a script
            makes it that would otherwise call `initialize`.
        path: the adapter's folder, such as a Trainer's checkpoint.
        adapter_name: the name that it gets, or has.
        is_trainable: whether its factors are to be trained; of a PEFT model they stay as they are.
        settings: more arguments of `PeftModel.from_pretrained`.

    Raises:
        ValueError: if the folder is missing, malformed or of another method, or does not fit the model: a factor of
            another shape, or one that only the file or only the model has.
        TypeError: on settings for a PEFT model, which is there already.
        ImportError: if PEFT is missing or too old.
    """
    require_peft()
    from lora_kernels.adapters.config import describe  # noqa: PLC0415  (imports peft)

    folder = Path(path)
    config, tensors = read_config(folder), read_tensors(folder)
    mark = mark_of(config)
    dash = None if mark is None else mark["dash"]
    try:
        coordinates = None if dash is None else LoraDash(**dash, adapter_name=adapter_name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} has wrong settings of LoRA-Dash: {error}") from error
    model: Any = base
    if existing := is_peft_model(base):
        if settings:
            raise TypeError(f"{', '.join(sorted(settings))}: the model is a PEFT model already")
        find_lora_layers(base, adapter_name, without_experts=None)  # or an error
        loading.check_ranks(model, adapter_name, config if mark is None else mark)
    try:
        if not existing:
            model = loading.wrap(base, folder, adapter_name, is_trainable=is_trainable, **settings)
        loading.check_complete(model, adapter_name, folder, tensors)
        if mark is not None and not existing:
            loading.cut(model, adapter_name, mark)
        if mark is not None or existing:
            describe(model, adapter_name)
            if coordinates is not None:
                coordinates.attach(model)
            loading.fill(model, adapter_name, tensors)
    except Exception as error:  # noqa: BLE001  (a wrong value surfaces anywhere in PEFT, as any error)
        raise ValueError(f"adapter {str(folder)!r} cannot be loaded onto this model: {error!r}") from error
    return model  # type: ignore[no-any-return]
