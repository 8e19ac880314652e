"""Running first and second moments of a layer's input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lora_kernels.ops.covariance import covariance_

_PANEL = 512


def pack_lower(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle of a square matrix as a vector, by panels of rows: about half the memory.

    Args:
        matrix: `(n, n)`.

    Returns:
        `(packed_size(n),)`; on the diagonal panels also what lies above the diagonal.
    """
    size = matrix.shape[0]
    return torch.cat([matrix[low : low + _PANEL, : low + _PANEL].reshape(-1) for low in range(0, max(size, 1), _PANEL)])


def unpack_lower_(matrix: torch.Tensor, packed: torch.Tensor) -> None:
    """Write what `pack_lower` gave back into a matrix.

    Args:
        matrix: `(n, n)`.
        packed: of `pack_lower`.
    """
    offset = 0
    for low in range(0, matrix.shape[0], _PANEL):
        panel = matrix[low : low + _PANEL, : low + _PANEL]
        panel.copy_(packed[offset : offset + panel.numel()].view_as(panel))
        offset += panel.numel()


def packed_size(size: int) -> int:
    """Number of entries that `pack_lower` gives for a matrix of order `size`."""
    return sum(min(_PANEL, size - low) * min(low + _PANEL, size) for low in range(0, size, _PANEL))


def as_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Activations as the ops take them: 16-bit ones as they are, wider ones in the dtype of the sums.

    Args:
        x: any floating tensor.
        dtype: of the sums, float32 or float64.

    Returns:
        x without its graph.
    """
    x = x.detach()
    return x.to(dtype) if torch.float64 in (dtype, x.dtype) else x


class Accumulator:
    """Sums that add over batches and processes.

    Attributes:
        kind: name of the class in stored files.
        fields: attributes that hold the sums.
        triangular: those of them of which only the lower triangle counts.
    """

    kind: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    triangular: ClassVar[tuple[str, ...]] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums, by name."""
        return {name: getattr(self, name) for name in self.fields}

    def settings(self) -> dict[str, Any]:
        """The arguments that rebuild an empty one, but for the device and dtype."""
        raise NotImplementedError

    def clear(self) -> None:
        """Set all sums to zero."""
        for sums in self.tensors().values():
            sums.zero_()

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        for name in self.fields:
            setattr(self, name, getattr(self, name).to(device))


class InputMoments(Accumulator):
    """Sums over tokens of one input: count, sum and second moment (METHODS: `N`, `sum w x`, `sum w x x^T`).

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

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Start at zero.

        Args:
            features: n.
            device: where the sums live.
            dtype: float32, or float64 for reference work.
        """
        self.features = features
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=dtype, device=device)
        self.second = torch.zeros(features, features, dtype=dtype, device=device)

    def update(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: `(..., n)` activations.
            weight: `(...)` bool selection or real weights; `None` counts every row once.
        """
        x = as_rows(x, self.second.dtype)
        covariance_(self.second, x, weight, self.total)
        if weight is None:
            self.count += x.numel() // max(self.features, 1)
        else:
            self.count += weight.sum(dtype=torch.float64)

    def settings(self) -> dict[str, Any]:
        """The arguments that rebuild an empty one, but for the device and dtype."""
        return {"features": self.features}

    @property
    def tokens(self) -> float:
        """`sum w_t` as a Python number (waits for the device)."""
        return float(self.count)

    def mean(self) -> torch.Tensor:
        """The mean input, `(n,)` float64; zero where nothing was counted."""
        return self.total.to(torch.float64) / self.count.clamp_min(torch.finfo(torch.float64).tiny)

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
        tokens = self.tokens
        if tokens <= 0:
            raise ValueError(f"the moments hold {tokens:g} tokens: nothing was collected, or every token was masked")
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
