"""Decompositions from sketches alone, without the matrix; in float64."""

from __future__ import annotations

import torch

from lora_kernels.linalg.cholesky import damped_cholesky
from lora_kernels.linalg.randomized_svd import RandomizedSVD, fix_pair, probe_bound
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.orthonormalize.op import orthonormalize
from lora_kernels.ops.small_linalg.reference import fix_signs

_UNIT = 2.0**-52
# Largest relative difference of Psi G Omega from either sketch: far above rounding, far below that of two matrices.
_MISMATCH = 0.5


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm without overflow or underflow of squares."""
    scale = x.abs().amax()
    scale = torch.where(scale > 0, scale, 1.0)
    norm: torch.Tensor = torch.linalg.matrix_norm(x / scale)
    return norm * scale


def _check_finite(**sketches: torch.Tensor) -> None:
    for name, value in sketches.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite entries")


@without_autocast()
def nystrom(y: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k leading eigenpairs of a positive semidefinite M from `Y = M Omega`, both `(n, k)` with k <= n.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1706.05736), algorithm 3: `Y (Omega^T Y)^+ Y^T`, which never exceeds
    M, computed for `M + shift` so that the core has a Cholesky factor. Values below the shift are noise.
    """
    _check_finite(y=y)
    basis, triangle = orthonormalize(omega)
    y = torch.linalg.solve_triangular(triangle, y, upper=True, left=False)
    scale = _norm(y)
    y = y / torch.where(scale > 0, scale, 1.0)
    core = basis.mT @ y
    # Without rounding the core is symmetric: its asymmetry is the noise of the sketch, and a lower bound for the shift.
    noise = torch.linalg.matrix_norm(core - core.mT)
    least = max(float(noise), _UNIT * y.shape[0] ** 0.5)
    lower, shift = damped_cholesky((core + core.mT) / 2, least, what="Omega^T y, as a sketch would make it,")
    factor = torch.linalg.solve_triangular(lower.mT, y + shift * basis, upper=True, left=False)
    q, r = orthonormalize(factor)
    left, s, _ = torch.linalg.svd(r)
    return (s.square() - shift).clamp_min(0) * scale, fix_signs(q @ left)


@without_autocast()
def two_sided(
    y: torch.Tensor,
    z: torch.Tensor,
    omega: torch.Tensor,
    psi: torch.Tensor,
    rank: int,
    probe: tuple[torch.Tensor, torch.Tensor],
) -> RandomizedSVD:
    """The leading singular triplets of any G from its sketches `Y = G Omega` `(m, k)` and `Z = Psi G` `(l, n)`.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1609.00048), algorithm 7: `Q` spans Y, and `G ~ Q (Psi Q)^+ Z`. Exact
    where G has at most k <= min(l, m, n) singular values, and well conditioned for l of 2 k or more. The probe is
    `(t, G t)`, `(n, p)` and `(m, p)`: gaussian vectors independent of omega, for the bound on the error.
    """
    _check_finite(y=y, z=z)
    one, two = z @ omega, psi @ y
    if bool(_norm(one - two) > _MISMATCH * torch.maximum(_norm(one), _norm(two))):
        raise ValueError("z Omega and Psi y differ, but both must be Psi G Omega")
    q, _ = orthonormalize(y)
    v, r = orthonormalize((torch.linalg.pinv(psi @ q) @ z).mT)
    small, s, rotation = torch.linalg.svd(r.mT)
    u, v, s = q @ small[:, :rank], (v @ rotation.mT)[:, :rank], s[:rank]
    t, image = probe
    error = probe_bound(image - (u * s) @ (v.mT @ t))
    u, v = fix_pair(u, v)
    return RandomizedSVD(u, s, v.mT, error, "two_sided")
