"""Data-aware LoRA: the best starting adapter for your data, in one pass, on fused kernels.

    import lora_kernels as lk

    report = lk.initialize(peft_model, loader, method="eva")

Importing touches no GPU and needs no compiler.
"""

from typing import TYPE_CHECKING, Any

from lora_kernels import init, landscape, linalg, ops, statistics, training
from lora_kernels._version import __version__
from lora_kernels.api.diagnosis import diagnose, snapshot
from lora_kernels.api.entry import collect, initialize, plan
from lora_kernels.api.monitor import LandscapeMonitor
from lora_kernels.api.report import InitReport, LayerReport
from lora_kernels.api.saved import export, load
from lora_kernels.api.tsd import LoraTSD
from lora_kernels.init import EVA, CorDA, LoraDA, LoraGA, LoraOne, PiSSA, Redistribution, TaskDirections
from lora_kernels.landscape import Diagnosis, LayerDiagnosis, Thresholds
from lora_kernels.statistics import CollectOptions, Plan, Statistics
from lora_kernels.training import (
    AccelerateReport,
    LoraDash,
    LoraPro,
    accelerate,
    create_lora_pro_optimizer,
    lora_pro_cls_and_kwargs,
    reference_mode,
    restore,
    verify,
)
from lora_kernels.tuning import TuneReport, tune

if TYPE_CHECKING:
    from lora_kernels.api.callbacks import LandscapeCallback, LoraDashCallback

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
    "LoraDash",
    "LoraDashCallback",
    "LoraPro",
    "LoraTSD",
    "LoraDA",
    "LoraGA",
    "LoraOne",
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
    "create_lora_pro_optimizer",
    "diagnose",
    "export",
    "init",
    "initialize",
    "landscape",
    "linalg",
    "load",
    "lora_pro_cls_and_kwargs",
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
    if name in ("LandscapeCallback", "LoraDashCallback"):
        from lora_kernels.api import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
