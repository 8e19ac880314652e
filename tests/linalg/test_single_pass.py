import pytest
import torch

from lora_kernels.linalg import RandomizedSVD
from lora_kernels.linalg.single_pass import nystrom, two_sided

I = torch.arange(1, 201, dtype=torch.float64)
SPECTRA = {
    "1/i": 1 / I,
    "exp": torch.exp(-I / 10),
    "steep": torch.exp(-I),
    "low": (I <= 5) / I,
    "flat": torch.ones(200),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(*shape, seed=0):
    return torch.linalg.qr(normal(*shape, seed=seed)).Q


def semidefinite(spectrum, batch=()):
    q = basis(*batch, 200, 200)
    m = (q * spectrum) @ q.mT
    return (m + m.mT) / 2


def general(spectrum, m=150, n=200, batch=()):
    k = min(m, n)
    return (basis(*batch, m, k) * spectrum[:k]) @ basis(*batch, n, k, seed=1).mT


def orthonormal(columns):
    eye = torch.eye(columns.shape[-1], dtype=torch.float64)
    return float((columns.mT @ columns - eye).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_nystrom(kind, dtype):
    spectrum = SPECTRA[kind].double()
    m, omega = semidefinite(spectrum), normal(200, 60, seed=3)
    values, vectors = (part[..., :16] for part in nystrom((m @ omega).to(dtype).double(), omega))
    assert orthonormal(vectors) and (values.diff() <= 0).all() and (values >= 0).all()
    noise = float(spectrum[0]) * (1e-5 if dtype == torch.float32 else 1e-12)
    assert (values <= spectrum[:16] + noise).all()  # never above M
    nuclear = float(torch.linalg.svdvals(m - (vectors * values) @ vectors.mT).sum())
    assert float(spectrum.sum() - values.sum()) == pytest.approx(nuclear, rel=1e-3, abs=200 * noise)
    # HMT-like: with 44 more columns than pairs the nuclear error is a small multiple of the best one.
    assert nuclear <= 1.4 * float(spectrum[16:].sum()) + 200 * noise
    if kind in ("steep", "low"):
        torch.testing.assert_close(values, spectrum[:16], rtol=0, atol=noise)


def test_nystrom_equals_its_formula():
    m, omega = semidefinite(SPECTRA["1/i"]), normal(200, 30, seed=3)
    y = m @ omega
    approximation = y @ torch.linalg.solve(omega.mT @ y, y.mT)
    values, vectors = nystrom(y, omega)
    torch.testing.assert_close((vectors * values) @ vectors.mT, approximation, rtol=0, atol=1e-11)


def test_nystrom_converges_with_the_sketch():
    m = semidefinite(SPECTRA["1/i"])
    best = float(SPECTRA["1/i"][8:].sum())
    excess = []
    for k in (10, 20, 40, 80, 200):
        omega = normal(200, k, seed=3)
        values, _ = nystrom(m @ omega, omega)
        excess.append(float(SPECTRA["1/i"].sum() - values[:8].sum()) / best - 1)
    assert excess == sorted(excess, reverse=True) and excess[-1] < 1e-9


@pytest.mark.parametrize("scale", [1e-140, 1e-25, 1e25, 1e140])
def test_nystrom_is_scale_invariant(scale):
    m, omega = semidefinite(SPECTRA["exp"]), normal(200, 30, seed=3)
    y = m @ omega
    one, _ = nystrom(y, omega)
    two, _ = nystrom(y * scale, omega)
    torch.testing.assert_close(two / scale, one, rtol=1e-5, atol=1e-12)
    other, _ = nystrom(y, omega * scale)  # a sketch by Omega / scale of M scale^-1
    torch.testing.assert_close(other * scale, one, rtol=1e-6, atol=1e-9)


def test_nystrom_of_zero_and_of_rank_one():
    omega = normal(200, 20, seed=3)
    values, vectors = nystrom(torch.zeros(200, 20, dtype=torch.float64), omega)
    assert float(values.abs().max()) == 0.0 and orthonormal(vectors)
    values, vectors = nystrom(torch.outer(I, I) / I.square().sum() @ omega, omega)
    expected = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(values[:4], expected, rtol=0, atol=1e-12)


def test_nystrom_with_noise_above_its_small_values():
    """Centring leaves rounding of the size of what was subtracted: it must neither fail nor show as signal."""
    m, omega = semidefinite(SPECTRA["steep"]), normal(200, 40, seed=3)
    values, _ = nystrom(m @ omega + 1e-4 * normal(200, 40, seed=4), omega)
    torch.testing.assert_close(values[:3], SPECTRA["steep"][:3], rtol=0, atol=2e-2)
    assert (values[15:] < 2e-2).all()


def test_nystrom_takes_the_shift_off_again():
    """Behind the rank of M there is only rounding; with the shift left in, its values would be the shift."""
    columns = torch.linalg.qr(torch.randn(50, 5).double()).Q
    omega = torch.randn(50, 12).double()
    y = columns * torch.arange(5, 0, -1).double() @ columns.mT @ omega
    values, _ = nystrom(y.float().double(), omega)
    core = omega.mT @ y.float().double()
    noise = torch.linalg.matrix_norm(core - core.mT) / torch.linalg.matrix_norm(core)
    assert float(values[5:].max()) < 0.5 * float(noise * values[0])


def test_nystrom_of_a_matrix_as_large_as_its_sketch():
    a = normal(12, 12)
    m, omega = a @ a.mT, normal(12, 12, seed=3)
    values, vectors = nystrom(m @ omega, omega)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(m).flip(-1), rtol=1e-9, atol=1e-10)
    assert orthonormal(vectors)


def sketches(g, k, length):
    omega, psi, t = normal(g.shape[-1], k, seed=5), normal(length, g.shape[-2], seed=6), normal(g.shape[-1], 8, seed=7)
    return g @ omega, psi @ g, omega, psi, (t, g @ t)


def solve(g, k, length, rank):
    y, z, omega, psi, probe = sketches(g, k, length)
    return two_sided(y, z, omega, psi, rank, probe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m, n", [(150, 200), (200, 150), (60, 200)])
@pytest.mark.parametrize("kind", ["exp", "steep", "low"])
def test_two_sided(kind, m, n, dtype):
    g = general(SPECTRA[kind], m, n)
    y, z, omega, psi, probe = sketches(g, 30, 55)
    found = two_sided(y.to(dtype).double(), z.to(dtype).double(), omega, psi, 10, probe)
    assert isinstance(found, RandomizedSVD) and found.method == "two_sided" and found.U.dtype == torch.float64
    assert orthonormal(found.U) and orthonormal(found.Vh.mT) and (found.S.diff() <= 0).all()
    error = float(torch.linalg.matrix_norm(g - (found.U * found.S) @ found.Vh, 2))
    noise = 1e-5 if dtype == torch.float32 else 1e-12
    assert error <= 2.5 * float(SPECTRA[kind][10]) + noise
    assert error <= float(found.error) <= 20 * error
    largest = found.U.gather(0, found.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    if kind == "low":
        torch.testing.assert_close(found.S[:5], SPECTRA["low"][:5], rtol=0, atol=noise)
        assert float(found.S[5:].max()) < noise


def test_two_sided_equals_its_formula():
    g = general(SPECTRA["1/i"])
    y, z, _, psi, _ = sketches(g, 20, 45)
    q = torch.linalg.qr(y).Q
    approximation = q @ torch.linalg.lstsq(psi @ q, z).solution
    found = solve(g, 20, 45, 20)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, approximation, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-140, 0.0, 1e140])
def test_two_sided_scales(scale):
    g = general(SPECTRA["exp"])
    one, two = solve(g, 20, 40, 6), solve(g * scale, 20, 40, 6)
    torch.testing.assert_close(two.S, one.S * scale, rtol=1e-9, atol=0)


def test_two_sided_with_a_dependent_psi():
    """A row of Psi that repeats another adds nothing and must not spoil the least-squares problem."""
    g = general(SPECTRA["low"])
    _, _, omega, psi, probe = sketches(g, 10, 20)
    psi[1:8] = psi[0]
    found = two_sided(g @ omega, psi @ g, omega, psi, 5, probe)
    torch.testing.assert_close(found.S, SPECTRA["low"][:5], rtol=0, atol=1e-9)


@pytest.mark.parametrize("m, n", [(12, 200), (150, 9), (9, 9), (1, 30), (30, 1)])
def test_two_sided_of_a_matrix_as_small_as_its_sketch(m, n):
    g = normal(m, n)
    found = solve(g, min(m, n), 40, min(m, n, 4))
    torch.testing.assert_close(found.S, torch.linalg.svdvals(g)[:4])
    assert orthonormal(found.U) and orthonormal(found.Vh.mT)


def test_sketches_of_two_matrices_and_of_nan_are_refused():
    y, z, omega, psi, probe = sketches(general(SPECTRA["exp"]), 20, 40)
    with pytest.raises(ValueError, match="differ, but both must be Psi G Omega"):
        two_sided(y, z, omega.flip(0), psi, 2, probe)
    with pytest.raises(ValueError, match="z holds NaN"):
        two_sided(y, z * torch.nan, omega, psi, 2, probe)
    with pytest.raises(ValueError, match="y holds NaN"):
        nystrom(y * torch.nan, omega[:150])
