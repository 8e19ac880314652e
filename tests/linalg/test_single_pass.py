import pytest
import torch

from lora_kernels.linalg import Nystrom, RandomizedSVD, nystrom, two_sided

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
    found = nystrom((m @ omega).to(dtype), omega, 16, trace=spectrum.sum())
    assert isinstance(found, Nystrom) and found.values.dtype == found.vectors.dtype == torch.float64
    assert orthonormal(found.vectors) and (found.values.diff() <= 0).all() and (found.values >= 0).all()
    noise = float(spectrum[0]) * (1e-5 if dtype == torch.float32 else 1e-12)
    assert (found.values <= spectrum[:16] + noise).all()  # never above M
    rest = m - (found.vectors * found.values) @ found.vectors.mT
    nuclear = float(torch.linalg.svdvals(rest).sum())
    assert float(found.residual) == pytest.approx(nuclear, rel=1e-3, abs=200 * noise)
    # HMT-like: with 44 more columns than pairs the nuclear error is a small multiple of the best one.
    assert nuclear <= 1.4 * float(spectrum[16:].sum()) + 200 * noise
    if kind in ("steep", "low"):
        torch.testing.assert_close(found.values, spectrum[:16], rtol=0, atol=noise)


def test_nystrom_equals_its_formula():
    m, omega = semidefinite(SPECTRA["1/i"]), normal(200, 30, seed=3)
    y = m @ omega
    approximation = y @ torch.linalg.solve(omega.mT @ y, y.mT)
    found = nystrom(y, omega, 30)
    torch.testing.assert_close((found.vectors * found.values) @ found.vectors.mT, approximation, rtol=0, atol=1e-11)
    assert found.residual is None


def test_nystrom_converges_with_the_sketch():
    m = semidefinite(SPECTRA["1/i"])
    best = float(SPECTRA["1/i"][8:].sum())
    excess = []
    for k in (10, 20, 40, 80, 200):
        omega = normal(200, k, seed=3)
        excess.append(float(nystrom(m @ omega, omega, 8, trace=SPECTRA["1/i"].sum()).residual) / best - 1)
    assert excess == sorted(excess, reverse=True) and excess[-1] < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_nystrom_is_scale_invariant(scale, dtype):
    m, omega = semidefinite(SPECTRA["exp"]), normal(200, 30, seed=3)
    y = (m @ omega).to(dtype)
    one, two = nystrom(y.double(), omega, 8), nystrom((y.double() * scale).to(dtype), omega, 8)
    torch.testing.assert_close(two.values / scale, one.values, rtol=1e-5, atol=0)
    other = nystrom(y.double(), omega * scale, 8)  # a sketch by Omega / scale of M scale^-1
    torch.testing.assert_close(other.values * scale, one.values, rtol=1e-6, atol=1e-9)


def test_nystrom_of_zero_and_of_rank_one_in_a_batch():
    m = semidefinite(SPECTRA["exp"], (4,))
    m[1] = 0
    m[2] = torch.outer(I, I) / I.square().sum()
    omega = normal(200, 20, seed=3)
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    found = nystrom(m @ omega, omega, 4, trace=trace)
    assert found.values.shape == (4, 4) and found.residual.shape == found.shift.shape == (4,)
    assert float(found.values[1].abs().max()) == 0.0 and float(found.residual[1]) == 0.0
    torch.testing.assert_close(found.values[2], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), rtol=0, atol=1e-12)
    for i in range(4):
        alone = nystrom(m[i] @ omega, omega, 4, trace=trace[i])
        torch.testing.assert_close(alone.values, found.values[i], rtol=0, atol=1e-12)
        assert orthonormal(found.vectors[i])
    torch.testing.assert_close(alone.vectors, found.vectors[3], rtol=0, atol=1e-8)


def test_nystrom_with_noise_above_its_small_values():
    """Centring leaves rounding of the size of what was subtracted: it must neither fail nor show as signal."""
    m, omega = semidefinite(SPECTRA["steep"]), normal(200, 40, seed=3)
    y = m @ omega + 1e-4 * normal(200, 40, seed=4)
    found = nystrom(y, omega, 40)
    assert float(found.shift) > 1e-5
    torch.testing.assert_close(found.values[:3], SPECTRA["steep"][:3], rtol=0, atol=2e-2)
    assert (found.values[15:] < 2e-2).all()


def test_nystrom_takes_the_shift_off_again():
    """Behind the rank of M there is only rounding; with the shift left in, its values would be the shift."""
    basis = torch.linalg.qr(torch.randn(50, 5).double()).Q
    omega = torch.randn(50, 12).double()
    found = nystrom((basis * torch.arange(5, 0, -1).double() @ basis.mT @ omega).float(), omega, 12)
    assert float(found.values[5:].max()) < 0.5 * float(found.shift)


def test_nystrom_arguments():
    omega = normal(200, 20)
    with pytest.raises(ValueError, match="rank is 21, but must be >= 1 and <= 20"):
        nystrom(omega, omega, 21)
    with pytest.raises(ValueError, match="omega has shape .* but must have 200 rows"):
        nystrom(omega, omega[:100], 2)
    with pytest.raises(ValueError, match=r"both must be \(..., n, k\)"):
        nystrom(omega, omega[:, :10], 2)
    with pytest.raises(ValueError, match="with k <= n"):
        nystrom(omega[:10], omega[:10], 2)
    with pytest.raises(TypeError, match="y has dtype float16"):
        nystrom(omega.half(), omega, 2)
    spoiled = omega.expand(3, 200, 20).clone()
    spoiled[1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="matrix 1 of y holds NaN"):
        nystrom(spoiled, omega, 2)
    with pytest.raises(ValueError, match="at least two sizes"):
        nystrom(omega[0], omega, 2)


def test_nystrom_of_a_matrix_as_large_as_its_sketch():
    a = normal(12, 12)
    m, omega = a @ a.mT, normal(12, 12, seed=3)
    found = nystrom(m @ omega, omega, 12, trace=m.trace())
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(m).flip(-1), rtol=1e-9, atol=1e-10)
    assert orthonormal(found.vectors) and float(found.residual) < 1e-9


def sketches(g, k, length):
    omega, psi = normal(g.shape[-1], k, seed=5), normal(length, g.shape[-2], seed=6)
    return g @ omega, psi @ g, omega, psi


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m, n", [(150, 200), (200, 150), (60, 200)])
@pytest.mark.parametrize("kind", ["exp", "steep", "low"])
def test_two_sided(kind, m, n, dtype):
    g = general(SPECTRA[kind], m, n)
    y, z, omega, psi = sketches(g, 30, 55)
    t = normal(n, 8, seed=7)
    found = two_sided(y.to(dtype), z.to(dtype), omega, psi, 10, probe=(t, g @ t))
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
    y, z, omega, psi = sketches(general(SPECTRA["1/i"]), 20, 45)
    q = torch.linalg.qr(y).Q
    approximation = q @ torch.linalg.lstsq(psi @ q, z).solution
    found = two_sided(y, z, omega, psi, 20)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, approximation, rtol=0, atol=1e-12)
    assert found.error is None


def test_two_sided_of_a_batch_with_zero():
    g = general(SPECTRA["exp"], batch=(3,))
    g[1] = 0
    y, z, omega, psi = sketches(g, 20, 40)
    found = two_sided(y, z, omega, psi, 6)
    assert float(found.S[1].abs().max()) == 0.0
    for i in range(3):
        alone = two_sided(y[i], z[i], omega, psi, 6)
        torch.testing.assert_close(alone.S, found.S[i], rtol=0, atol=1e-12)
        assert orthonormal(found.U[i]) and orthonormal(found.Vh[i].mT)
    torch.testing.assert_close(alone.Vh, found.Vh[2], rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_two_sided_scales(scale):
    y, z, omega, psi = sketches(general(SPECTRA["exp"]), 20, 40)
    one, two = two_sided(y, z, omega, psi, 6), two_sided(y * scale, z * scale, omega, psi, 6)
    torch.testing.assert_close(two.S / scale, one.S, rtol=1e-9, atol=0)


def test_two_sided_with_a_dependent_psi():
    """A row of Psi that repeats another adds nothing and must not spoil the least-squares problem."""
    g = general(SPECTRA["low"])
    omega, psi = normal(200, 10, seed=5), normal(20, 150, seed=6)
    psi[1:8] = psi[0]
    found = two_sided(g @ omega, psi @ g, omega, psi, 5)
    torch.testing.assert_close(found.S, SPECTRA["low"][:5], rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("m, n", [(12, 200), (150, 9), (9, 9), (1, 30), (30, 1)])
def test_two_sided_of_a_matrix_as_small_as_its_sketch(m, n, batch):
    g = normal(*batch, m, n)
    y, z, omega, psi = sketches(g, min(m, n), 40)
    found = two_sided(y, z, omega, psi, min(m, n, 4))
    torch.testing.assert_close(found.S, torch.linalg.svdvals(g)[..., :4])
    assert orthonormal(found.U) and orthonormal(found.Vh.mT)


def test_two_sided_arguments():
    y, z, omega, psi = sketches(general(SPECTRA["exp"]), 20, 40)
    with pytest.raises(ValueError, match="rank is 21, but must be >= 1 and <= 20"):
        two_sided(y, z, omega, psi, 21)
    with pytest.raises(ValueError, match="must be .* with k <= l"):
        two_sided(y, z[:10], omega, psi[:10], 2)
    with pytest.raises(ValueError, match="psi has shape .* but must have 40 rows"):
        two_sided(y, z, omega, psi.mT, 2)
    with pytest.raises(ValueError, match="matrix 0 differ, but both must be Psi G Omega"):
        two_sided(y, z, omega.flip(0), psi, 2)
    with pytest.raises(ValueError, match="matrix 0 of z holds NaN"):
        two_sided(y, z * torch.nan, omega, psi, 2)
    with pytest.raises(ValueError, match="probe has shapes"):
        two_sided(y, z, omega, psi, 2, probe=(omega, y[:, :3]))
    with pytest.raises(TypeError, match="z has dtype int64"):
        two_sided(y, z.long(), omega, psi, 2)
