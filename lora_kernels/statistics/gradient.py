"""The mean loss gradient of a layer as an operator: dense, or as two thin factors where it was sketched."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def dense(self) -> torch.Tensor:
        """`(m, n)`."""
        return self.left if self.right is None else self.left @ self.right

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """G x, for x `(n, k)`."""
        x = x.to(self.left)
        return self.left @ x if self.right is None else self.left @ (self.right @ x)

    def transposed_times(self, y: torch.Tensor) -> torch.Tensor:
        """G^T y, for y `(m, k)`."""
        product = self.left.mT @ y.to(self.left)
        return product if self.right is None else self.right.mT @ product
