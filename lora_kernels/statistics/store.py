"""The result of a collection: per layer, the sums that data-aware methods read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lora_kernels.statistics.moments import InputMoments


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
        input: the moments of its input, shared (the same object) by layers that read the same tensor; `None` if the
            layer was never called.
        shared_with: the other layers that share `input`.
        notes: facts a user should know, in words.
    """

    name: str
    in_features: int
    out_features: int
    input: InputMoments | None
    shared_with: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistics(Mapping[str, LayerStatistics]):
    """Statistics of all observed layers, by name, in the model's order.

    Attributes:
        layers: the statistics by layer name.
        batches: number of batches read.
        tokens: number of tokens counted in the batch masks (rows of the first layer where there is no mask).
        seconds: wall time of the pass.
        skipped_rows: rows left out because they were not finite (`nonfinite="skip"`), by layer.
    """

    layers: dict[str, LayerStatistics]
    batches: int
    tokens: float
    seconds: float
    skipped_rows: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistics of a layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Layer names, in the model's order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)
