"""LoRA-TSD: an adapter that starts along task-specific directions, and then learns coordinates along more of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_kernels._checks import check_type
from lora_kernels.api.entry import initialize
from lora_kernels.api.report import InitReport
from lora_kernels.init import TaskDirections
from lora_kernels.training.dash import DashRun, LoraDash


@dataclass(frozen=True)
class LoraTSD:
    """LoRA-TSD (arXiv 2409.01035): LoRA-Init, then LoRA-Dash.

    (TSD is short for task-specific directions here; an optimizer goes by the same letters.) What the adapter has
    changed at the switch is `s B A` less what it started from, which the frozen start of `base="intact"` holds.

        report, run = lk.api.LoraTSD().attach(model, loader)

    Args:
        init: where the adapter starts.
        dash: what follows. With the same folder as `init.cache` and `dash.cache_dir`, base weights are decomposed once.

    Raises:
        TypeError: if one of them is something else.
    """

    init: TaskDirections = field(default_factory=TaskDirections)
    dash: LoraDash = field(default_factory=LoraDash)

    def __post_init__(self) -> None:
        check_type("init", self.init, TaskDirections, "a TaskDirections")
        check_type("dash", self.dash, LoraDash, "a LoraDash")

    def attach(
        self, model: nn.Module, loader: Iterable[Any] | None = None, **options: Any
    ) -> tuple[InitReport, DashRun]:
        """Initialise the adapter, and give it its coordinates; call it before the optimizer is created.

        Args:
            model: a PEFT model.
            loader: yields batches; not needed with `statistics=...`, or `init.update="adapter"`.
            options: of `lora_kernels.initialize`.

        Returns:
            What was initialised, and the run, whose `step(optimizer)` is to be called after every optimizer step.

        Raises:
            TypeError: if an option names the method or another adapter than `dash.adapter_name`.
        """
        if "method" in options or "adapter_name" in options:
            raise TypeError("method and adapter_name are settings of LoraTSD: init=... and dash=LoraDash(adapter_name)")
        adapter = self.dash.adapter_name or "default"
        report = initialize(model, loader, self.init, adapter_name=adapter, **options)
        return report, self.dash.attach(model)
