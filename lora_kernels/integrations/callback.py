"""`lk.LandscapeCallback`: the monitor inside of transformers' Trainer, through the trainer's own logging."""

from __future__ import annotations

import functools
import inspect
import warnings
from pathlib import Path
from typing import Any

from lora_kernels.integrations.monitor import LandscapeMonitor

PREFIX = "landscape/"


@functools.cache
def _with_base(cls: type) -> type:
    """The class as a subclass of transformers' `TrainerCallback`, which is imported only here."""
    from transformers import TrainerCallback  # noqa: PLC0415  (an optional dependency)

    return cls if issubclass(cls, TrainerCallback) else type(cls.__name__, (cls, TrainerCallback), {})


class LandscapeCallback:
    """Measures the adapters every so many steps and adds the numbers to the trainer's logs.

        Trainer(model, args, train_dataset=data, callbacks=[lk.LandscapeCallback(every=50)]).train()

    At a measured step the trainer is asked to log (unless `logging_strategy` is "no"), and the numbers go into that log
    under `landscape/`: into `state.log_history`, and to every callback that reports, such as TensorBoard's. A callback
    has no way to log by itself, and those that report stand before it in the trainer's list: so it moves to the front
    of that list when training begins, and completes the trainer's logs before the others read them.

    Attributes:
        monitor: the `LandscapeMonitor` behind it, with `latest`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LandscapeCallback:
        """Make an instance that is also a `transformers.TrainerCallback`."""
        made: LandscapeCallback = object.__new__(_with_base(cls))  # type: ignore[arg-type]
        return made

    def __init__(self, every: int = 50, path: str | Path | None = None, **settings: Any) -> None:
        """Prepare.

        Args:
            every: optimizer steps between two measurements.
            path: .jsonl file for every layer's numbers, written by the main process.
            settings: further arguments of `LandscapeMonitor`.
        """
        self.monitor = LandscapeMonitor(every, path, **settings)
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to the front of the callbacks, and take what stays."""
        self._lead()
        if not state.is_world_process_zero:
            self.monitor.path = None
        self._pending = {}
        self.monitor.begin(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is time to, and ask for a log."""
        numbers = self.monitor.step(kwargs["model"], state.global_step)
        if numbers is None:
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

    def _lead(self) -> None:
        """Move to the front of the list that calls this callback.

        Its owner, the trainer's callback handler, is none of the arguments of an event: it is found among the callers.
        """
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            callbacks = getattr(owner, "callbacks", None)
            if owner is not self and isinstance(callbacks, list) and any(each is self for each in callbacks):
                # (In place and before the place that the caller has come to: it misses none and calls none twice.)
                place = next(index for index, each in enumerate(callbacks) if each is self)
                callbacks.insert(0, callbacks.pop(place))
                return
            frame = frame.f_back
        warnings.warn(
            "the list of callbacks was not found: the landscape's numbers reach state.log_history and the file, but no "
            "callback that stands before this one",
            RuntimeWarning,
            stacklevel=2,
        )
