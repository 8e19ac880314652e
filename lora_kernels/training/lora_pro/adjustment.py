"""The adjusted gradients of many pairs at once, in closed form (METHODS.md, LoRA-Pro).

With `S = B^T B = P diag(p) P^T` and `T = A A^T = Q diag(q) Q^T`, every inverse and the Sylvester equation share one
eigendecomposition of S and one of T:

    dA = (1/s^2) S+ gA + X A
    dB = (1/s^2) (gB - B S+ B^T gB) T+ - B X
    X  = P [ (P^T R Q)_ij / (p_i + q_j) ] Q^T,      R = -(1/s^2) S+ gA A^T

where `S+ = P diag(1 / (p + damping)) P^T`, and T+ likewise. The damping is in these two inverses alone, not in
`p_i + q_j`. Only products with the r columns (rows) of the factors touch the long axes: no m x m projector is formed.

Grams are taken in float64 and all r x r algebra is: `B^T B` is the square of a matrix that starts at zero, and products
in float32 lose the small eigenvalues that its inverse lives on. Products with the long axes are in float32 (float64 for
float64 parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_kernels.ops import eigh
from lora_kernels.training.lora_pro.shards import Layout


@dataclass(frozen=True)
class Factors:
    """The factors of L pairs of one shape.

    Attributes:
        a: `(L, r, n)`, whole.
        b: `(L, m', r)`, the rows of this process.
        scaling: `(L, 1, 1)` float64.
        rows: layout of the rows of B.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor
    rows: Layout

    def grams(self) -> torch.Tensor:
        """`B^T B` and `A A^T`, `(2, L, r, r)` float64."""
        a, b = self.a.to(torch.float64), self.b.to(torch.float64)
        return torch.stack([self.rows.add_up(torch.bmm(b.mT, b)), torch.bmm(a, a.mT)])


@dataclass(frozen=True)
class Spectra:
    """Eigenpairs of the Grams of L pairs, `(2, L, r)` and `(2, L, r, r)`: of `B^T B` first, then of `A A^T`."""

    values: torch.Tensor
    vectors: torch.Tensor

    def inverses(self, damping: float) -> torch.Tensor:
        """Eigenvalues of the damped pseudo-inverses, `(2, L, r)`; zero where the damped eigenvalue counts as zero."""
        damped = self.values + damping
        noise = damped.shape[-1] * torch.finfo(damped.dtype).eps * damped.amax(-1, keepdim=True)
        return torch.where(damped > noise, damped, torch.inf).reciprocal()


def decompose(grams: Sequence[torch.Tensor]) -> list[Spectra]:
    """One batched eigendecomposition for all Grams of one order on one device.

    Args:
        grams: each `(2, L, r, r)` float64.

    Returns:
        Spectra in the same order.
    """
    values, vectors = eigh(torch.cat(list(grams), 1))
    values = values.clamp_min(0.0)
    sizes = [each.shape[1] for each in grams]
    return [Spectra(*both) for both in zip(values.split(sizes, 1), vectors.split(sizes, 1), strict=True)]


class Adjustment:
    """Turns gradients of L pairs into adjusted ones, for factors that stay as they are."""

    def __init__(self, factors: Factors, spectra: Spectra, damping: float) -> None:
        """Prepare what does not depend on the gradients.

        Args:
            factors: of the pairs.
            spectra: of their Grams.
            damping: added to the eigenvalues of both Grams in the inverses.
        """
        self.factors = factors
        (self._p, self._q), (self._left, self._right) = spectra.values.unsqueeze(-1), spectra.vectors
        inverse_p, inverse_q = spectra.inverses(damping).unsqueeze(-1)
        # (1/s^2) S+ becomes the identity while B = 0: then gA is zero too, and 1/damping would blow up any noise in it.
        # Decided on the data, without the host ever reading it.
        self._unborn = self._p.sum(-2, keepdim=True) == 0
        self._inverse_p = torch.where(self._unborn, 1.0, inverse_p / factors.scaling.square())
        self._inverse_q = inverse_q / factors.scaling.square()
        self.left = self._left @ (self._inverse_p * self._left.mT)  # (1/s^2) S+, (L, r, r)
        self.right = self._right @ (self._inverse_q * self._right.mT)  # (1/s^2) T+

    def _cross(self, grad_a: torch.Tensor) -> torch.Tensor:
        """X, `(L, r, r)`; zero while B = 0, and in coefficients that the equation leaves open."""
        inner = torch.bmm(grad_a, self.factors.a.mT).to(torch.float64)
        rotated = self._inverse_p * (self._left.mT @ inner @ self._right)
        sums = self._p + self._q.mT
        noise = sums.shape[-1] * torch.finfo(sums.dtype).eps * sums.amax((-2, -1), keepdim=True)
        sums = torch.where((sums > noise) & ~self._unborn, sums, -torch.inf)
        return self._left @ (rotated / -sums) @ self._right.mT

    def __call__(self, grad_a: torch.Tensor, grad_b: torch.Tensor, *, cross: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The adjusted gradients.

        Args:
            grad_a: `(L, r, n)`, whole.
            grad_b: `(L, m', r)`, the rows of this process.
            cross: with the X terms. They do not change the update of the product `s B dA + s dB A`, only how it is
                divided between the factors.

        Returns:
            `dA (L, r, n)` and `dB (L, m', r)`.
        """
        a, b, work = self.factors.a, self.factors.b, grad_a.dtype
        overlap = self.factors.rows.add_up(torch.bmm(b.mT, grad_b)).to(torch.float64)
        inside = self.left @ (overlap @ self.right) * self.factors.scaling.square()
        d_a = torch.bmm(self.left.to(work), grad_a)
        if cross:
            x = self._cross(grad_a)
            inside += x
            d_a.baddbmm_(x.to(work), a)
        d_b = torch.bmm(grad_b, self.right.to(work)).baddbmm_(b, inside.to(work), alpha=-1)
        return d_a, d_b
