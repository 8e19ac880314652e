"""Principal components of the inputs of layers, exact or from sketches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_kernels.init.solving import batch_size, solve_layers
from lora_kernels.linalg import TopEigenpairs, eigh_topk
from lora_kernels.statistics.sketches import InputSketch
from lora_kernels.statistics.store import LayerStatistics
from lora_kernels.statistics.sums import InputSums

# The sums are float32: residuals below their rounding would be work for nothing.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Components:
    """The leading principal components of one input: variances and directions `(n, k)`."""

    pairs: TopEigenpairs
    total: float  # trace of the covariance
    tokens: float  # rows counted

    def ratios(self) -> list[float]:
        """Explained-variance ratios; zeros where the input never varies."""
        if self.total <= 0:
            return [0.0] * self.pairs.values.numel()
        return (self.pairs.values.clamp_min(0.0) / self.total).tolist()


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
    sketches = [part for part in sums if isinstance(part, InputSketch)]
    for sketch in sketches:
        yield Components(sketch.components(k, center=center), sketch.trace(center=center), sketch.tokens)
    if sketches:
        return
    matrices = torch.stack([part.covariance(center=center) for part in sums])
    pairs = eigh_topk(matrices, k, tolerance=_TOLERANCE, seed=seed)
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    for index, part in enumerate(sums):
        own = TopEigenpairs(pairs.values[index], pairs.vectors[index], pairs.residuals[index], pairs.method)
        yield Components(own, traces[index], part.tokens)
