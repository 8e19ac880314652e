"""Bounds on the largest singular value of one matrix: below by a Krylov method, above by random probes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_kernels._checks import check_tensor
from lora_kernels.linalg.randomized_svd import LinearOperator, dense_operator, probe_bound, randomized_svd
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.random_matrix import random_matrix
from lora_kernels.ops.random_matrix.op import check_key

# Leading triplets that are removed before the remainder is probed.
_TRIPLETS = 8
# Up to this smaller size the full decomposition of a dense matrix is computed (half a second on one core).
_COMPLETE = 512
# Step of the generator: the probes must be independent of the blocks that `randomized_svd` draws.
_STEP = 2
_ROUNDS = 4  # of the Krylov method
_PROBES = 8
_POWER = 6  # additional pairs of products with the probes


@dataclass(frozen=True)
class SpectralNorm:
    """Bounds on a spectral norm, up to rounding.

    Attributes:
        value: `|A v|` for a unit vector v: a lower bound, and the best estimate.
        upper: an upper bound with probability `CONFIDENCE`; equal to `value` after a full decomposition.
    """

    value: float
    upper: float


def _remainder_bound(a: LinearOperator, u: torch.Tensor, seed: int) -> float:
    """An upper bound on the norm of `E = (I - U U^T) A` that holds with probability `CONFIDENCE`."""
    # `|E|^(2 q + 1) = |(E E^T)^q E|`, and the root reduces the factor by which `probe_bound` overestimates.
    device, power = torch.device(a.device), 2 * _POWER + 1
    drawn = random_matrix(a.shape[-1], _PROBES, kind="gaussian", seed=seed, step=_STEP, device=device)
    block, logarithm = drawn.to(a.dtype), 0.0
    for number in range(power):
        block = a.rmatmul(block) if number % 2 else a.matmul(block)
        if number % 2 == 0:
            block = block - u @ (u.mT @ block)
        largest = float(block.abs().max())
        if largest == 0.0:
            return 0.0
        # Scaled by a power of two, which is exact, after every product, so that none overflows or underflows.
        exponent = math.frexp(largest)[1]
        block, logarithm = torch.ldexp(block, torch.tensor(-exponent, device=block.device)), logarithm + exponent
    bound: float = 2.0 ** ((logarithm + math.log2(float(probe_bound(block)))) / power)
    return bound


def _upper(s: list[float], coupling: torch.Tensor, remainder: float) -> float:
    """The smallest bound on `[[S1, 0, 0], [0, S2, 0], [C1, C2, D]]` over all cuts of S, with `|[C2, D]| <= remainder`.

    C1 is small where the first triplets have converged; the last triplets seldom have, and C2 is then large.
    """
    best = math.inf
    for cut in range(len(s) + 1):
        halves = coupling[:, :cut], coupling[:, cut:]
        first, second = (float(torch.linalg.matrix_norm(half, 2)) if half.shape[1] else 0.0 for half in halves)
        following = s[cut] if cut < len(s) else 0.0
        lower = min(math.hypot(following, remainder), max(following, remainder) + second)
        best = min(best, max(s[0], lower) + first)
    return best


@without_autocast()
def spectral_norm(a: torch.Tensor | LinearOperator, *, seed: int = 0) -> SpectralNorm:
    """The spectral norm of a matrix, with a lower and an upper bound from its products.

    The leading triplets are Ritz triplets with `A^T U = V S`, so `A = U S V^T + E` with `E = (I - U U^T) A`, and in the
    bases of V and U the norm is at most `max(S_1, |E|) + |A V - U S|`. The first term is bounded by powers of E on
    gaussian probes (Halko, Martinsson and Tropp 2011, eq. 4.3); the second is computed, and is small for triplets that
    have converged.

    Args:
        a: `(m, n)` float tensor, or a `LinearOperator` of that shape.
        seed: 64-bit key: the same seed gives the same bits.

    Raises:
        TypeError: if `a` is neither a float tensor nor an operator, or the seed is not a number.
        ValueError: if it is not a matrix, the seed is out of range, or an entry is NaN or infinite.
    """
    check_key(seed)
    if not isinstance(a, LinearOperator):
        check_tensor("a", a, numbers=True)
    if len(a.shape) != 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, but must be (m, n)")
    if min(a.shape) == 0:
        return SpectralNorm(0.0, 0.0)
    if isinstance(a, torch.Tensor) and min(a.shape) <= _COMPLETE:
        if not bool(torch.isfinite(a).all()):
            raise ValueError("a holds NaN or infinite entries")
        value = float(torch.linalg.matrix_norm(a.detach().to(torch.float64), 2))
        return SpectralNorm(value, value)
    operator = a if isinstance(a, LinearOperator) else dense_operator(a)
    leading = randomized_svd(operator, min(_TRIPLETS, *a.shape), n_iter=_ROUNDS, probes=0, seed=seed)
    value = float(leading.S[0])
    if leading.method == "direct" or value == 0.0:
        return SpectralNorm(value, value)
    u, s, v = leading.U, leading.S, leading.Vh.mT
    coupling = (operator.matmul(v.contiguous()) - u * s).to(torch.float64)
    return SpectralNorm(value, _upper(s.tolist(), coupling, _remainder_bound(operator, u, seed)))
