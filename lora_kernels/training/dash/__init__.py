"""LoRA-Dash: coordinates along the directions of the base weight that the task changes most."""

from lora_kernels.training.dash.report import DashLayer, DashReport
from lora_kernels.training.dash.run import DashRun, LoraDash

__all__ = ["DashLayer", "DashReport", "DashRun", "LoraDash"]
