"""LoRA-Dash in transformers' Trainer. Imported only when it is asked for: `lora_kernels.LoRADashCallback`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lora_kernels.statistics.distributed import unwrap
from lora_kernels.training.dash import DashRun, LoRADash


class LoRADashCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches LoRA-Dash when a Trainer is made, and counts its optimizer steps.

        Trainer(model, args, train_dataset=data, callbacks=[lk.LoRADashCallback(lk.LoRADash(k=8))]).train()

    The coordinates are parameters before the Trainer makes its optimizer, loads a checkpoint or wraps the model; its
    checkpoints hold coordinates, directions and the count, and `resume_from_checkpoint` goes on from them, before the
    switch or after it.

    Args:
        config: by default `LoRADash()`.

    Attributes:
        run: the run, once a Trainer was made with this callback.

    Raises:
        TypeError: if `config` is something else.
    """

    def __init__(self, config: LoRADash | None = None) -> None:
        if config is not None and not isinstance(config, LoRADash):
            raise TypeError(f"config must be a LoRADash, got {type(config).__name__}")
        self.config = LoRADash() if config is None else config
        self.run: DashRun | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add the coordinates."""
        self.run = self.config.attach(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """See that the model in training is the one that has them.

        Raises:
            RuntimeError: if it is not.
        """
        held = {id(each) for each in unwrap(model).parameters()}
        if self.run is None or not all(id(each) in held for each in self.run.coordinates()):
            raise RuntimeError(
                "the model in training has no coordinates of this callback: pass it to Trainer(callbacks=[...]), not "
                "to add_callback, and a model, not model_init"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Count the step, and make the switch when it is time."""
        assert self.run is not None  # on_train_begin has seen to it
        self.run.step(optimizer)
