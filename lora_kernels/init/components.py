"""Principal components of the inputs of layers, exact or from sketches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kernels.init.solving import batch_size, solve_layers
from lora_kernels.linalg import eigh_topk
from lora_kernels.statistics.moments import InputMoments, InputSums
from lora_kernels.statistics.sketches import InputSketch
from lora_kernels.statistics.store import LayerStatistics

# The sums are float32: residuals below their rounding would be work for nothing.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Components:
    """The leading principal components of one input."""

    values: torch.Tensor  # `(k,)` variances, descending
    vectors: torch.Tensor  # `(n, k)`
    total: float  # trace of the covariance
    tokens: float  # rows counted
    residual: float  # largest relative residual of the eigenpairs, or the error bound of the sketch
    solver: str  # the algorithm

    def ratios(self) -> list[float]:
        """Explained-variance ratios; zeros where the input never varies."""
        if self.total <= 0:
            return [0.0] * self.values.numel()
        return (self.values.clamp_min(0.0) / self.total).tolist()


def input_components(
    statistics: Mapping[str, LayerStatistics], wanted: Mapping[str, int], *, center: bool = True, seed: int = 0
) -> dict[str, Components]:
    """The leading components of the inputs of layers, of the covariance or (`center=False`) of the raw second moment.

    Layers that read the same tensor share them, and may get more than they asked for.
    """
    inputs: dict[int, tuple[InputSums, int]] = {}
    keys: dict[str, int] = {}
    for name, count in wanted.items():
        sums = statistics[name].input
        if sums is None or sums.tokens <= 0:
            raise ValueError(f"layer {name} saw no token in the collection pass")
        keys[name] = id(sums)
        inputs[id(sums)] = sums, max(count, inputs.get(id(sums), (sums, 0))[1])
    first = {key: name for name, key in reversed(keys.items())}  # the same name on every process
    components = solve_layers(
        {first[key]: group for key, group in inputs.items()},
        lambda batch: _solve([sums for sums, _ in batch], batch[0][1], center, seed),
        title="decomposing inputs",
        unit="input",
        device=lambda group: group[0].total.device,
        together=lambda group: (group[0].kind, group[0].features, group[1], group[0].total.device),
        at_most=lambda group: batch_size(8 * group[0].features ** 2, group[0].total.device),  # float64 copies
        work=lambda group: float(group[0].features) ** 2 * group[1],
    )
    return {name: components[first[key]] for name, key in keys.items()}


def _solve(sums: Sequence[InputSums], k: int, center: bool, seed: int) -> Iterator[Components]:
    """Yield the components of inputs of one kind and size."""
    moments = [part for part in sums if isinstance(part, InputMoments)]
    if not moments:
        for sketch in sums:
            assert isinstance(sketch, InputSketch)  # the other kind
            leading, error = sketch.components(k, center=center)
            trace = sketch.trace(center=center)
            yield Components(leading.values, leading.vectors, trace, sketch.tokens, error, "nystrom")
        return
    matrices = torch.stack([part.covariance(center=center) for part in moments])
    pairs = eigh_topk(matrices, k, tolerance=_TOLERANCE, seed=seed)
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    residuals = pairs.residuals.tolist()
    for index, part in enumerate(moments):
        answer = pairs.values[index], pairs.vectors[index], traces[index], part.tokens, residuals[index]
        yield Components(*answer, pairs.method)
