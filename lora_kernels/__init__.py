"""Data-aware LoRA: the best starting adapter for your data, in one pass, on fused kernels.

    import lora_kernels as lk

    report = lk.initialize(peft_model, loader, method="eva")

Importing touches no GPU and needs no compiler.
"""

from typing import TYPE_CHECKING, Any

from lora_kernels import init, landscape, linalg, ops, statistics, training
from lora_kernels._version import __version__
from lora_kernels.init import EVA, CorDA, LoraDA, LoraGA, PiSSA, Redistribution, TaskDirections
from lora_kernels.integrations.diagnosis import diagnose, snapshot
from lora_kernels.integrations.entry import collect, initialize, plan
from lora_kernels.integrations.monitor import LandscapeMonitor
from lora_kernels.integrations.report import InitReport, LayerReport
from lora_kernels.integrations.saved import export, load
from lora_kernels.integrations.tsd import LoRATSD
from lora_kernels.landscape import Diagnosis, LayerDiagnosis, Thresholds
from lora_kernels.statistics import CollectOptions, Plan, Statistics
from lora_kernels.training import (
    AccelerateReport,
    LoRADash,
    LoRAPro,
    accelerate,
    create_lorapro_optimizer,
    lorapro_cls_and_kwargs,
    reference_mode,
    restore,
    verify,
)
from lora_kernels.tuning import TuneReport, tune

if TYPE_CHECKING:
    from lora_kernels.integrations.callbacks import LandscapeCallback, LoRADashCallback

__all__ = [
    "EVA",
    "AccelerateReport",
    "CollectOptions",
    "CorDA",
    "Diagnosis",
    "InitReport",
    "LandscapeCallback",
    "LandscapeMonitor",
    "LayerDiagnosis",
    "LayerReport",
    "LoRADash",
    "LoRADashCallback",
    "LoRAPro",
    "LoRATSD",
    "LoraDA",
    "LoraGA",
    "PiSSA",
    "Plan",
    "Redistribution",
    "Statistics",
    "TaskDirections",
    "Thresholds",
    "TuneReport",
    "__version__",
    "accelerate",
    "collect",
    "create_lorapro_optimizer",
    "diagnose",
    "export",
    "init",
    "initialize",
    "landscape",
    "linalg",
    "load",
    "lorapro_cls_and_kwargs",
    "ops",
    "plan",
    "reference_mode",
    "restore",
    "snapshot",
    "statistics",
    "training",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    # transformers is an optional dependency, and slow to import.
    if name in ("LandscapeCallback", "LoRADashCallback"):
        from lora_kernels.integrations import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
