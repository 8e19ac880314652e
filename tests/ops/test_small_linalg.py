"""Eigenpairs of small symmetric matrices."""

import os
import subprocess
import sys

import pytest
import torch

from lora_kernels.ops import _ext
from lora_kernels.ops.small_linalg import drivers, reference
from lora_kernels.ops.small_linalg.op import eigh
from lora_kernels.ops.small_linalg.reference import fix_signs
from tests.ops.linalg_cases import (
    BATCHES,
    DTYPES,
    EPSILON,
    ORDERS,
    RUNS,
    bits_with_threads,
    few,
    lower_only,
    strided,
    with_spectrum,
)

HAS_CPP = _ext.load()[0] is not None
SPECTRA = {
    "random": lambda n: torch.randn(n).double(),
    "clustered": lambda n: 1 + 1e-9 * torch.randn(n).double(),
    "zero": lambda n: torch.zeros(n).double(),
    "deficient": lambda n: torch.cat([torch.zeros(n // 2), torch.rand(n - n // 2)]).double(),
    "graded": lambda n: 10.0 ** (-12 * torch.arange(n) / n).double(),
}


def symmetric(batch, n, kind, dtype, device="cpu"):
    return with_spectrum(batch, SPECTRA[kind](n), dtype, device)


def check(matrices, values, vectors):
    """Backward error, orthogonality, order and signs; independent of any other eigensolver."""
    wide, v, w = matrices.double(), vectors.double(), values.double()
    wide = wide.tril() + wide.tril(-1).mT
    n, bound = matrices.shape[-1], 25 * EPSILON[matrices.dtype]
    scale = torch.linalg.matrix_norm(wide).clamp_min(1e-300)[..., None, None]
    assert (((wide @ v - v * w.unsqueeze(-2)) / scale).abs() <= bound * n**0.5).all()
    assert ((v.mT @ v - torch.eye(n, device=v.device)).abs() <= bound * n).all()
    assert (w.diff(dim=-1) >= 0).all()
    assert torch.equal(fix_signs(vectors), vectors)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("n", ORDERS)
def test_eigenpairs(n, kind, dtype, run, poisoned_memory):
    backend, device = run
    matrices = symmetric((few(n),), n, kind, dtype, device)
    values, vectors = eigh(matrices, backend=backend)
    check(matrices, values, vectors)
    truth = torch.linalg.eigvalsh(matrices.double())
    scale = max(1e-3, float(truth.abs().max()))
    assert (values.double() - truth).abs().max() <= 25 * EPSILON[dtype] * n**0.5 * scale
    if kind == "random":
        with pytest.raises(AssertionError):
            check(matrices, 0.5 * values, vectors)
        with pytest.raises(AssertionError):
            check(matrices, values, 0.5 * vectors)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, run):
    backend, device = run
    a = symmetric(batch, 6, "random", torch.float64, device)
    values, vectors = eigh(a, backend=backend)
    assert values.shape == a.shape[:-1] and vectors.shape == a.shape
    check(a, values, vectors)


@pytest.mark.parametrize("run", RUNS)
def test_order_zero(run):
    backend, device = run
    values, vectors = eigh(torch.zeros(3, 0, 0, device=device), backend=backend)
    assert values.shape == (3, 0) and vectors.shape == (3, 0, 0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_extreme_scales(scale, run):
    backend, device = run
    a = symmetric((3,), 9, "random", torch.float64, device)
    values, _ = eigh(a * scale, backend=backend)
    torch.testing.assert_close(values / scale, eigh(a, backend="torch")[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("run", RUNS)
def test_strides_and_the_upper_triangle_do_not_matter(run):
    backend, device = run
    a = symmetric((5,), 10, "random", torch.float64, device)
    expected = eigh(a, backend=backend)
    for other in (strided(a), lower_only(a)):
        found = eigh(other, backend=backend)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_matrix_is_named(bad, run):
    backend, device = run
    a = symmetric((40,), 6, "random", torch.float64, device)
    a[23, 4, 1] = bad
    with pytest.raises(ValueError, match="matrix 23 holds NaN or infinite"):
        eigh(a, backend=backend)


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_a_matrix_without_convergence_is_named(monkeypatch):
    monkeypatch.setattr(drivers, "_entry", lambda *_: lambda *_: (2, 5))
    with pytest.raises(RuntimeError, match="did not converge for matrix 5"):
        eigh(torch.eye(3).expand(7, 3, 3), backend="cpp")


def test_arguments():
    with pytest.raises(TypeError, match="matrices has dtype float16"):
        eigh(torch.eye(3).half())
    with pytest.raises(ValueError, match=r"must be \(..., n, n\)"):
        eigh(torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="no 'triton' implementation"):
        eigh(torch.eye(3), backend="triton")
    if HAS_CPP:
        with pytest.raises(RuntimeError, match="order 200 exceeds 128"):
            eigh(torch.eye(200), backend="cpp")


@pytest.mark.parametrize("run", RUNS)
def test_registration_is_sound(run):
    backend, device = run
    for batch in [(3,), (0,), ()]:
        a = symmetric(batch, 5, "random", torch.float64, device)
        torch.library.opcheck(torch.ops.lora_kernels.eigh.default, (a.new_empty(a.shape[:-1]), a.clone(), a, backend))


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_threads_do_not_change_bits():
    a = symmetric((100,), 12, "random", torch.float64)
    one, two = bits_with_threads(lambda: eigh(a, backend="cpp"))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_entries_that_tie_up_to_rounding_do_not_decide_a_sign():
    tie = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [0.0, -1e-9, -1.0, 0.5]]).mT
    for noise in (0.0, 1e-7, -1e-7):
        found = fix_signs(tie * (1 + noise * torch.arange(4).unsqueeze(-1)))
        assert found[0, 0] > 0 and found[2, 1] > 0
    assert fix_signs(torch.zeros(0, 3)).shape == (0, 3)


def test_reference_is_torch_with_signs():
    a = symmetric((5,), 7, "random", torch.float64)
    torch.testing.assert_close(reference.eigh(a)[0], torch.linalg.eigvalsh(a))


_NARROW = """
import torch
from lora_kernels.ops import cholesky_solve, eigh, factor_spectrum, sylvester
torch.manual_seed(0)
a, q, rhs = torch.randn(13, 9, 9).double(), torch.randn(13, 5, 5).double(), torch.randn(13, 9, 70).double()
a, q = a @ a.mT + torch.eye(9), q @ q.mT + torch.eye(5)
for call in (
    lambda to: eigh(a, backend=to)[0],
    lambda to: eigh(a, backend=to)[1],
    lambda to: cholesky_solve(a, rhs, backend=to),
    lambda to: sylvester(a, q, rhs[..., :5], backend=to),
    lambda to: factor_spectrum(rhs, a, backend=to),
):
    torch.testing.assert_close(call("cpp"), call("torch"), rtol=1e-10, atol=1e-12)
print("agreed")
"""


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
@pytest.mark.parametrize("width", [16, 32])
def test_machines_with_narrower_vectors(width):
    environment = {**os.environ, "LORA_KERNELS_LANE_BYTES": str(width)}
    command = [sys.executable, "-c", _NARROW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "agreed", done.stderr[-2000:]
