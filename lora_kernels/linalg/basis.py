"""The core directions of a weight: its full singular value decomposition, optionally cached on disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_kernels._checks import check_tensor
from lora_kernels._files import write_tensors
from lora_kernels.linalg.randomized_svd import fix_pair

# Below this share of the largest singular value, squaring in the Gram matrix has mixed the directions.
_TRAILING = 1e-3
# Largest difference between a product with cached factors and one with the weight, in units of the dtype's rounding.
_ROUNDINGS = 1e3


def core_basis(weight: torch.Tensor, cache: str | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The full singular value decomposition of a base weight, by one symmetric eigensolve in float64.

    With V the eigenvectors of the smaller Gram matrix in descending order, the QR decomposition of W V gives U and
    sigma except for the trailing part, where squaring has mixed directions; that block is decomposed by itself. Errors
    are within 1e3 of those of a float64 decomposition. A float32 decomposition takes about as long, but loses the
    directions of small singular values.

    Args:
        weight: `(m, n)`.
        cache: folder of cached decompositions, by a digest of the weight; a file that cannot be read is replaced.

    Returns:
        U `(m, k)`, sigma `(k,)` descending and V^T `(k, n)`, k = min(m, n): float32, or the weight's dtype if wider.

    Raises:
        TypeError: if the weight is not a float tensor.
        ValueError: if it is not a matrix or holds NaN or infinite entries, or the cached file is of another weight.
    """
    check_tensor("weight", weight, numbers=True)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but must be a matrix")
    weight = weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds NaN or infinite entries")
    file = None if cache is None or weight.numel() == 0 else Path(cache) / f"{_digest(weight)}.safetensors"
    if file is not None:
        cached = _read(file, weight)
        if cached is not None:
            return cached
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.numel() == 0:
        u, s, vh = (weight.new_empty(size, dtype=dtype) for size in ((weight.shape[0], 0), (0,), (0, weight.shape[1])))
        return u, s, vh
    u, s, vh = (factor.to(dtype) for factor in _decompose(weight.to(torch.float64)))
    if file is not None:
        write_tensors(file, {"u": u, "s": s, "vh": vh})
    return u, s, vh


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The core directions of a weight that an update changes most, by descending rate."""

    left: torch.Tensor  # the `u_i` `(m, k)`
    right: torch.Tensor  # the `v_i^T` `(k, n)`
    indices: torch.Tensor  # their positions `(k,)` in the order of descending singular values
    sigma: torch.Tensor  # their singular values `(k,)`
    rates: torch.Tensor  # their change rates `(k,)`
    largest: float  # largest singular value of the weight
    share: float  # of the update's squared change along all core directions, the fraction along the selected ones


def changed_most(
    basis: tuple[torch.Tensor, torch.Tensor, torch.Tensor], changes: torch.Tensor, k: int, epsilon: float
) -> Selection:
    """The k directions of a `core_basis` with the largest rates `|c_i| / (sigma_i + eps sigma_1)`, given changes c."""
    # Of equal rates, that of the larger singular value comes first.
    (u, s, vh), sizes = basis, changes.abs()
    # sigma = 0 and eps = 0: the rate is infinite for a nonzero change, and 0 otherwise.
    rates = torch.where(sizes > 0, sizes / (s.to(sizes) + epsilon * float(s[0])), 0.0)
    indices = rates.argsort(descending=True, stable=True)[:k]
    left, right = fix_pair(u[:, indices], vh[indices].mT)
    total, chosen = float(sizes.square().sum()), float(sizes[indices].square().sum())
    return Selection(
        left=left,
        right=right.mT.contiguous(),
        indices=indices,
        sigma=s[indices],
        rates=rates[indices],
        largest=float(s[0]),
        share=chosen / total if total > 0 else 0.0,
    )


def _decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if weight.shape[0] < weight.shape[1]:
        u, s, vh = _decompose(weight.mT)
        return vh.mT, s, u.mT
    v = torch.linalg.eigh(weight.mT @ weight).eigenvectors.flip(-1)
    u, r = torch.linalg.qr(weight @ v)
    s = r.diagonal()
    signs = torch.where(s < 0, -1.0, 1.0).to(s)
    u, s = u * signs, s.abs()
    start = int((s > _TRAILING * s.max()).sum())
    if start < s.numel():
        left, tail, right = torch.linalg.svd(r[start:, start:] * signs[start:, None])
        u = torch.cat((u[:, :start], u[:, start:] @ left), 1)
        v = torch.cat((v[:, :start], v[:, start:] @ right.mT), 1)
        s = torch.cat((s[:start], tail))
    order = s.argsort(descending=True, stable=True)
    return u[:, order], s[order], v[:, order].mT


def _digest(weight: torch.Tensor) -> str:
    plain = weight.cpu().contiguous()
    digest = hashlib.blake2b(repr((tuple(plain.shape), plain.dtype)).encode(), digest_size=16)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(file: Path, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    if not file.exists():
        return None
    try:
        with safe_open(str(file), framework="pt", device=str(weight.device)) as opened:
            u, s, vh = (opened.get_tensor(name) for name in ("u", "s", "vh"))
    except (SafetensorError, OSError):
        return None  # truncated
    m, n = weight.shape
    k, dtype = min(m, n), torch.promote_types(weight.dtype, torch.float32)
    if (u.shape, s.shape, vh.shape) != ((m, k), (k,), (k, n)) or u.dtype != dtype:
        raise ValueError(f"{file} holds a decomposition of another shape or dtype than its weight's: delete it")
    # The name is not proof: one product with a fixed vector is compared.
    probe = torch.linspace(-1.0, 1.0, n, dtype=torch.float64, device=weight.device).cos()
    product = u.to(torch.float64) @ (s.to(torch.float64) * (vh.to(torch.float64) @ probe))
    error = torch.linalg.vector_norm(product - weight.to(torch.float64) @ probe)
    if not float(error) <= _ROUNDINGS * torch.finfo(dtype).eps * float(s[0]) * float(probe.norm()):
        raise ValueError(f"{file} holds a decomposition of another weight: delete it")
    return u, s, vh
