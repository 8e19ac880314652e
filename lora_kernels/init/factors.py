"""What a method reads of a layer's adapter, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of an adapter, `W + s B A`.

    Attributes:
        A: `(r, n)` float32.
        B: `(m, r)` float32.
    """

    A: torch.Tensor
    B: torch.Tensor

    @property
    def rank(self) -> int:
        """Rank: the number of rows of A."""
        return self.A.shape[0]


@dataclass(frozen=True)
class LayerFactors:
    """A method's answer for one layer.

    Attributes:
        factors: the factors; rank 0 where the layer is to have no adapter.
        explained_variance: share of the input variance in the span of A's rows, in [0, 1]; NaN if the input never
            varies, or the method does not look at it.
        residual: largest relative residual of the eigenpairs behind A (see `linalg.TopEigenpairs`), or what the
            method says of the error of its singular triplets, relative to the largest singular value.
        solver: the algorithm; `stock` for LoRA's own start, where the method has nothing to start from.
        notes: facts a user should know, in words.
    """

    factors: LoraFactors
    explained_variance: float = math.nan
    residual: float = 0.0
    solver: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseLayer:
    """What a method may need to know of the layer under an adapter."""

    # Returns W, `(m, n)` float32, dequantized where the base is; called only by methods that need it.
    weight: Callable[[], torch.Tensor]
    scaling: float  # s, by which PEFT multiplies `B A`
    adapter: Callable[[], LoraFactors] | None = None  # returns the factors as they are now, or `None`
    shape: tuple[int, int] | None = None  # `(m, n)`; by default that of `weight()`


def as_factors(a: torch.Tensor, b: torch.Tensor) -> LoraFactors:
    """The factors in float32."""
    return LoraFactors(a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous())


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, scaling: float) -> tuple[LoraFactors, tuple[str, ...]]:
    """The factors with `scaling * B A = U diag(S) Vh` (`(m, r)`, `(r,)`, `(r, n)`), S split evenly; and notes."""
    root = (s / scaling).sqrt()
    factors = as_factors(root.unsqueeze(-1) * vh, u * root)
    zeros = int((s <= 0).sum())
    if not zeros:
        return factors, ()
    return factors, (f"{zeros} components have singular value zero: their rows of A and B are zero and never learn",)
