import pytest
import torch

from lora_kernels.linalg import LinearOperator, eigh_topk
from lora_kernels.ops.orthonormalize import op as columns
from lora_kernels.ops.small_linalg.reference import fix_signs


def symmetric(n, spectrum, batch=()):
    q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64)).Q
    a = (q * spectrum) @ q.mT
    return (a + a.mT) / 2


def angle(a, b):
    """Largest principal angle between the spans of two orthonormal bases."""
    return float(torch.linalg.matrix_norm(a - b @ (b.mT @ a), ord=2).max().clamp(max=1).asin())


I = torch.arange(1, 801, dtype=torch.float64)
SPECTRA = {"1/i": 1 / I, "exp": torch.exp(-I / 30), "steep": 10.0 ** (-I / 8), "negative too": torch.cos(I) / I}


@pytest.mark.parametrize("kind", SPECTRA)
def test_krylov_matches_the_full_decomposition(kind):
    a = symmetric(800, SPECTRA[kind], (2,))
    found = eigh_topk(a, 24)
    assert found.method == "krylov"
    values, vectors = torch.linalg.eigh(a)
    values, vectors = values.flip(-1)[..., :24], vectors.flip(-1)[..., :24]
    torch.testing.assert_close(found.values, values, rtol=0, atol=1e-12)
    assert angle(found.vectors, vectors) < 1e-6
    assert float(found.residuals.max()) <= 1e-9


@pytest.mark.parametrize("kind", SPECTRA)
def test_on_a_gpu_blocks_are_orthonormalised_by_products(kind, monkeypatch):
    monkeypatch.setattr(columns, "_householder_is_faster", lambda y: False)  # as there
    a = symmetric(800, SPECTRA[kind])
    expected = torch.linalg.eigvalsh(a).flip(-1)[:24]
    monkeypatch.setattr(torch.linalg, "qr", None)
    pairs = eigh_topk(a, 24)
    assert pairs.method == "krylov" and float(pairs.residuals) <= 1e-9
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, k", [(1, 1), (5, 2), (40, 40), (700, 300), (300, 30)])
def test_small_or_wide_requests_are_direct(n, k):
    a = symmetric(n, torch.randn(n, dtype=torch.float64))
    found = eigh_topk(a, k)
    assert found.method == "direct"
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(a).flip(-1)[:k], rtol=0, atol=1e-12)


def test_a_spectrum_without_decay_ends_in_the_full_decomposition():
    a = symmetric(700, 1 + 0.01 * torch.rand(700, dtype=torch.float64))
    found = eigh_topk(a, 16)
    assert found.method == "krylov+direct"
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(a).flip(-1)[:16], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, method", [(300, "direct"), (800, "krylov")])
def test_an_operator_gives_what_its_matrix_gives(n, method):
    a = symmetric(n, SPECTRA["negative too"][:n])
    operator = LinearOperator((n, n), lambda x: a @ x, lambda x: a @ x, torch.float64)
    found, expected = eigh_topk(operator, 12), eigh_topk(a, 12)
    assert found.method == expected.method == method and float(found.residuals) <= 1e-9
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=0, atol=1e-9)


def test_bad_operators():
    with pytest.raises(TypeError, match="dtype is torch.float32, but must be float64"):
        eigh_topk(LinearOperator((8, 8), torch.zeros_like, torch.zeros_like), 2)
    with pytest.raises(ValueError, match="must be square"):
        eigh_topk(LinearOperator((8, 9), torch.zeros_like, torch.zeros_like, torch.float64), 2)
    spoilt = LinearOperator((700, 700), lambda x: x * torch.nan, torch.zeros_like, torch.float64)
    with pytest.raises(ValueError, match="holds NaN or infinite entries"):
        eigh_topk(spoilt, 2)


def test_rank_below_k_and_zero():
    low = torch.randn(700, 5, dtype=torch.float64)
    found = eigh_topk(low @ low.mT, 12)
    assert float(found.values[5:].abs().max()) < 1e-10 * float(found.values[0])
    gram = found.vectors.mT @ found.vectors
    torch.testing.assert_close(gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)
    zero = eigh_topk(torch.zeros(650, 650), 4)
    assert float(zero.values.abs().max()) == 0.0


def test_same_seed_same_bits_and_signs_fixed():
    a = symmetric(800, SPECTRA["exp"])
    one, two, other = eigh_topk(a, 8, seed=1), eigh_topk(a, 8, seed=1), eigh_topk(a, 8, seed=2)
    assert torch.equal(one.vectors, two.vectors)
    torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=1e-6)
    assert torch.equal(fix_signs(one.vectors), one.vectors)


def test_errors():
    with pytest.raises(ValueError, match="must be square"):
        eigh_topk(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="k is 5, but must be >= 1 and <= 4"):
        eigh_topk(torch.eye(4), 5)
    with pytest.raises(TypeError, match="k must be an int"):
        eigh_topk(torch.eye(4), 2.0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        eigh_topk(torch.full((3, 3), float("nan")), 1)
