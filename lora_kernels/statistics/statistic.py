"""What can be collected: the sums of every statistic, exact or of the sketch that may stand in for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_kernels.statistics.gradients import FISHER, GRADIENT, FisherDiagonal, WeightGradient, add_gradient_and_fisher
from lora_kernels.statistics.moments import Accumulator, OutputGradients
from lora_kernels.statistics.sketches import GradientSketch, InputSketch

__all__ = ["GradientSketch", "InputSketch", "add_gradients", "new_sums", "shapes"]  # the sketches are registered

# Rows of the co-sketch of a gradient per column of its sketch (Tropp et al. 2017, "Practical sketching algorithms",
# section 4.5: the reconstruction needs l > k, and about 2 k is the best split of a given memory).
_CO_SIZE = 2


def new_sums(
    statistic: str,
    form: str,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    sketch_size: int,
    seed: int = 0,
    stream: int = 0,
) -> Accumulator:
    """Zero sums of a layer with a weight of shape `(m, n)`."""
    kind = Accumulator.statistics[statistic][form]  # the plan sketches what can be sketched
    sizes = {"out_features": shape[0], "in_features": shape[1]}
    sketch = {"size": sketch_size, "co_size": _CO_SIZE * sketch_size, "seed": seed, "stream": stream}
    return kind.empty({**sizes, **sketch, "features": sizes[kind.features_of]}, device, dtype)


def shapes(
    statistic: str, form: str, shape: tuple[int, int], dtype: torch.dtype, sketch_size: int
) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
    """Dtype, shape, and whether the lower triangle stands for the tensor, per tensor of `new_sums`."""
    sums = new_sums(statistic, form, shape, torch.device("meta"), dtype, sketch_size=sketch_size)
    return [(value.dtype, tuple(value.shape), name in sums.triangular) for name, value in sums.tensors().items()]


def add_gradients(sums: Mapping[str, Accumulator], call: OutputGradients) -> None:
    """Add the output gradients of one call to the sums of a layer, by statistic."""
    gradient, fisher = sums.get(GRADIENT), sums.get(FISHER)
    both = isinstance(gradient, WeightGradient) and isinstance(fisher, FisherDiagonal)
    if both:
        add_gradient_and_fisher(gradient, fisher, call)  # type: ignore[arg-type]
    for part in sums.values():
        if not (both and part in (gradient, fisher)):
            part.add(call)
