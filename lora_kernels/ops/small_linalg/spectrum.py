"""Singular values of `s B A` without forming it."""

from __future__ import annotations

import torch

from lora_kernels._checks import check_range, check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, on_torch, relative_error
from lora_kernels.ops.small_linalg import drivers
from lora_kernels.ops.small_linalg.drivers import on_compiled
from lora_kernels.ops.small_linalg.op import definite, eigh

# Entries of a factor that are widened to float64 at a time: 2 MB stay in a CPU's cache.
_CHUNK = {"cpu": 2**18, "gpu": 2**24}


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    """R (rank, rank) of the QR factorisation, padded with zero rows where `tall` has fewer rows than columns."""
    r: torch.Tensor = torch.linalg.qr(tall, mode="r").R
    return torch.nn.functional.pad(r, (0, 0, 0, tall.shape[-1] - r.shape[-2]))


def _gram(factor: torch.Tensor) -> torch.Tensor:
    """`factor factor^T` in float64, from float32 (batch, rank, n)."""
    rank, columns = factor.shape[-2:]
    step = max(1, _CHUNK["cpu" if factor.device.type == "cpu" else "gpu"] // (rank * columns))
    chunks = (factor[low : low + step].double() for low in range(0, factor.shape[0], step))
    return torch.cat([chunk @ chunk.mT for chunk in chunks])


def _by_grams(a: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    """Singular values of `B A` from float32 factors, in float64: the roots of the eigenvalues of `R A A^T R^T`.

    `R^T R = B^T B`. Products of float32 numbers are exact in float64 and their sums neither overflow nor vanish;
    eigenvalues are off by 1e-16 of the largest, so singular values by 1e-8, which float32 cannot show.
    """
    values, vectors = eigh(_gram(b.mT), backend=backend)
    root = values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT
    squares, _ = eigh(root @ _gram(a) @ root.mT, backend=backend)  # finds what is not finite
    return squares.clamp_min(0).sqrt().flip(-1)


def _normalised(roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices divided by the power of two at their largest entries, so that products neither overflow nor vanish."""
    largest = roots.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(largest.dtype) - 1), 1.0)
    return roots / scale, scale.squeeze(-1)


def _body(backend: Backend, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    if a.numel() == 0 or b.numel() == 0:
        out.zero_()
        return
    a, b = drivers.dense(a), drivers.dense(b)
    if a.dtype == torch.float32:
        out.copy_((_by_grams(a, b, backend.name) * abs(scaling)).reshape(out.shape))
        return
    drivers.raise_first(drivers.not_finite(a, b))  # not their triangles: LAPACK can lose a NaN on the way
    (left, scale_a), (right, scale_b) = _normalised(_triangle(a.mT)), _normalised(_triangle(b))
    core = (right @ left.mT).contiguous()
    values = core.new_empty(core.shape[:-1])
    backend(values, core)
    out.copy_((values * abs(scaling) * scale_a * scale_b).reshape(out.shape))


spectrum = Op(
    "factor_spectrum",
    _body,
    writes=("out",),
    backends=(
        on_compiled(
            lambda values, core: drivers.raise_first(drivers.run("singular_values", (core, values), core.shape[:2])),
            lambda _out, a, *_: (a, a.shape[-2]),
            "eigh",
            "singular_values",
            op="factor_spectrum",
            dtype=torch.float64,
        ),
        on_torch(lambda values, core: values.copy_(torch.linalg.svdvals(core))),
    ),
)


def factor_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0, *, backend: str = "auto") -> torch.Tensor:
    """Singular values of `scaling * B A` for a batch of factor pairs, without forming the product.

    In float64 both factors are reduced to r x r by QR, and the singular values of the product of the two triangles
    found by one-sided Jacobi (Golub and Van Loan, section 8.6.3). In float32 they are the roots of the eigenvalues of a
    product of the factors' Gram matrices in float64. Absolute error relative to `scaling * |A| |B|` (spectral norms): a
    few roundings of float64, one of float32. Not differentiable.

    Args:
        a: `(..., r, n)` float32 or float64.
        b: `(..., m, r)`, same batch shape, dtype and device.
        scaling: any finite number; its sign does not matter.
        backend: `auto`, `cpp` (r x r algebra in C++ on the CPU up to r = 128, CUDA as far as shared memory goes) or
            `torch`.

    Returns:
        `(..., r)`, descending; zeros behind the min(m, n)-th.

    Raises:
        TypeError: on another dtype.
        ValueError: on shapes or devices that do not match, or a pair with NaN or infinite entries; the message has its
            index.
        RuntimeError: if an iteration does not converge, or the backend asked for cannot take the call.
    """
    check_tensor("a", a, dtypes=drivers.DTYPES, form="(..., r, n)")
    check_tensor("b", b, shape=(*a.shape[:-2], None, a.shape[-2]), dtypes=(a.dtype,), device=a.device)
    check_range("scaling", scaling, low=-float(torch.finfo(a.dtype).max), high=float(torch.finfo(a.dtype).max))
    out = a.new_empty(a.shape[:-1])
    spectrum(backend, out, a, b, float(scaling))
    return out


@spectrum.self_test(terms=12 * 12, dtype=torch.float64)
def _example(device: torch.device) -> Example:
    p, _, rhs = definite(device)
    a, b = rhs.mT, p[..., :7]
    truth = 2 * torch.linalg.svdvals(b @ a)[..., :7]
    return {"a": a, "b": b, "scaling": 2.0}, lambda result: relative_error([result], [truth])
