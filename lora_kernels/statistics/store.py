"""The result of a collection: per layer, the sums that data-aware methods read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import as_device
from lora_kernels.statistics import storage
from lora_kernels.statistics.sketches import GradientSketch
from lora_kernels.statistics.storage import Counts, LayerSums, Progress
from lora_kernels.statistics.sums import (
    FISHER,
    GRADIENT,
    INPUT_SECOND,
    OUTPUT_SECOND,
    Accumulator,
    Gradient,
    InputSums,
    needs_backward,
)


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


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What was seen of one layer; its methods answer with means over tokens or over loss items.

    Attributes:
        name: the layer's name.
        in_features: n.
        out_features: m.
        sums: by statistic; those of the input are shared (the same object) by layers that read the same tensor.
            Without those that were not asked for, and empty if the layer was never called.
        shared_with: the other layers that share the sums of the input.
        notes: facts a user should know, in words.
        loss_items: what sums of gradients are divided by; `Statistics` sets it for its layers.
    """

    name: str
    in_features: int
    out_features: int
    sums: Mapping[str, Accumulator] = field(default_factory=dict)
    shared_with: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loss_items: float = 1.0

    @property
    def tokens(self) -> float:
        """Rows counted for this layer."""
        return next((sums.tokens for sums in self.sums.values()), 0.0)

    @property
    def input(self) -> InputSums | None:
        """The sums of its input, exact or a sketch."""
        sums = self.sums.get(INPUT_SECOND)
        assert sums is None or isinstance(sums, InputSums)
        return sums

    def form(self, statistic: str) -> str | None:
        """`exact` or `sketch`; `None` if the statistic was not collected."""
        return self.sums[statistic].form if statistic in self.sums else None

    def reached(self, wants: Iterable[str]) -> bool:
        """Whether data reached the layer, and its loss gradients if one of these statistics needs them."""
        backward = [self.sums.get(name) for name in needs_backward(wants)]
        return self.tokens > 0 and all(sums is not None and not sums.is_zero for sums in backward)

    @property
    def has_gradient(self) -> bool:
        """Whether a weight gradient was collected, exact or sketched, that is not zero."""
        return self.loss_items > 0 and GRADIENT in self.sums and not self.sums[GRADIENT].is_zero

    def mean(self, statistic: str) -> torch.Tensor:
        """The mean of a statistic, over tokens or over loss items; of a sketch its reconstruction.

        Args:
            statistic: its name, as in `collect(wants=...)`.

        Raises:
            ValueError: if it was not collected, or nothing was counted.
        """
        sums = self._sums(statistic)
        return sums.mean_over(self._items() if sums.needs_backward else 1.0)

    def gradient(self) -> torch.Tensor:
        """`mean("gradient")`: the gradient of the mean loss by the weight, `(m, n)`."""
        return self.mean(GRADIENT)

    def gradient_operator(self) -> Gradient:
        """The gradient of the mean loss by the weight; of a sketch as two factors, with a bound on their error."""
        sums = self._sums(GRADIENT)
        if not isinstance(sums, GradientSketch):
            return Gradient(sums.total / self._items())  # type: ignore[attr-defined]
        triplets = sums.svd(min(sums.size, self.in_features, self.out_features), scale=1.0 / self._items())
        return Gradient(triplets.U * triplets.S, triplets.Vh, float(triplets.error))

    def fisher(self) -> torch.Tensor:
        """`mean("fisher")`: the mean squared output gradient over tokens, `(m,)` float64."""
        return self.mean(FISHER)

    def output_second(self, *, center: bool = False) -> torch.Tensor:
        """The mean of g g^T over the output gradients of all tokens, `(m, m)` float64; with `center` the covariance.

        Raises:
            ValueError: if it was not collected, or no token was counted.
        """
        return self._sums(OUTPUT_SECOND).covariance(center=center)  # type: ignore[attr-defined, no-any-return]

    def input_covariance(self, *, center: bool = False) -> torch.Tensor:
        """The mean of x x^T over tokens, `(n, n)` float64, of a sketch its reconstruction; `center`: the covariance.

        Raises:
            ValueError: if it was not collected, or no token was counted.
        """
        return self._sums(INPUT_SECOND).covariance(center=center)  # type: ignore[attr-defined, no-any-return]

    def _sums(self, statistic: str) -> Accumulator:
        if statistic not in self.sums:
            raise ValueError(f'layer {self.name} has no {statistic}: collect it with wants=("{statistic}",)')
        return self.sums[statistic]

    def _items(self) -> float:
        if self.loss_items <= 0:
            raise ValueError(f"layer {self.name} has loss_items 0: its mean gradient is not known")
        return self.loss_items


@dataclass(kw_only=True, eq=False)
class Statistics(Counts, Mapping[str, LayerStatistics]):
    """Statistics of all observed layers, by name, in the model's order.

    Attributes:
        layers: the statistics by layer name.
        batches: number of batches read in a pass, over all processes.
        samples: number of samples read in a pass.
        tokens: number of tokens counted in the batch masks (rows of the first layer where there is no mask).
        loss_items: number of items (tokens or samples, see `CollectOptions.weighting`) whose losses were
            differentiated. 0 without a backward pass.
        seconds: wall time of the passes.
        skipped_rows: rows left out because they were not finite (`nonfinite="skip"`), by layer.
        skipped_modules: modules with weights that are not linear layers and were not observed, and why.
        fingerprint: of the model, the targets and the options (see `storage`).
    """

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Tell the layers how many items their gradients are sums over."""
        self.layers = {name: replace(layer, loss_items=self.loss_items) for name, layer in self.layers.items()}

    def __getitem__(self, name: str) -> LayerStatistics:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def save(self, path: str | Path) -> None:
        """Write the statistics to one safetensors file, atomically."""
        parts: dict[int, LayerSums] = {}
        for name, layer in self.items():
            for sums in layer.sums.values():
                parts.setdefault(id(sums), LayerSums([], sums)).layers.append(name)
        notes = {name: list(layer.notes) for name, layer in self.items() if layer.notes}
        progress = Progress(done=self.batches, complete=True, notes=notes, **self.counts())
        targets = [[layer.name, layer.in_features, layer.out_features] for layer in self.values()]
        storage.write(Path(path), parts.values(), progress, {**self.fingerprint, "targets": targets})

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> Statistics:
        """Read statistics that `save`, or a finished `collect(checkpoint=...)`, wrote.

        Args:
            path: the file.
            device: where the sums are to live.

        Raises:
            TypeError: if `device` is neither a device nor the name of one.
            ValueError: if the file is missing, truncated, changed, or holds an unfinished run, or there is no such
                device.
        """
        parts, progress, identity = storage.read(Path(path), as_device("device", device))
        if not progress.complete:
            raise ValueError(
                f"{path} holds an unfinished run (pass {progress.number + 1}, {progress.done} batches): "
                "call collect with checkpoint= this file to finish it"
            )
        targets = [(str(name), int(n), int(m)) for name, n, m in identity["targets"]]
        return assemble(targets, parts, progress, identity)


def assemble(
    targets: Sequence[tuple[str, int, int]], parts: Iterable[LayerSums], progress: Progress, identity: Mapping[str, Any]
) -> Statistics:
    """The statistics from sums, for layers given by name, in_features and out_features."""
    sums: dict[str, dict[str, Accumulator]] = {name: {} for name, _, _ in targets}
    partners: dict[str, list[str]] = {}
    for part in parts:
        of_input = not part.sums.needs_backward
        members = [name for name in part.layers if not of_input or name not in progress.left_out]
        for name in members:
            sums[name][part.sums.statistic] = part.sums
        if of_input:
            partners |= dict.fromkeys(members, members)
    layers = {}
    for name, in_features, out_features in targets:
        seen = {statistic: sums[name][statistic] for statistic in Accumulator.statistics if statistic in sums[name]}
        notes = list(progress.notes.get(name, []))
        backward = [part for part in seen.values() if part.needs_backward]
        if not seen and not notes:
            notes.append("never called in this pass")
        if backward and all(part.is_zero for part in backward):
            notes.append("no gradient was counted for this layer")
        layers[name] = LayerStatistics(
            name=name,
            in_features=in_features,
            out_features=out_features,
            sums=seen,
            shared_with=tuple(other for other in partners.get(name, ()) if other != name),
            notes=tuple(dict.fromkeys(notes)),
        )
    return Statistics(layers=layers, fingerprint=dict(identity), **progress.counts())
