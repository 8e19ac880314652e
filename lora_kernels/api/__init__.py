"""The user's entry points: where the maths meets models."""

from typing import TYPE_CHECKING, Any

from lora_kernels.adapters.export import ExportedLayer
from lora_kernels.api.diagnosis import snapshot
from lora_kernels.api.learning_rate import LearningRateAdvice
from lora_kernels.api.monitor import LandscapeMonitor
from lora_kernels.api.report import InitReport, LayerReport

if TYPE_CHECKING:
    from lora_kernels.api.callbacks import LandscapeCallback, LearningRateCallback, LoraDashCallback

__all__ = [
    "ExportedLayer",
    "InitReport",
    "LandscapeCallback",
    "LandscapeMonitor",
    "LayerReport",
    "LearningRateAdvice",
    "LearningRateCallback",
    "LoraDashCallback",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    # transformers is an optional dependency, and slow to import.
    if name in ("LandscapeCallback", "LearningRateCallback", "LoraDashCallback"):
        from lora_kernels.api import callbacks  # noqa: PLC0415

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
