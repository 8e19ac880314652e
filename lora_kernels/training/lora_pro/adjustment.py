"""The adjusted gradients of many pairs at once, in closed form (docs/methods/lora_pro.md).

With `S = B^T B = P diag(p) P^T` and `T = A A^T = Q diag(q) Q^T`, every inverse and the Sylvester equation share one
eigendecomposition of S and one of T:

    dA = (1/s^2) S+ gA + X A
    dB = (1/s^2) (gB - B S+ B^T gB) T+ - B X
    X  = P [ (P^T R Q)_ij / (p_i + q_j) ] Q^T,      R = -(1/s^2) S+ gA A^T

where `S+ = P diag(1 / (p + damping)) P^T`, and T+ likewise; where p is zero, to rounding, its inverse is zero too. The
damping is in these two inverses alone, not in `p_i + q_j`. Only products with the r columns (rows) of the factors touch
the long axes: no m x m projector is formed.

Grams and all r x r algebra are in float64: `B^T B` is the square of a matrix that starts at zero, and float32 would
lose the small eigenvalues that dominate its inverse. The other products with the long axes are in float32 (float64 for
float64 parameters).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_kernels.ops import eigh
from lora_kernels.training.lora_pro.buckets import Bucket


def _eigenpairs(grams: torch.Tensor, buckets: Sequence[Bucket]) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        values, vectors = eigh(grams)
    except ValueError as error:
        indices = [index for bucket in buckets for index, _ in bucket.matrices]
        broken = [index for index, pair in zip(indices, grams.unbind(1), strict=True) if not pair.isfinite().all()]
        if not broken:
            raise
        raise ValueError(
            f"pair {broken[0]} has factors with NaN or infinite entries (from a gradient that was not finite in an "
            "earlier step?)"
        ) from error
    return values.clamp_min(0.0), vectors


class Adjustment:
    """The adjusted gradients of pairs of one rank, for fixed factors."""

    def __init__(self, buckets: Sequence[Bucket], scaling: torch.Tensor, damping: float) -> None:
        """One batched eigendecomposition for all pairs, of one rank, dtype and device; `scaling` `(L,)` float64."""
        self.buckets, self._sizes = buckets, [len(bucket.a) for bucket in buckets]
        values, vectors = _eigenpairs(torch.cat([bucket.grams for bucket in buckets], 1), buckets)
        self._squared = scaling.square().view(-1, 1, 1)
        epsilon = values.shape[-1] * torch.finfo(values.dtype).eps
        largest = values.amax(-1, keepdim=True)
        # Where a factor has lost its rank, the gradient of the other is zero up to rounding errors, which 1/damping
        # would amplify to the size of the rest: the inverse is zero there.
        lost = max(epsilon, (values.shape[-1] * torch.finfo(buckets[0].a.dtype).eps) ** 2) * largest
        inverses = torch.where(values > lost, 1.0 / (values + damping), 0.0).unsqueeze(-1) / self._squared
        # (1/s^2) S+ becomes the identity while B = 0: then gA is zero too, and 1/damping would blow up any noise in it.
        # Decided on the device, without a synchronisation.
        b_is_zero = values[0].sum(-1).eq(0.0).view(-1, 1, 1)
        self._p_inverse = torch.where(b_is_zero, 1.0, inverses[0])
        self._p_vectors, self._q_vectors = vectors
        self._s_inverse = self._p_vectors @ (self._p_inverse * self._p_vectors.mT)  # (1/s^2) S+, (L, r, r)
        self._t_inverse = self._q_vectors @ (inverses[1] * self._q_vectors.mT)  # (1/s^2) T+
        sums = values[0].unsqueeze(-1) + values[1].unsqueeze(-2)
        # Coefficients that the equation does not determine are zero, and all of X while B = 0.
        noise = torch.where(b_is_zero, torch.inf, epsilon * sums.amax((-2, -1), keepdim=True))
        self._over_sums = torch.where(sums > noise, 1.0 / sums, 0.0)

    def __call__(self, *, cross: bool) -> None:
        """Fill `out_a` and `out_b` of the buckets with the adjusted `grad_a` and `grad_b`.

        `cross` adds the X terms, which only change how the update `s B dA + s dB A` is split between the factors.
        """
        overlap = torch.cat([bucket.overlap for bucket in self.buckets])
        inside = self._s_inverse @ overlap.to(torch.float64) @ self._t_inverse * self._squared
        if cross:
            inner = torch.cat([bucket.inner for bucket in self.buckets]).to(torch.float64)
            rotated = self._p_inverse * (self._p_vectors.mT @ inner @ self._q_vectors)
            x = self._p_vectors @ (rotated * self._over_sums) @ self._q_vectors.mT  # -X
            inside -= x
        parts = [torch.split(matrices, self._sizes) for matrices in (self._s_inverse, self._t_inverse, inside)]
        crosses = torch.split(x, self._sizes) if cross else [None] * len(self.buckets)
        for bucket, left, right, middle, minus_x in zip(self.buckets, *parts, crosses, strict=True):
            work = bucket.a.dtype
            torch.bmm(left.to(work), bucket.grad_a, out=bucket.out_a)
            if minus_x is not None:
                bucket.out_a.baddbmm_(minus_x.to(work), bucket.a, alpha=-1)
            torch.bmm(bucket.grad_b, right.to(work), out=bucket.out_b)
            bucket.out_b.baddbmm_(bucket.b, middle.to(work), alpha=-1)
