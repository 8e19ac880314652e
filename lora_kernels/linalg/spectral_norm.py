"""Bounds on the largest singular value of one matrix: below by a Krylov method, above by random probes."""

from __future__ import annotations

import math

import torch

from lora_kernels.linalg.randomized_svd import LinearOperator, dense_operator, probe_bound, randomized_svd
from lora_kernels.ops._autocast import without_autocast
from lora_kernels.ops.random_matrix.op import random_matrix

# Leading triplets that are removed before the remainder is probed.
_TRIPLETS = 8
# Up to this smaller size the full decomposition is computed (half a second on one core).
_COMPLETE = 512
# Step of the generator: the probes must be independent of the blocks that `randomized_svd` draws.
_STEP = 2
_ROUNDS = 4  # of the Krylov method
_PROBES = 8
_POWER = 6  # additional pairs of products with the probes


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
def spectral_norm(a: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """The spectral norm of `(m, n)`: a lower bound, which is the best estimate, and an upper one; up to rounding.

    The upper bound holds with probability `CONFIDENCE`. The leading triplets are Ritz triplets with `A^T U = V S`, so
    `A = U S V^T + E` with `E = (I - U U^T) A`, and in the bases of V and U the norm is at most
    `max(S_1, |E|) + |A V - U S|`. The first term is bounded by powers of E on gaussian probes (Halko, Martinsson and
    Tropp 2011, eq. 4.3); the second is computed, and is small for triplets that have converged.
    """
    if min(a.shape) <= _COMPLETE:
        value = float(torch.linalg.matrix_norm(a.to(torch.float64), 2)) if a.numel() else 0.0
        return value, value
    operator = dense_operator(a)
    leading = randomized_svd(operator, _TRIPLETS, n_iter=_ROUNDS, probes=0, seed=seed)
    value = float(leading.S[0])
    if value == 0.0:
        return 0.0, 0.0
    u, s, v = leading.U, leading.S, leading.Vh.mT
    coupling = (operator.matmul(v.contiguous()) - u * s).to(torch.float64)
    return value, _upper(s.tolist(), coupling, _remainder_bound(operator, u, seed))
