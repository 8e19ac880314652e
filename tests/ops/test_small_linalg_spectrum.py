"""Singular values of `s B A` from the factors."""

import pytest
import torch

from lora_kernels.ops import _ext
from lora_kernels.ops.small_linalg import drivers, reference
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum
from tests.helpers.accuracy import rounding
from tests.ops.linalg_cases import BATCHES, DTYPES, EPSILON, ORDERS, RUNS, few, strided

HAS_CPP = _ext.load()[0] is not None
NAN = float("nan")


def factors(batch, r, m, n, dtype, device="cpu"):
    return (torch.randn(*batch, r, n, dtype=dtype).to(device), torch.randn(*batch, m, r, dtype=dtype).to(device))


def errors(found, a, b, scaling):
    """Largest errors of `found` and of torch's own way in the same dtype, relative to the norms of both factors."""
    truth = reference.factor_spectrum(a.double(), b.double(), scaling)
    by_torch = reference.factor_spectrum(a, b, scaling).double()
    norms = torch.linalg.matrix_norm(a.double(), 2) * torch.linalg.matrix_norm(b.double(), 2)
    scale = (abs(scaling) * norms).clamp_min(1e-300).unsqueeze(-1)
    return tuple(float(((each - truth).abs() / scale).max()) for each in (found.double(), by_torch))


def allowed(dtype):
    """Float32 is computed in float64."""
    return (1 if dtype == torch.float32 else 10) * EPSILON[dtype]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", ORDERS)
def test_matches_the_formed_product(r, dtype, run, poisoned_memory):
    backend, device = run
    a, b = factors((few(r),), r, r + 9, 2 * r + 3, dtype, device)
    found = factor_spectrum(a, b, -1.7, backend=backend)
    assert found.dtype == dtype and found.shape == (few(r), r)
    assert bool((found.diff(dim=-1) <= 0).all()) and bool((found >= 0).all())
    error, by_torch = errors(found, a, b, -1.7)
    bound = 2 * by_torch + allowed(dtype)
    assert error <= bound
    assert errors(0.5 * found, a, b, -1.7)[0] > bound, "the bar would pass a half-scaled result"


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r, m, n", [(16, 5, 40), (16, 40, 5), (16, 3, 7), (4, 1, 1), (1, 9, 1), (24, 1031, 517)])
def test_ranks_beyond_the_sizes(r, m, n, dtype, run):
    backend, device = run
    a, b = factors((3,), r, m, n, dtype, device)
    found = factor_spectrum(a, b, 2.0, backend=backend)
    assert errors(found, a, b, 2.0)[0] <= allowed(dtype) + rounding(torch.float64, max(m, n))
    noise = 1e-7 if dtype == torch.float32 else 1e-14
    assert bool((found[:, min(r, m, n) :] <= noise * found[:, :1]).all())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_factors(dtype, run):
    backend, device = run
    a, b = factors((6,), 8, 30, 50, dtype, device)
    b[0] = 0
    a[1] = 0
    b[2, :, 4:] = b[2, :, :4]  # rank 4
    b[3] *= 1e-12
    a[4] *= torch.logspace(0, -6, 8, dtype=dtype, device=device).unsqueeze(-1)
    a[5, 1:] = 0
    found = factor_spectrum(a, b, 2.0, backend=backend)
    assert errors(found, a, b, 2.0)[0] <= allowed(dtype)
    assert not bool(found[:2].any())
    assert not bool(factor_spectrum(a, b, 0.0, backend=backend).any())
    if dtype == torch.float64:  # values far below the largest keep digits of their own
        truth = reference.factor_spectrum(a[4], b[4], 2.0)
        assert float(((found[4] - truth) / truth).abs().max()) < 1e-8


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e200)])
def test_extreme_scales(dtype, scale, run):
    backend, device = run
    a, b = factors((3,), 7, 20, 30, dtype, device)
    expected = factor_spectrum(a, b, backend=backend)
    found = factor_spectrum(a * scale, b / scale, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, run):
    backend, device = run
    a, b = factors(batch, 5, 12, 9, torch.float64, device)
    found = factor_spectrum(a, b, backend=backend)
    assert found.shape == (*batch, 5)
    torch.testing.assert_close(found, torch.linalg.svdvals(b @ a)[..., :5])


@pytest.mark.parametrize("run", RUNS)
def test_sizes_of_zero(run):
    backend, device = run
    for r, m, n in [(0, 4, 5), (3, 0, 5), (3, 4, 0)]:
        a, b = factors((2,), r, m, n, torch.float32, device)
        found = factor_spectrum(a, b, backend=backend)
        assert found.shape == (2, r) and not bool(found.any())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype, run):
    backend, device = run
    a, b = factors((4,), 6, 15, 11, dtype, device)
    expected = factor_spectrum(a, b, 0.5, backend=backend)
    assert torch.equal(factor_spectrum(strided(a), strided(b), 0.5, backend=backend), expected)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_pair_is_named(which, bad, run):
    backend, device = run
    pair = factors((40,), 4, 8, 8, torch.float32, device)
    pair[which][31, 2, 3] = bad
    with pytest.raises(ValueError, match="matrix 31 holds NaN or infinite"):
        factor_spectrum(*pair, backend=backend)


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_a_pair_without_convergence_is_named(monkeypatch):
    monkeypatch.setattr(drivers, "_entry", lambda *_: lambda *_: (2, 5))
    with pytest.raises(RuntimeError, match="did not converge for matrix 5"):
        factor_spectrum(*factors((7,), 3, 4, 5, torch.float64), backend="cpp")


def test_large_batches_are_widened_in_chunks(monkeypatch):
    from lora_kernels.ops.small_linalg import spectrum

    a, b = factors((9,), 4, 30, 20, torch.float32)
    expected = factor_spectrum(a, b)
    monkeypatch.setitem(spectrum._CHUNK, "cpu", 2 * 4 * 30)
    torch.testing.assert_close(factor_spectrum(a, b), expected, rtol=1e-7, atol=0)


def test_arguments():
    a, b = torch.zeros(3, 5), torch.zeros(4, 3)
    with pytest.raises(TypeError, match="a has dtype bfloat16"):
        factor_spectrum(a.bfloat16(), b.bfloat16())
    with pytest.raises(TypeError, match="b has dtype float64"):
        factor_spectrum(a, b.double())
    with pytest.raises(ValueError, match=r"a has shape \(5,\), but must be \(..., r, n\)"):
        factor_spectrum(a[0], b)
    with pytest.raises(ValueError, match=r"b has shape \(4, 2\), but must have shape \(\*, 3\)"):
        factor_spectrum(a, b[:, :2])
    with pytest.raises(ValueError, match=r"must have shape \(2, \*, 3\)"):
        factor_spectrum(a.expand(2, 3, 5), b)
    with pytest.raises(ValueError, match="scaling is nan"):
        factor_spectrum(a, b, NAN)
    with pytest.raises(TypeError, match="scaling must be a number"):
        factor_spectrum(a, b, "2")
    if HAS_CPP:
        with pytest.raises(RuntimeError, match="order 200 exceeds 128"):
            factor_spectrum(torch.zeros(200, 5), torch.zeros(4, 200), backend="cpp")


@pytest.mark.parametrize("run", RUNS)
def test_registration_is_sound(run):
    backend, device = run
    for batch in [(3,), (0,), ()]:
        for dtype in (torch.float32, torch.float64):
            a, b = factors(batch, 5, 8, 9, dtype, device)
            torch.library.opcheck(
                torch.ops.lora_kernels.factor_spectrum.default, (a.new_empty(a.shape[:-1]), a, b, 0.5, backend)
            )


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(dtype):
    a, b = factors((50,), 12, 40, 30, dtype)
    call = lambda: factor_spectrum(a, b, backend="cpp")  # noqa: E731
    assert torch.equal(call(), call())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_where_sums_overflow(broken):
    large = torch.full((3, 4, 5), 1e308, dtype=torch.float64)
    plain = torch.ones(3, 2, 2, dtype=torch.float64)
    assert drivers.not_finite(plain, large).tolist() == [0, 0, 0]
    assert drivers.not_finite(plain, plain).tolist() == [0, 0, 0]
    large[1, 3, 4], plain[2, 0, 1] = broken, -broken
    assert drivers.not_finite(large).tolist() == [0, 1, 0]
    assert drivers.not_finite(plain, large).tolist() == [0, 1, 1]
