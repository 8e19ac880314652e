"""Sums over batches and processes: moments of inputs and output gradients, Fisher diagonal, weight gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from lora_kernels.ops.covariance.op import covariance_
from lora_kernels.ops.gradient_statistics.op import gradient_statistics_

INPUT_SECOND = "input_second"
OUTPUT_SECOND = "output_second"
FISHER = "fisher"
GRADIENT = "gradient"
_PANEL = 512
# Rows of the co-sketch of a gradient per column of its sketch (Tropp et al. 2017, "Practical sketching algorithms",
# section 4.5: the reconstruction needs l > k, and about 2 k is the best split of a given memory).
_CO_SIZE = 2


def pack_lower(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle of `(n, n)` as `(packed_size(n),)`, by panels of rows; diagonal panels are kept whole."""
    size = matrix.shape[0]
    return torch.cat([matrix[low : low + _PANEL, : low + _PANEL].reshape(-1) for low in range(0, max(size, 1), _PANEL)])


def unpack_lower_(matrix: torch.Tensor, packed: torch.Tensor) -> None:
    """Write the result of `pack_lower` into a matrix `(n, n)`."""
    offset = 0
    for low in range(0, matrix.shape[0], _PANEL):
        panel = matrix[low : low + _PANEL, : low + _PANEL]
        panel.copy_(packed[offset : offset + panel.numel()].view_as(panel))
        offset += panel.numel()


def packed_size(size: int) -> int:
    """Number of entries that `pack_lower` gives for a matrix of order `size`."""
    return sum(min(_PANEL, size - low) * min(low + _PANEL, size) for low in range(0, size, _PANEL))


def as_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Activations without their graph: 16-bit ones as they are, wider ones in the dtype of the sums."""
    x = x.detach()
    return x.to(dtype) if torch.float64 in (dtype, x.dtype) else x


class OutputGradients(NamedTuple):
    """Of one call of a layer, what sums of output gradients read."""

    g: torch.Tensor  # `(..., m)`, the gradients of the sum of losses by the outputs
    x: torch.Tensor | None  # `(..., n)`, the inputs; `None` if no sum of the layer reads them
    # `(...)` bool or real, which rows count in second moments and in the Fisher diagonal.
    weight: torch.Tensor | None = None
    # `(...)` real, multiplies g row by row; bool: rows that count at all (in `weight` too).
    factors: torch.Tensor | None = None


class Accumulator:
    """Sums over the rows of one layer that add over batches and processes; the class is one form of a statistic."""

    kind: ClassVar[str]  # name of the class in stored files
    statistic: ClassVar[str]  # the statistic it is the sum of
    words: ClassVar[str]  # the statistic in words
    form: ClassVar[str] = "exact"  # `exact` or `sketch`
    # Whether it sums output gradients (`add`); otherwise it sums inputs (`update`).
    needs_backward: ClassVar[bool] = True
    arguments: ClassVar[tuple[str, ...]] = ("features",)  # of the constructor, apart from device and dtype
    fields: ClassVar[tuple[str, ...]] = ("count", "total")  # attributes that hold the sums
    triangular: ClassVar[tuple[str, ...]] = ()  # those of them of which only the lower triangle counts
    main: ClassVar[str] = "total"  # the one that is zero if and only if nothing was added
    vector: ClassVar[str] = "total"  # a small one that is finite if all are, or empty
    features_of: ClassVar[str] = "in_features"  # the size of the layer that the argument `features` stands for
    reads_input: ClassVar[bool] = False  # whether `add` reads the layer's input, too
    kinds: ClassVar[dict[str, type[Accumulator]]] = {}
    statistics: ClassVar[dict[str, dict[str, type[Accumulator]]]] = {}  # by statistic and form

    count: torch.Tensor  # scalar float64 tensor, the (weighted) number of rows

    def __init_subclass__(cls) -> None:
        """Register the class, if it has a kind of its own."""
        if "kind" in vars(cls):
            cls.kinds[cls.kind] = cls
            cls.statistics.setdefault(cls.statistic, {})[cls.form] = cls

    @classmethod
    def empty(cls, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Accumulator:
        """Zero sums, from a mapping that holds at least the arguments."""
        return cls(device=device, dtype=dtype, **{name: settings[name] for name in cls.arguments})  # type: ignore[call-arg]

    def settings(self) -> dict[str, Any]:
        """The arguments that rebuild an empty one, apart from device and dtype."""
        return {name: getattr(self, name) for name in self.arguments}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums, by name."""
        return {name: getattr(self, name) for name in self.fields}

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        for name in self.fields:
            setattr(self, name, getattr(self, name).to(device))

    def add(self, call: OutputGradients) -> None:
        """Add the output gradients of one call (see `add_gradients`); `count` is added in the forward pass."""
        raise NotImplementedError

    def mean_over(self, loss_items: float) -> torch.Tensor:
        """The mean over tokens, or over loss items where that is what was summed; of a sketch its reconstruction."""
        raise NotImplementedError

    def clear(self) -> None:
        """Set all sums to zero."""
        for sums in self.tensors().values():
            sums.zero_()

    @property
    def tokens(self) -> float:
        """The number of rows (waits for the device)."""
        return float(self.count)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return getattr(self, self.main).dtype  # type: ignore[no-any-return]

    @property
    def is_zero(self) -> bool:
        """Whether nothing but zeros was added (waits for the device)."""
        return not bool(getattr(self, self.main).any())

    def check_counted(self) -> float:
        """The number of rows, above zero."""
        if self.tokens <= 0:
            raise ValueError(f"the {self.statistic} holds {self.tokens:g} tokens: none was seen, or all were masked")
        return self.tokens


class InputSums(Accumulator):
    """Sums over tokens of one input, with `total`, that of the input itself, `(n,)`."""

    statistic = INPUT_SECOND
    words = "second moment of the input"
    needs_backward = False
    features: int
    total: torch.Tensor

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add activations `(..., n)`; weight `(...)` is a bool selection or real, `None` counts every row once."""
        self._add_rows(as_rows(x, self.dtype), weight)
        if weight is None:
            self.count += x.numel() // max(self.features, 1)
        else:
            self.count += weight.sum(dtype=torch.float64)

    def _add_rows(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        raise NotImplementedError

    def mean(self) -> torch.Tensor:
        """The mean input, `(n,)` float64; zero where nothing was counted."""
        return self.total.to(torch.float64) / self.count.clamp_min(torch.finfo(torch.float64).tiny)

    def covariance(self, *, center: bool = True) -> torch.Tensor:
        """The covariance, or the raw second moment `M / N`, `(n, n)` float64."""
        raise NotImplementedError

    def mean_over(self, loss_items: float) -> torch.Tensor:  # noqa: ARG002
        """The mean outer product over tokens."""
        return self.covariance(center=False)


class InputMoments(InputSums):
    """Sums over tokens of one input: count `sum w`, sum `sum w x` and second moment `sum w x x^T`.

    They add over batches and over processes. The second moment is kept as its lower triangle.

    Attributes:
        features: n.
        count: scalar float64 tensor, `sum w_t`.
        total: `(n,)`, `sum w_t x_t`.
        second: `(n, n)`, the lower triangle of `sum w_t x_t x_t^T`; the strict upper triangle is unspecified.
    """

    kind = "input_moments"
    fields = ("count", "total", "second")
    triangular = ("second",)
    main = "second"

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Start at zero; `device` and `dtype` (float32, or float64 for reference work) are those of the sums."""
        self.features = features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=dtype, device=device)
        self.second = torch.zeros(features, features, dtype=dtype, device=device)

    def _add_rows(self, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        covariance_(self.second, x, weight, self.total)

    def covariance(self, *, center: bool = True) -> torch.Tensor:
        """The covariance `M / N - mu mu^T`, or the raw second moment `M / N`.

        The subtraction is done in float64: where the mean is large against the spread (as it is for some features of
        language models), float32 would lose what is left.

        Args:
            center: whether to subtract the mean's outer product.

        Returns:
            `(n, n)` float64, symmetric, both triangles filled.

        Raises:
            ValueError: if no token was counted.
        """
        tokens = self.check_counted()
        mean = self.mean()
        result = torch.empty(self.features, self.features, dtype=torch.float64, device=self.second.device)
        for low in range(0, self.features, _PANEL):
            high = min(low + _PANEL, self.features)
            rows = self.second[low:high, :high].to(torch.float64, copy=True).div_(tokens)
            if center:
                rows.addr_(mean[low:high], mean[:high], alpha=-1.0)
            diagonal = rows[:, low:].tril()
            result[low:high, :low] = rows[:, :low]
            result[:low, low:high] = rows[:, :low].mT
            result[low:high, low:high] = diagonal + diagonal.tril(-1).mT
        return result


class OutputMoments(InputMoments):
    """The same of a layer's output gradients; rows are counted in the forward pass."""

    kind = "output_moments"
    statistic = OUTPUT_SECOND
    words = "second moment of the output gradients"
    needs_backward = True
    features_of = "out_features"

    def add(self, call: OutputGradients) -> None:
        """Add the gradients of a call."""
        g, factors = call.g, call.factors
        if factors is not None and factors.dtype != torch.bool:
            g = g * factors.unsqueeze(-1)  # not squared weights: the count is of tokens
        covariance_(self.second, as_rows(g, self.second.dtype), call.weight, self.total)


class FisherDiagonal(Accumulator):
    """`sum w_t g_t^2` over rows, g the gradient of the sum of losses by the output; `total` is `(m,)`."""

    kind = "fisher"
    statistic = FISHER
    words = "Fisher diagonal"
    features_of = "out_features"

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.features = features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=dtype, device=device)

    def mean_over(self, loss_items: float) -> torch.Tensor:  # noqa: ARG002
        """The mean over tokens, `(m,)` float64."""
        return self.total.to(torch.float64) / self.check_counted()


class WeightGradient(Accumulator):
    """`sum g_t x_t^T` over all rows; `total` is `(m, n)`.

    A mask would falsify it: rows without a loss of their own still move the losses of later ones.
    """

    kind = "weight_gradient"
    statistic = GRADIENT
    words = "weight gradient"
    arguments = ("out_features", "in_features")
    vector = ""
    reads_input = True

    def __init__(
        self, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(out_features, in_features, dtype=dtype, device=device)

    def mean_over(self, loss_items: float) -> torch.Tensor:
        """The gradient of the mean loss, `(m, n)`."""
        return self.total / loss_items


@dataclass(frozen=True)
class Gradient:
    """The loss gradient of one layer, `(m, n)`, as `left right` where it is known by a sketch.

    Attributes:
        left: `(m, n)`, or `(m, k)`.
        right: `(k, n)`, or `None`.
        error: a bound on the spectral norm of what the sketch leaves out, with probability
            `linalg.randomized_svd.CONFIDENCE`.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None
    error: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """G x, for x `(n, k)`."""
        x = x.to(self.left)
        return self.left @ x if self.right is None else self.left @ (self.right @ x)

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        """G^T y, for y `(m, k)`."""
        product = self.left.mT @ y.to(self.left)
        return product if self.right is None else self.right.mT @ product


def add_gradients(sums: Mapping[str, Accumulator], call: OutputGradients) -> None:
    """Add the output gradients of one call to the sums of a layer: to weight gradient and Fisher diagonal at once."""
    g, x, weight, factors = call
    gradient = next((part for part in sums.values() if isinstance(part, WeightGradient)), None)
    fisher = next((part for part in sums.values() if isinstance(part, FisherDiagonal)), None)
    either = fisher if gradient is None else gradient
    if either is not None:
        # A selection of rows needs no more than `weight`, which has it too.
        squared = weight
        if factors is not None and factors.dtype != torch.bool:
            squared = factors.square() if weight is None else factors.square() * weight
        gradient_statistics_(
            None if gradient is None else gradient.total,
            None if fisher is None else fisher.total,
            as_rows(g, either.dtype),
            None if gradient is None or x is None else as_rows(x, either.dtype),
            weight=None if gradient is None else factors,
            fisher_weight=None if fisher is None else squared,
        )
    for part in sums.values():
        if part is not gradient and part is not fisher:
            part.add(call)


def new_sums(
    statistic: str, form: str, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> Accumulator:
    """Zero sums of a layer with `out_features` and `in_features`; a sketch has `size` columns, a `seed`, a `stream`."""
    kind = Accumulator.statistics[statistic][form]  # the plan sketches what can be sketched
    derived = {"co_size": _CO_SIZE * sizes["size"], "features": sizes[kind.features_of]}
    return kind.empty({"seed": 0, "stream": 0, **sizes, **derived}, device, dtype)


def needs_backward(statistics: Iterable[str]) -> list[str]:
    """Those of some statistics that read the gradients of outputs."""
    return [name for name in statistics if next(iter(Accumulator.statistics[name].values())).needs_backward]
