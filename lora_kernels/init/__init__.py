"""Initialisation methods, pure functions of statistics. No module and no hook in here."""

from lora_kernels.init.corda import CorDA
from lora_kernels.init.eva import EVA
from lora_kernels.init.lora_da import LoraDA
from lora_kernels.init.lora_ga import LoraGA
from lora_kernels.init.lora_one import LoraOne
from lora_kernels.init.method import METHODS, InitMethod, resolve_method
from lora_kernels.init.pissa import PiSSA
from lora_kernels.init.problem import LayerFactors, LoraFactors
from lora_kernels.init.ranks import Redistribution, redistribute
from lora_kernels.init.task_directions import TaskDirections

__all__ = [
    "EVA",
    "METHODS",
    "CorDA",
    "InitMethod",
    "LayerFactors",
    "LoraDA",
    "LoraFactors",
    "LoraGA",
    "LoraOne",
    "PiSSA",
    "Redistribution",
    "TaskDirections",
    "redistribute",
    "resolve_method",
]
