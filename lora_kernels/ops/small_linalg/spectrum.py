"""Singular values of `s B A` without forming it: checks, registration and the choice of backend."""

from __future__ import annotations

import torch

from lora_kernels.ops._backend import Backend, Dispatcher
from lora_kernels.ops._checks import check_range, check_tensor
from lora_kernels.ops.small_linalg import _launch
from lora_kernels.ops.small_linalg.op import eigh

# Entries of a factor that are widened to float64 at a time (128 MB).
_CHUNK = 2**24


def _check(a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    check_tensor("a", a, dtypes=_launch.DTYPES)
    if a.dim() < 2:
        raise ValueError(f"a has shape {tuple(a.shape)}, but must be (..., r, n)")
    check_tensor("b", b, dtypes=(a.dtype,), device=a.device)
    if b.dim() != a.dim() or b.shape[:-2] != a.shape[:-2] or b.shape[-1] != a.shape[-2]:
        expected = f"{(*a.shape[:-2], 'm', a.shape[-2])}".replace("'", "")
        raise ValueError(f"b has shape {tuple(b.shape)}, but must have shape {expected}")
    check_range("scaling", scaling, low=-float(torch.finfo(a.dtype).max), high=float(torch.finfo(a.dtype).max))


def _cpp_refuses(a: torch.Tensor, *_: object) -> str | None:
    limits = (("eigh", torch.float64), ("singular_values", torch.float64))
    return _launch.order_refuses(a.device, a.shape[-2], *limits)


def _lapack_wins(a: torch.Tensor, *_: object) -> bool:
    return _launch.lapack_wins("factor_spectrum", a, a.shape[-2])


dispatcher = Dispatcher(
    "factor_spectrum", (Backend("cpp", _cpp_refuses, _lapack_wins), Backend("torch", lambda *_: None))
)


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
    _launch.raise_first(_launch.not_finite(a, b))  # not their triangles: LAPACK can lose a NaN on the way
    return _triangle(a.mT), _triangle(b)


def _normalised(roots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices divided by the power of two at their largest entries, so that products neither overflow nor vanish."""
    largest = roots.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(largest.dtype) - 1), 1.0)
    return roots / scale, scale.squeeze(-1)


def _singular_values(core: torch.Tensor, backend: str) -> torch.Tensor:
    values: torch.Tensor
    if backend == "torch":
        values = torch.linalg.svdvals(core)
        return values
    core = core.contiguous()
    values = core.new_empty(core.shape[:-1])
    if core.device.type == "cpu":
        _launch.run_cpu("singular_values", core.dtype, core, values, core.shape[0], core.shape[-1])
    else:
        info = _launch.new_info(core)
        _launch.run_cuda("singular_values", core.dtype, core, values, info, core.shape[0], core.shape[-1])
        _launch.raise_first(info)
    return values


@torch.library.custom_op("lora_kernels::factor_spectrum", mutates_args=())
def _factor_spectrum(a: torch.Tensor, b: torch.Tensor, scaling: float, backend: str) -> torch.Tensor:
    if a.numel() == 0 or b.numel() == 0:
        return a.new_zeros(a.shape[:-1])
    root_a, root_b = _roots(_launch.dense(a), _launch.dense(b), backend)
    (left, scale_a), (right, scale_b) = _normalised(root_a), _normalised(root_b)
    values = _singular_values(right @ left.mT, backend) * abs(scaling) * scale_a * scale_b
    return values.to(a.dtype).reshape(a.shape[:-1])


@_factor_spectrum.register_fake
def _(a: torch.Tensor, b: torch.Tensor, scaling: float, backend: str) -> torch.Tensor:
    _check(a, b, scaling)
    return a.new_empty(a.shape[:-1])


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
    backend = dispatcher.choose(backend, a, b)
    values: torch.Tensor = _factor_spectrum(a.detach(), b.detach(), float(scaling), backend)
    return values
