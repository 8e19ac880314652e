"""Decompositions from sketches alone, without the matrix. Batched over leading sizes; computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels._checks import check_number, check_range, check_tensor, repr_short
from lora_kernels.linalg.cholesky import damped_cholesky
from lora_kernels.linalg.randomized_svd import RandomizedSVD, fix_pair, probe_bound
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.orthonormalize import orthonormalize
from lora_kernels.ops.small_linalg import fix_signs

_UNIT = 2.0**-52
# Largest relative difference of Psi G Omega from either sketch: far above rounding, far below that of two matrices.
_MISMATCH = 0.5


@dataclass(frozen=True)
class Nystrom:
    """The leading eigenpairs of a positive semidefinite matrix.

    Attributes:
        values: `(..., rank)` float64, descending, not negative.
        vectors: `(..., n, rank)` float64, orthonormal columns; the entry of largest magnitude of each is positive.
        residual: `(...)` float64, the nuclear norm of `M - M_r`, or `None` without the trace. A Nystrom approximation
            never exceeds M, so this is exactly `trace(M) - sum(values)`; it also bounds the Frobenius and the spectral
            norm.
        shift: `(...)` float64, added to M before the factorisation and subtracted from the values: the level of
            rounding in the sketch. Values below it are noise.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    residual: torch.Tensor | None
    shift: torch.Tensor


def _check_sketch(name: str, value: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    check_tensor(name, value, dtypes=(torch.float32, torch.float64), numbers=True)
    if value.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have at least two sizes")
    if rows is not None and value.shape[-2] != rows:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have {rows} rows")
    wide = value.detach().to(torch.float64)
    finite = torch.isfinite(wide).flatten(-2).all(-1).reshape(-1)
    if not bool(finite.all()):
        raise ValueError(f"matrix {int((~finite).nonzero()[0])} of {name} holds NaN or infinite entries")
    return wide


def _check_batch(y: torch.Tensor, **others: torch.Tensor) -> None:
    """Check that the leading sizes are equal, or that the other matrices have none."""
    for name, other in others.items():
        if other.dim() > 2 and other.shape[:-2] != y.shape[:-2]:
            raise ValueError(f"y has shape {tuple(y.shape)} and {name} {tuple(other.shape)}: their batches differ")


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Frobenius norms `(..., 1, 1)` without overflow or underflow of squares."""
    scale = x.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    norm: torch.Tensor = torch.linalg.matrix_norm(x / scale, keepdim=True)
    return norm * scale


@without_autocast()
def nystrom(y: torch.Tensor, omega: torch.Tensor, rank: int, *, trace: torch.Tensor | float | None = None) -> Nystrom:
    """The leading eigenpairs of a positive semidefinite M from its sketch `Y = M Omega`.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736), algorithm 3: `Y (Omega^T Y)^+ Y^T`, computed for
    `M + shift` so that the core has a Cholesky factor. The result does not depend on Omega's scale or basis, and scales
    with Y. Without rounding, `Omega^T Y` is symmetric: its asymmetry is the noise of the sketch, and a lower bound for
    the shift.

    Args:
        y: `(..., n, k)` float32 or float64, k <= n.
        omega: `(n, k)` or `(..., n, k)`, of full rank.
        rank: number of pairs, 1 <= rank <= k.
        trace: the exact trace of M, `(...)` or a number, for the residual.

    Raises:
        TypeError: on another dtype.
        ValueError: if shapes do not match, rank is out of range, an entry is NaN or infinite, or the core is not
            positive definite with any shift.
    """
    wide = _check_sketch("y", y)
    test = _check_sketch("omega", omega, y.shape[-2])
    _check_batch(wide, omega=test)
    if isinstance(trace, torch.Tensor):
        check_tensor("trace", trace, numbers=True)
        if trace.shape not in ((), y.shape[:-2]):
            raise ValueError(f"trace has shape {tuple(trace.shape)}, but must have shape {tuple(y.shape[:-2])}")
    elif trace is not None:
        check_number("trace", trace)
    n, k = y.shape[-2:]
    if test.shape[-1] != k or k > n:
        raise ValueError(
            f"y has shape {tuple(y.shape)} and omega {tuple(omega.shape)}, but both must be (..., n, k) with k <= n"
        )
    check_range("rank", rank, low=1, high=k, integer=True)
    basis, triangle = orthonormalize(test)
    wide = torch.linalg.solve_triangular(triangle, wide, upper=True, left=False)
    basis = basis.expand_as(wide)
    scale = _norm(wide)
    wide = wide / torch.where(scale > 0, scale, 1.0)
    core = basis.mT @ wide
    noise = torch.linalg.matrix_norm(core - core.mT, keepdim=True)
    shift = torch.maximum(noise, torch.full_like(noise, _UNIT * n**0.5))
    lower, raised = damped_cholesky(
        (core + core.mT) / 2, shift[..., 0, 0], what="Omega^T y, as a sketch would make it,"
    )
    shift = raised[..., None, None]
    factor = torch.linalg.solve_triangular(lower.mT, wide + shift * basis, upper=True, left=False)
    q, r = orthonormalize(factor)
    left, s, _ = torch.linalg.svd(r)
    level = shift[..., 0]
    values = ((s.square() - level).clamp_min(0) * scale[..., 0])[..., :rank]
    residual = None
    if trace is not None:
        total = torch.as_tensor(trace, dtype=torch.float64, device=values.device)
        residual = (total - values.sum(-1)).clamp_min(0)
    return Nystrom(values, fix_signs(q @ left[..., :rank]), residual, (shift * scale)[..., 0, 0])


@without_autocast()
def two_sided(
    y: torch.Tensor,
    z: torch.Tensor,
    omega: torch.Tensor,
    psi: torch.Tensor,
    rank: int,
    *,
    probe: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RandomizedSVD:
    """The leading singular triplets of any G from its sketches `Y = G Omega` and `Z = Psi G`.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1609.00048), algorithm 7: `Q` spans Y, and `G ~ Q (Psi Q)^+ Z`.
    Exact where G has at most k singular values. The least-squares problem is well conditioned for l of 2 k or more.

    Args:
        y: `(..., m, k)` float32 or float64, k <= min(m, n).
        z: `(..., l, n)`, l >= k.
        omega: `(n, k)` or `(..., n, k)`; only used to check that the sketches are of one matrix.
        psi: `(l, m)` or `(..., l, m)`.
        rank: number of triplets, 1 <= rank <= k.
        probe: `(t, G t)`, `(n, p)` and `(..., m, p)`: gaussian vectors that are independent of omega, and their
            products with G, for the bound on the error.

    Returns:
        Triplets in float64; `error` is `None` without a probe.

    Raises:
        TypeError: on another dtype.
        ValueError: if shapes do not match, rank is out of range, an entry is NaN or infinite, or the sketches are of
            different matrices.
    """
    left = _check_sketch("y", y)
    right = _check_sketch("z", z)
    m, k = left.shape[-2:]
    length, n = right.shape[-2:]
    test = _check_sketch("omega", omega, n)
    co_test = _check_sketch("psi", psi, length)
    _check_batch(left, z=right, omega=test, psi=co_test)
    if co_test.shape[-1] != m or test.shape[-1] != k or k > min(length, m, n):
        raise ValueError(
            f"y, z, omega and psi have shapes {tuple(y.shape)}, {tuple(z.shape)}, {tuple(omega.shape)} and "
            f"{tuple(psi.shape)}, but must be (m, k), (l, n), (n, k) and (l, m) with k <= l, m and n"
        )
    check_range("rank", rank, low=1, high=k, integer=True)
    one, two = right @ test, co_test @ left
    apart = _norm(one - two) > _MISMATCH * torch.maximum(_norm(one), _norm(two))
    if bool(apart.any()):
        index = int(apart.reshape(-1).nonzero()[0])
        raise ValueError(f"z Omega and Psi y of matrix {index} differ, but both must be Psi G Omega")
    q, _ = orthonormalize(left)
    v, r = orthonormalize((torch.linalg.pinv(co_test @ q) @ right).mT)
    small, s, rotation = torch.linalg.svd(r.mT)
    u, v, s = q @ small[..., :rank], (v @ rotation.mT)[..., :rank], s[..., :rank]
    error = None
    if probe is not None:
        if not isinstance(probe, (tuple, list)) or len(probe) != 2:
            raise TypeError(f"probe must be None or two tensors, got {type(probe).__name__} {repr_short(probe)}")
        t, image = _check_sketch("probe[0]", probe[0], n), _check_sketch("probe[1]", probe[1], m)
        if t.shape[-1] != image.shape[-1] or t.shape[-1] < 1:
            raise ValueError(
                f"probe has shapes {tuple(t.shape)} and {tuple(image.shape)}, but both must have the same columns"
            )
        error = probe_bound(image - (u * s.unsqueeze(-2)) @ (v.mT @ t))
    u, v = fix_pair(u, v)
    return RandomizedSVD(u, s, v.mT, error, "two_sided")
