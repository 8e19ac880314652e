"""Principal components of the inputs of layers, exact or from sketches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from lora_kernels.linalg import eigh_topk
from lora_kernels.runtime.processes import share_out, world_size
from lora_kernels.statistics.moments import InputMoments
from lora_kernels.statistics.sharing import InputSums
from lora_kernels.statistics.sketches import InputSketch
from lora_kernels.statistics.store import LayerStatistics

# Covariances decomposed in one batch: bounds the float64 copies to this many bytes.
_BATCH_BYTES = 512 * 2**20
# The sums are float32: residuals below their rounding would be work for nothing.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Components:
    """The leading principal components of one input.

    Attributes:
        values: `(k,)` variances, descending.
        vectors: `(n, k)`.
        total: trace of the covariance.
        tokens: rows counted.
        residual: largest relative residual of the eigenpairs, or the error bound of the sketch.
        solver: how they were found.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    total: float
    tokens: float
    residual: float
    solver: str

    def ratios(self) -> list[float]:
        """Explained-variance ratios; zeros where the input never varies."""
        if self.total <= 0:
            return [0.0] * self.values.numel()
        return (self.values.clamp_min(0.0) / self.total).tolist()


def input_components(
    statistics: Mapping[str, LayerStatistics],
    wanted: Mapping[str, int],
    *,
    center: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Components]:
    """The leading components of each layer's input; layers that read the same tensor share them.

    Args:
        statistics: of all layers named in `wanted`.
        wanted: components by layer; a layer may get more than it asked for.
        center: of the covariance; otherwise of the raw second moment.
        seed: of the random start of the eigensolver.
        progress: show a progress bar.

    Returns:
        The components, by layer.

    Raises:
        ValueError: if a layer saw no token, or a sketch has fewer columns than components are asked for.
    """
    for name in wanted:
        seen = statistics[name].input
        if seen is None or seen.tokens <= 0:
            raise ValueError(f"layer {name} saw no token in the collection pass")
    most: dict[str, int] = defaultdict(int)
    sums: dict[str, InputSums] = {}
    first: dict[int, str] = {}  # of the layers that share an input
    for name, count in wanted.items():
        found = statistics[name].input
        assert found is not None  # checked above
        key = first.setdefault(id(found), name)
        sums[key] = found
        most[key] = max(most[key], count)
    if not sums:
        return {}
    batches = dict(enumerate(_batches(sums, most)))
    with tqdm(total=len(sums), desc="decomposing inputs", unit="input", disable=not progress, leave=False) as bar:

        def solve(number: int) -> list[Components]:
            keys, k = batches[number]
            bar.update(len(keys))
            return _solve([sums[key] for key in keys], k, center, seed)

        # The processes of a distributed run share the batches out and exchange the results.
        solved = share_out(batches, solve, next(iter(sums.values())).total.device)
    by_key = {
        key: each for number, (keys, _) in batches.items() for key, each in zip(keys, solved[number], strict=True)
    }
    return {name: by_key[first[id(statistics[name].input)]] for name in wanted}


def _solve(sums: Sequence[InputSums], k: int, center: bool, seed: int) -> list[Components]:
    sketches = [each for each in sums if isinstance(each, InputSketch)]
    if sketches:
        return [_from_sketch(each, k, center) for each in sketches]
    moments = [each for each in sums if isinstance(each, InputMoments)]
    matrices = torch.stack([each.covariance(center=center) for each in moments])
    pairs = eigh_topk(matrices, k, tolerance=_TOLERANCE, seed=seed)
    traces = matrices.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    return [
        Components(
            pairs.values[index],
            pairs.vectors[index],
            traces[index],
            each.tokens,
            float(pairs.residuals[index]),
            pairs.method,
        )
        for index, each in enumerate(moments)
    ]


def _from_sketch(sketch: InputSketch, k: int, center: bool) -> Components:
    pairs, error = sketch.components(k, center=center)
    return Components(pairs.values, pairs.vectors, sketch.trace(center=center), sketch.tokens, error, "nystrom")


def _batches(sums: Mapping[str, InputSums], wanted: Mapping[str, int]) -> Iterator[tuple[list[str], int]]:
    """Inputs of one kind, order and number of components, in batches that bound the memory of their covariances.

    Yields:
        Keys of the inputs, and the number of components.
    """
    groups: dict[tuple[str, int, int, torch.device], list[str]] = defaultdict(list)
    for key, each in sums.items():
        groups[(each.kind, each.features, wanted[key], each.total.device)].append(key)
    for (_kind, order, k, _device), keys in groups.items():
        # No larger than what leaves every process a share.
        size = max(1, min(_BATCH_BYTES // (8 * order * order), -(-len(keys) // world_size())))
        for low in range(0, len(keys), size):
            yield keys[low : low + size], k
