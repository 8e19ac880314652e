"""Data-aware LoRA: the best starting adapter for your data, in one pass, on fused kernels.

    import lora_kernels as lk

    report = lk.initialize(peft_model, loader, method="eva")

Importing touches no GPU, needs no compiler, and loads a name at its first use: the functions below, and the
subpackages with everything else (`lk.init.EVA`, `lk.statistics.Statistics`, `lk.api.LandscapeMonitor`, ...).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_kernels._version import __version__

if TYPE_CHECKING:
    from lora_kernels import api, init, landscape, linalg, ops, statistics, training
    from lora_kernels.adapters.export import export
    from lora_kernels.api.diagnosis import diagnose
    from lora_kernels.api.entry import collect, initialize, plan
    from lora_kernels.api.learning_rate import suggest_learning_rate
    from lora_kernels.api.loading import load
    from lora_kernels.training import LoraDash, accelerate, create_lora_pro_optimizer, restore, verify
    from lora_kernels.tuning import tune

__all__ = [
    "LoraDash",
    "__version__",
    "accelerate",
    "api",
    "collect",
    "create_lora_pro_optimizer",
    "diagnose",
    "export",
    "init",
    "initialize",
    "landscape",
    "linalg",
    "load",
    "ops",
    "plan",
    "restore",
    "statistics",
    "suggest_learning_rate",
    "training",
    "tune",
    "verify",
]

_SUBPACKAGES = ("api", "init", "landscape", "linalg", "ops", "statistics", "training")
_HOMES = {
    "LoraDash": "training",
    "accelerate": "training",
    "collect": "api.entry",
    "create_lora_pro_optimizer": "training",
    "diagnose": "api.diagnosis",
    "export": "adapters.export",
    "initialize": "api.entry",
    "load": "api.loading",
    "plan": "api.entry",
    "restore": "training",
    "suggest_learning_rate": "api.learning_rate",
    "tune": "tuning",
    "verify": "training",
}


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
