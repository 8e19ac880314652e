"""What the tests of the small dense algebra share: where they run, and matrices with a given spectrum."""

import pytest
import torch

from lora_kernels.ops import _ext

_NEEDS_CPP = pytest.mark.skipif(_ext.load()[0] is None, reason="extension not built")
# (backend, device)
RUNS = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("cpp", "cpu"), id="cpp", marks=_NEEDS_CPP),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(("cpp", "cuda"), id="cuda", marks=[pytest.mark.gpu, _NEEDS_CPP]),
]
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
EPSILON = {torch.float64: 2.3e-16, torch.float32: 1.2e-7}
ORDERS = [1, 2, 3, 7, 16, 24, 31, 64, 128]
BATCHES = [(0,), (1,), (7,), (224,), (2, 3), ()]


def few(n):
    """A batch that costs little and fills no whole number of vectors."""
    return 11 if n < 64 else 3


def with_spectrum(batch, spectrum, dtype, device="cpu"):
    """Symmetric matrices with the given eigenvalues, in general position."""
    n = spectrum.shape[-1]
    q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64)).Q
    a = (q * spectrum) @ q.mT
    return ((a + a.mT) / 2).to(device, dtype)


def positive(batch, n, dtype, device="cpu", condition=100.0):
    """Symmetric positive definite matrices of a given condition."""
    return with_spectrum(batch, torch.logspace(0, -1, n, float(condition), dtype=torch.float64), dtype, device)


def strided(tensor):
    """The same numbers: the last two sizes lie transposed, and the batch skips every other matrix."""
    wide = torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=-3).mT.contiguous().mT
    return wide.select(-3, 0)


def lower_only(matrices):
    """The same matrices with NaN above the diagonal."""
    above = torch.ones(matrices.shape[-2:], dtype=torch.bool, device=matrices.device).triu(1)
    return matrices.masked_fill(above, float("nan"))


def bits_with_threads(call):
    """What a call returns on one thread and on two."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found
