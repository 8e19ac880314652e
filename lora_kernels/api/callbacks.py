"""Callbacks of transformers' Trainer. Imported only when they are asked for, as transformers is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lora_kernels._checks import check_type
from lora_kernels.api.learning_rate import LearningRateAdvice, advise
from lora_kernels.api.monitor import LandscapeMonitor
from lora_kernels.runtime.processes import unwrap
from lora_kernels.training.dash import DashRun, LoraDash
from lora_kernels.training.lora_pro import LoraPro

PREFIX = "landscape/"


class LoraDashCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches LoRA-Dash when a Trainer is created, and counts its optimizer steps.

        Trainer(model, args, train_dataset=data, callbacks=[lk.api.LoraDashCallback(lk.LoraDash(k=8))]).train()

    The coordinates are parameters before the Trainer makes its optimizer, loads a checkpoint or wraps the model; its
    checkpoints hold coordinates, directions and the count, and `resume_from_checkpoint` goes on from them, before the
    switch or after it. An optimizer of your own (`optimizers=(optimizer, None)`) should be created after
    `LoraDash(k=8).attach(model)`; one that does not hold the coordinates gets them, at the end of its group of the
    factors, when the Trainer is created.

    Args:
        config: by default `LoraDash()`.

    Attributes:
        run: the run, once a Trainer was created with this callback.

    Raises:
        TypeError: if `config` is something else.
    """

    def __init__(self, config: LoraDash | None = None) -> None:
        check_type("config", config, (LoraDash, type(None)), "a LoraDash")
        self.config = LoraDash() if config is None else config
        self.run: DashRun | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the coordinates, and give them to an optimizer that is there already (see `DashRun.join`)."""
        self.run = self.config.attach(model)
        if optimizer is not None:
            self.run.join(optimizer)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Raise a RuntimeError if model and optimizer of the training are not those that have them."""
        parameters = {id(parameter) for parameter in unwrap(model).parameters()}
        if self.run is None or not parameters.issuperset(map(id, self.run.coordinates())):
            raise RuntimeError(
                "the model in training has no coordinates of this callback: pass it to Trainer(callbacks=[...]), not "
                "to add_callback, and a model, not model_init"
            )
        trained = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
        to_train = {id(coordinate) for coordinate in self.run.coordinates() if coordinate.requires_grad}
        if optimizer is not None and not to_train <= trained:
            raise RuntimeError(
                "the optimizer does not hold the coordinates of LoRA-Dash, which are parameters of the model since the "
                "Trainer was created: create_optimizer must take all parameters that require gradients (ZeRO, which "
                "keeps flat shards, is not supported)"
            )
        for coordinate in self.run.coordinates():
            state = getattr(optimizer, "state", {}).get(coordinate, {}).values()
            if any(isinstance(value, torch.Tensor) and value.shape not in ((), coordinate.shape) for value in state):
                raise RuntimeError(
                    "the optimizer's parameters are in another order than they were in the checkpoint: in both runs, "
                    "attach LoraDash to the model before you make the optimizer"
                )

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Count the step, and make the switch when it is time."""
        assert self.run is not None  # on_train_begin has seen to it
        self.run.step(optimizer)


class LandscapeCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the adapters every so many steps and adds the numbers to the trainer's logs.

        trainer = Trainer(model, args, train_dataset=data)
        lk.api.LandscapeCallback(every=50).attach(trainer)
        trainer.train()

    At a measured step the trainer is asked to log (unless `logging_strategy` is "no"), and the numbers go into that log
    under `landscape/`: into `state.log_history`, and to every callback that reports, such as TensorBoard's. A callback
    in `callbacks=[...]` comes after those of `report_to`, which then miss the numbers.

    Attributes:
        monitor: the `LandscapeMonitor` behind it, with `latest`.
    """

    def __init__(self, every: int = 50, path: str | Path | None = None, **settings: Any) -> None:
        """Prepare; the arguments are those of `LandscapeMonitor`, whose file the main process writes."""
        self.monitor = LandscapeMonitor(every, path, **settings)
        self._pending: dict[str, float] = {}
        self._attached = False

    def attach(self, trainer: Any) -> LandscapeCallback:
        """Become the first callback of a transformers Trainer, so that all others find the numbers in its logs."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        self._attached = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure; a warning if reporting callbacks get the logs before the numbers are in them."""
        if getattr(args, "report_to", None) and not self._attached:
            what = f"{', '.join(args.report_to)} gets the logs before the numbers of the landscape are in them"
            use = "use LandscapeCallback(...).attach(trainer) instead of callbacks=[...]"
            warnings.warn(f"{what}: {use}", RuntimeWarning, stacklevel=2)
        if not state.is_world_process_zero:
            self.monitor.path = None
        self._pending = {}
        self.monitor.begin(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is time to, and ask for a log."""
        if (numbers := self.monitor.step(kwargs["model"], state.global_step)) is None:
            return
        self._pending = {f"{PREFIX}{name}": value for name, value in numbers.items()}
        if getattr(args.logging_strategy, "value", args.logging_strategy) != "no":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the numbers to a log of the trainer."""
        if logs is None or not self._pending:
            return
        logs.update(self._pending)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self._pending)
        self._pending = {}


class LearningRateCallback(TrainerCallback):  # type: ignore[misc]
    """Measures a learning rate on the first training batches when training begins, and warns where yours is outside.

        Trainer(model, args, train_dataset=data, callbacks=[lk.api.LearningRateCallback()]).train()

    The Trainer's rate stays as it is, and training gives the same bits with the callback and without it. A resumed
    training is not measured.

    Attributes:
        advice: what was measured; `None` before.
    """

    def __init__(self) -> None:
        self.advice: LearningRateAdvice | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, print one line, and warn."""
        if state.global_step > 0:
            return
        optimizer, loader = kwargs.get("optimizer"), kwargs.get("train_dataloader")
        inner = getattr(optimizer, "optimizer", optimizer)  # wrappers hold theirs
        # (accelerate's loaders note that they are being read: what is inside does not.)
        data = getattr(loader, "base_dataloader", loader)
        if isinstance(inner, LoraPro):
            name = "lora_pro_full" if inner.mode == "full" else "lora_pro"
            self.advice = advise(kwargs["model"], data, name, {})
        elif isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
            self.advice = advise(kwargs["model"], data, "adamw", {})
        else:
            kind = type(optimizer).__name__
            self.advice = LearningRateAdvice(optimizer=kind, reason="no share is known for it")
        outside = self.advice.judge(args.learning_rate)
        if state.is_world_process_zero:
            print(self.advice.summary())
            if outside is not None:
                warnings.warn(outside, RuntimeWarning, stacklevel=2)
