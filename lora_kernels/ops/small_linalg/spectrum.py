"""Singular values of `s B A` without forming it."""

from __future__ import annotations

import torch

from lora_kernels._checks import check_range, check_tensor
from lora_kernels.ops._backend import Backend
from lora_kernels.ops._op import Example, Op, on_torch, relative_error
from lora_kernels.ops.small_linalg import drivers
from lora_kernels.ops.small_linalg.drivers import on_compiled
from lora_kernels.ops.small_linalg.op import definite, eigh

# Entries of a factor that are widened to float64 at a time (128 MB).
_CHUNK = 2**24


def _check(a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    check_tensor("a", a, dtypes=drivers.DTYPES)
    if a.dim() < 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, but must be (..., r, n)")
    check_tensor("b", b, dtypes=(a.dtype,), device=a.device)
    if b.dim() != a.dim() or b.shape[:-2] != a.shape[:-2] or b.shape[-1] != a.shape[-2]:
        expected = f"{(*a.shape[:-2], 'm', a.shape[-2])}".replace("'", "")
        raise ValueError(f"b has shape {tuple(b.shape)}, but must have shape {expected}")
    check_range("scaling", scaling, low=-float(torch.finfo(a.dtype).max), high=float(torch.finfo(a.dtype).max))


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    """R (rank, rank) of the QR factorisation, padded with zero rows where `tall` has fewer rows than columns."""
    r: torch.Tensor = torch.linalg.qr(tall, mode="r").R
    return torch.nn.functional.pad(r, (0, 0, 0, tall.shape[-1] - r.shape[-2]))


def _gram_root(factor: torch.Tensor, backend: str) -> torch.Tensor:
    """R with `R^T R = factor factor^T`, from float32 (batch, rank, n) in float64."""
    rank, columns = factor.shape[-2:]
    step = max(1, _CHUNK // max(1, rank * columns))
    chunks = (factor[low : low + step].double() for low in range(0, factor.shape[0], step))
    grams = [chunk @ chunk.mT for chunk in chunks]
    values, vectors = eigh(torch.cat(grams), backend=backend)  # finds what is not finite
    return values.clamp_min(0).sqrt().unsqueeze(-1) * vectors.mT


def _roots(a: torch.Tensor, b: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 R_a and R_b, (batch, rank, rank), with `R_a^T R_a = A A^T` and `R_b^T R_b = B^T B`.

    By Gram matrices where the input is float32: in float64 they lose nothing that float32 had (eigenvalues to 1e-16 of
    the largest, so singular values to 1e-8), cannot overflow, and are matrix products. By QR where it is float64.
    """
    if a.dtype == torch.float32:
        return _gram_root(a, backend), _gram_root(b.mT, backend)
    drivers.raise_first(drivers.not_finite(a, b))  # not their triangles: LAPACK can lose a NaN on the way
    return _triangle(a.mT), _triangle(b)


def _normalised(roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices divided by the power of two at their largest entries, so that products neither overflow nor vanish."""
    largest = roots.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(largest.dtype) - 1), 1.0)
    return roots / scale, scale.squeeze(-1)


def _values_compiled(values: torch.Tensor, core: torch.Tensor) -> None:
    drivers.raise_first(drivers.run("singular_values", (core, values), core.shape[:2]))


def _body(backend: Backend, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    if a.numel() == 0 or b.numel() == 0:
        out.zero_()
        return
    root_a, root_b = _roots(drivers.dense(a), drivers.dense(b), backend.name)
    (left, scale_a), (right, scale_b) = _normalised(root_a), _normalised(root_b)
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
            _values_compiled,
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

    Both factors are reduced to r x r, by QR (float64) or by their Gram matrices in float64 (float32), and the singular
    values of the product of the two reductions found by one-sided Jacobi (Golub and Van Loan, section 8.6.3). Absolute
    error relative to `scaling * |A| |B|` (spectral norms): a few roundings of float64, one of float32. Not
    differentiable.

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
    _check(a, b, scaling)
    out = a.new_empty(a.shape[:-1])
    spectrum(backend, out, a, b, float(scaling))
    return out


@spectrum.self_test(terms=12 * 12, dtype=torch.float64)
def _example(device: torch.device) -> Example:
    p, _, rhs = definite(device)
    a, b = rhs.mT, p[..., :7]
    truth = 2 * torch.linalg.svdvals(b @ a)[..., :7]
    return {"a": a, "b": b, "scaling": 2.0}, lambda result: relative_error([result], [truth])
