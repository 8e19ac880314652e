"""What passes over data leave behind."""

from lora_kernels.runtime.loss import loss_items
from lora_kernels.statistics.collector import collect
from lora_kernels.statistics.masks import token_weights
from lora_kernels.statistics.options import STATISTICS, CollectOptions, resolve_wants
from lora_kernels.statistics.plan import Plan, make_plan, parse_budget
from lora_kernels.statistics.sketches import GradientSketch, InputSketch
from lora_kernels.statistics.store import LayerStatistics, Statistics, Target
from lora_kernels.statistics.sums import FisherDiagonal, Gradient, InputMoments, OutputMoments, WeightGradient

__all__ = [
    "STATISTICS",
    "CollectOptions",
    "FisherDiagonal",
    "Gradient",
    "GradientSketch",
    "InputMoments",
    "InputSketch",
    "LayerStatistics",
    "OutputMoments",
    "Plan",
    "Statistics",
    "Target",
    "WeightGradient",
    "collect",
    "loss_items",
    "make_plan",
    "parse_budget",
    "resolve_wants",
    "token_weights",
]
