"""LoRA-Dash: coordinates along the directions of the base weight that the task changes most."""

from lora_kernels.training.dash.run import DashLayer, DashReport, DashRun, LoraDash

__all__ = ["DashLayer", "DashReport", "DashRun", "LoraDash"]
