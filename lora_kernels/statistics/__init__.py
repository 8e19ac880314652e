"""Floor 3: what one pass over data leaves behind."""

from lora_kernels.statistics.collector import collect
from lora_kernels.statistics.masks import token_weights
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.store import LayerStatistics, Statistics, Target

__all__ = ["InputMoments", "LayerStatistics", "Statistics", "Target", "collect", "token_weights"]
