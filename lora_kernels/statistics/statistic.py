"""What can be collected: one `Statistic` each, with its exact sums and the sketch that may stand in for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_kernels.statistics.gradients import FISHER, GRADIENT, FisherDiagonal, WeightGradient, add_gradient_and_fisher
from lora_kernels.statistics.moments import Accumulator, InputMoments, OutputMoments
from lora_kernels.statistics.sketches import GradientSketch, InputSketch

# Rows of the co-sketch of a gradient per column of its sketch (Tropp et al. 2017, "Practical sketching algorithms",
# section 4.5: the reconstruction needs l > k, and about 2 k is the best split of a given memory).
_CO_SIZE = 2


@dataclass(frozen=True)
class Statistic:
    """A statistic of a layer.

    Attributes:
        exact: its sums.
        sketch: the sums of a random sketch, if one can stand in.
        needs_backward: whether it reads the gradients of outputs; otherwise it reads inputs.
    """

    exact: type[Accumulator]
    sketch: type[Accumulator] | None = None
    needs_backward: bool = True

    @property
    def name(self) -> str:
        """Its name in `wants`."""
        return self.exact.statistic

    def new(
        self,
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
        kind = self.exact if form == "exact" else self.sketch
        assert kind is not None  # the plan sketches what can be sketched
        sizes = {"out_features": shape[0], "in_features": shape[1]}
        sketch = {"size": sketch_size, "co_size": _CO_SIZE * sketch_size, "seed": seed, "stream": stream}
        return kind.empty({**sizes, **sketch, "features": sizes[kind.features_of]}, device, dtype)

    def shapes(
        self, form: str, shape: tuple[int, int], dtype: torch.dtype, sketch_size: int
    ) -> list[tuple[torch.dtype, tuple[int, ...], bool]]:
        """Dtype, shape, and whether the lower triangle stands for the tensor, of each tensor of the sums."""
        sums = self.new(form, shape, torch.device("meta"), dtype, sketch_size=sketch_size)
        tensors = sums.tensors().items()
        return [(value.dtype, tuple(value.shape), name in sums.triangular) for name, value in tensors]


BY_NAME: Mapping[str, Statistic] = {
    statistic.name: statistic
    for statistic in (
        Statistic(InputMoments, InputSketch, needs_backward=False),
        Statistic(OutputMoments),
        Statistic(FisherDiagonal),
        Statistic(WeightGradient, GradientSketch),
    )
}


def add_gradients(
    sums: Mapping[str, Accumulator],
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    factors: torch.Tensor | None,
) -> None:
    """Add the output gradients of one call to the sums of a layer.

    Args:
        sums: by statistic.
        g: `(..., m)`, the gradients of the sum of losses by the outputs.
        x: `(..., n)`, the inputs, if one of the sums reads them.
        weight: `(...)` bool or real, which rows count in second moments and in the Fisher diagonal.
        factors: `(...)` real, multiplies g of each row; bool: rows that count at all (in `weight` too).
    """
    gradient, fisher = sums.get(GRADIENT), sums.get(FISHER)
    both = isinstance(gradient, WeightGradient) and isinstance(fisher, FisherDiagonal)
    if both:
        add_gradient_and_fisher(gradient, fisher, g, x, weight, factors)  # type: ignore[arg-type]
    for part in sums.values():
        if not (both and part in (gradient, fisher)):
            part.add(g, x, weight, factors)
