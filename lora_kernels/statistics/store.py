"""The result of a collection: per layer, the sums that data-aware methods read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import as_device
from lora_kernels.linalg.randomized_svd import RandomizedSVD, randomized_svd
from lora_kernels.statistics import storage
from lora_kernels.statistics.gradient import Gradient
from lora_kernels.statistics.outputs import OutputStatistics
from lora_kernels.statistics.sharing import InputSums
from lora_kernels.statistics.storage import Held, Progress

_ROUNDS = 4  # of the randomized SVD of an exact gradient


@dataclass(frozen=True)
class Target:
    """A linear map to be observed.

    Attributes:
        name: its name in the model.
        module: the module whose forward is called with the input as first argument.
        in_features: n.
        out_features: m.
    """

    name: str
    module: nn.Module
    in_features: int
    out_features: int


@dataclass(frozen=True)
class LayerStatistics:
    """What was seen of one layer.

    Attributes:
        name: the layer's name.
        in_features: n.
        out_features: m.
        input: the sums of its input (exact or a sketch), shared (the same object) by layers that read the same tensor;
            `None` if the layer was never called, or they were not asked for.
        shared_with: the other layers that share `input`.
        notes: facts a user should know, in words.
        output: the sums of its output gradients; `None` if the layer was never called, or they were not asked for.
        loss_items: see `Statistics`, which sets it.
    """

    name: str
    in_features: int
    out_features: int
    input: InputSums | None
    shared_with: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    output: OutputStatistics | None = None
    loss_items: float = 0.0

    @property
    def tokens(self) -> float:
        """Rows counted for this layer."""
        sums = self.input if self.input is not None else self.output
        return 0.0 if sums is None else sums.tokens

    @property
    def has_gradient(self) -> bool:
        """Whether a weight gradient was collected, exact or sketched, and the loss depends on the layer."""
        output = self.output
        collected = output is not None and (output.gradient is not None or output.sketch is not None)
        return collected and self.loss_items > 0 and output is not None and float(output.calls) > 0

    def gradient(self) -> torch.Tensor:
        """The gradient of the mean loss by the weight, `(m, n)`; of a sketch its reconstruction.

        Raises:
            ValueError: if it was not collected.
        """
        return self.gradient_operator().dense()

    def gradient_operator(self) -> Gradient:
        """The gradient of the mean loss by the weight; of a sketch as two factors, with a bound on their error.

        Raises:
            ValueError: if it was not collected.
        """
        output = self._output("gradient")
        if output.gradient is not None:
            return Gradient(output.gradient / self._items())
        assert output.sketch is not None
        triplets = self.gradient_svd(min(output.sketch.size, self.in_features, self.out_features))
        assert triplets.error is not None  # sketches carry probes
        return Gradient(triplets.U * triplets.S, triplets.Vh, float(triplets.error))

    def gradient_svd(self, rank: int, *, seed: int = 0) -> RandomizedSVD:
        """The leading singular triplets of the gradient of the mean loss, with a bound on what they leave.

        Args:
            rank: number of triplets.
            seed: of the random start, where the gradient is exact.

        Raises:
            ValueError: if the gradient was not collected, or its sketch has fewer columns.
        """
        output = self._output("gradient")
        if output.sketch is not None:
            return output.sketch.svd(rank, scale=1.0 / self._items())
        return randomized_svd(self.gradient(), rank, n_iter=_ROUNDS, seed=seed)

    def fisher(self) -> torch.Tensor:
        """The mean squared output gradient over tokens, `(m,)` float64.

        Raises:
            ValueError: if it was not collected, or no token was counted.
        """
        output = self._output("fisher")
        assert output.fisher is not None
        return output.fisher.to(torch.float64) / _counted(self.name, output.tokens)

    def output_second(self, *, center: bool = False) -> torch.Tensor:
        """The mean of g g^T over the output gradients of all tokens, `(m, m)` float64.

        Args:
            center: whether to subtract the outer product of their mean.

        Raises:
            ValueError: if it was not collected, or no token was counted.
        """
        output = self._output("output_second")
        assert output.second is not None
        return output.second.covariance(center=center)

    def input_covariance(self, *, center: bool = False) -> torch.Tensor:
        """The mean of x x^T over the inputs of all tokens, `(n, n)` float64; of a sketch its reconstruction.

        Args:
            center: whether to subtract the outer product of the mean input.

        Raises:
            ValueError: if it was not collected, or no token was counted.
        """
        if self.input is None:
            raise ValueError(f'layer {self.name} has no input_second: collect it with wants=("input_second",)')
        return self.input.covariance(center=center)

    def _output(self, statistic: str) -> OutputStatistics:
        if self.output is None or statistic not in self.output.forms:
            raise ValueError(f'layer {self.name} has no {statistic}: collect it with wants=("{statistic}",)')
        return self.output

    def _items(self) -> float:
        if self.loss_items <= 0:
            raise ValueError(f"layer {self.name} has loss_items 0: its mean gradient is not known")
        return self.loss_items


def _counted(name: str, tokens: float) -> float:
    if tokens <= 0:
        raise ValueError(f"layer {name} counted no token: it was never called, or every token was masked")
    return tokens


@dataclass(frozen=True)
class Statistics(Mapping[str, LayerStatistics]):
    """Statistics of all observed layers, by name, in the model's order.

    Attributes:
        layers: the statistics by layer name.
        batches: number of batches read in each pass, over all processes.
        tokens: number of tokens counted in the batch masks (rows of the first layer where there is no mask).
        seconds: wall time of the passes.
        skipped_rows: rows left out because they were not finite (`nonfinite="skip"`), by layer.
        loss_items: number of items (tokens or samples, see `CollectOptions.weighting`) whose losses were
            differentiated; a weight gradient divided by it is the mean loss gradient. 0 without a backward pass.
        samples: number of samples read in each pass.
        skipped_modules: modules with weights that are not linear layers and were not observed, and why.
        fingerprint: of the model, the targets and the options (see `storage`).
    """

    layers: dict[str, LayerStatistics]
    batches: int
    tokens: float
    seconds: float
    skipped_rows: dict[str, int] = field(default_factory=dict)
    loss_items: float = 0.0
    samples: int = 0
    skipped_modules: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tell the layers how many items their gradients are sums over."""
        layers = {name: replace(layer, loss_items=self.loss_items) for name, layer in self.layers.items()}
        object.__setattr__(self, "layers", layers)

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistics of a layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in the model's order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def save(self, path: str | Path) -> None:
        """Write the statistics to one safetensors file, atomically.

        Args:
            path: the file.
        """
        held, progress = _disassemble(self)
        targets = [[each.name, each.in_features, each.out_features] for each in self.values()]
        storage.write(Path(path), held, progress, {**self.fingerprint, "targets": targets})

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> Statistics:
        """Read statistics that `save`, or a finished `collect(checkpoint=...)`, wrote.

        Args:
            path: the file.
            device: where the sums are to live.

        Returns:
            The statistics.

        Raises:
            TypeError: if `device` is neither a device nor the name of one.
            ValueError: if the file is missing, truncated, changed, or holds an unfinished run, or there is no such
                device.
        """
        held, progress, identity = storage.read(Path(path), as_device("device", device))
        if not progress.complete:
            raise ValueError(
                f"{path} holds an unfinished run (pass {progress.number + 1}, {progress.done} batches): "
                "call collect with checkpoint= this file to finish it"
            )
        targets = [(str(name), int(n), int(m)) for name, n, m in identity["targets"]]
        return assemble(targets, held, progress, identity)


def assemble(
    targets: Sequence[tuple[str, int, int]], held: Iterable[Held], progress: Progress, identity: Mapping[str, Any]
) -> Statistics:
    """The statistics made of sums.

    Args:
        targets: name, in_features and out_features of every observed layer.
        held: the sums.
        progress: counts, notes.
        identity: the fingerprint.

    Returns:
        The statistics.
    """
    inputs: dict[str, Held] = {}
    outputs: dict[str, OutputStatistics] = {}
    for each in held:
        if isinstance(each.sums, OutputStatistics):
            outputs[each.layers[0]] = _merged(outputs.get(each.layers[0]), each.sums)
        else:
            inputs |= dict.fromkeys(each.layers, each)
    layers = {}
    for name, in_features, out_features in targets:
        group, output = inputs.get(name), outputs.get(name)
        notes = list(progress.notes.get(name, []))
        if group is None and output is None:
            notes.append("never called in this pass")
        if output is not None and float(output.calls) == 0:
            notes.append("no gradient was counted for this layer")
        others = tuple(each for each in group.layers if each != name) if group else ()
        sums = group.sums if group else None
        assert not isinstance(sums, OutputStatistics)
        layers[name] = LayerStatistics(name, in_features, out_features, sums, others, tuple(notes), output)
    return Statistics(
        layers,
        progress.batches,
        progress.tokens,
        progress.seconds,
        progress.skipped,
        progress.loss_items,
        progress.samples,
        progress.skipped_modules,
        dict(identity),
    )


def _merged(first: OutputStatistics | None, second: OutputStatistics) -> OutputStatistics:
    """The sums of one layer that different passes collected."""
    if first is None:
        return second
    for name in ("fisher", "second", "gradient", "sketch"):
        value = getattr(second, name)
        if value is not None:
            setattr(first, name, value)
    first.forms |= second.forms
    return first


def _disassemble(statistics: Statistics) -> tuple[list[Held], Progress]:
    """The sums of statistics, each once, and their counts."""
    inputs: dict[int, Held] = {}
    held = []
    notes = {name: list(layer.notes) for name, layer in statistics.items() if layer.notes}
    for name, layer in statistics.items():
        if layer.input is not None:
            inputs.setdefault(id(layer.input), Held([], layer.input)).layers.append(name)
        if layer.output is not None:
            held.append(Held([name], layer.output))
    counts = (statistics.tokens, statistics.loss_items, statistics.samples, statistics.batches, statistics.seconds)
    progress = Progress(0, statistics.batches, "", True, *counts, statistics.skipped_rows, notes)
    progress.skipped_modules = statistics.skipped_modules
    return [*inputs.values(), *held], progress
