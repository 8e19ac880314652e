import pytest
import torch

from lora_kernels.linalg import LinearOperator, randomized_svd
from lora_kernels.linalg.randomized_svd import probe_bound

I = torch.arange(1, 257, dtype=torch.float64)
SPECTRA = {"1/i": 1 / I, "exp": torch.exp(-I / 50), "steep": torch.exp(-I), "flat": torch.ones_like(I)}


def matrix(m, n, spectrum, seed=0, batch=()):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    draw = [torch.randn(*batch, size, k, dtype=torch.float64, generator=generator) for size in (m, n)]
    u, v = (torch.linalg.qr(each).Q for each in draw)
    return (u * spectrum[:k]) @ v.mT


def residual(a, found):
    return a.double() - (found.U.double() * found.S.double().unsqueeze(-2)) @ found.Vh.double()


def errors(a, found):
    """Frobenius and spectral norm of the residual over those of the best approximation, minus 1."""
    rank = found.S.shape[-1]
    e, s = residual(a, found), torch.linalg.svdvals(a.double())[..., rank:]
    return (
        float((torch.linalg.matrix_norm(e) / torch.linalg.vector_norm(s, dim=-1)).max()) - 1,
        float((torch.linalg.matrix_norm(e, 2) / s[..., 0]).max()) - 1,
    )


def check_shape(a, found, rank):
    m, n = a.shape[-2:]
    kept = torch.float64 if a.dtype == torch.float64 else torch.float32
    batch = a.shape[:-2]
    assert found.U.shape == (*batch, m, rank) and found.S.shape == (*batch, rank)
    assert found.Vh.shape == (*batch, rank, n)
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == kept
    eye = torch.eye(rank, dtype=torch.float64)
    bar = 1e-12 if kept == torch.float64 else 2e-6
    u, vh = found.U.double(), found.Vh.double()
    assert float((u.mT @ u - eye).abs().amax()) < bar and float((vh @ vh.mT - eye).abs().amax()) < bar
    assert (found.S >= 0).all() and (found.S.diff(dim=-1) <= 1e-6 * found.S[..., :1]).all()
    largest = found.U.gather(-2, found.U.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m, n", [(256, 256), (131, 227), (227, 131)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_near_the_best_approximation(kind, m, n, dtype):
    a = matrix(m, n, SPECTRA[kind]).to(dtype)
    found = randomized_svd(a, 16)
    assert found.method == "krylov"
    check_shape(a, found, 16)
    if kind == "steep":  # the best residual is at the level of float32 rounding
        truth = torch.linalg.svdvals(a.double())
        e = float(torch.linalg.matrix_norm(residual(a, found), 2))
        assert e <= 1.01 * float(truth[16]) + (1e-6 if dtype == torch.float32 else 1e-14)
        torch.testing.assert_close(found.S.double(), truth[:16], rtol=0, atol=3e-7)
        return
    frobenius, spectral = errors(a, found)
    assert frobenius < 0.015 and spectral < 0.08
    truth = torch.linalg.svdvals(a.double())[:16]
    # Ritz values never exceed the singular values.
    assert (found.S.double() <= truth * (1 + 1e-6)).all()
    assert (found.S.double() >= truth * 0.75).all() if kind != "flat" else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank, n_iter", [(16, 9), (64, 6)])
def test_converges_to_the_triplets(rank, n_iter, dtype):
    a = matrix(256, 256, SPECTRA["exp"])
    u, s, vh = torch.linalg.svd(a)
    found = randomized_svd(a.to(dtype), rank, n_iter=n_iter)
    assert found.method == "krylov"
    torch.testing.assert_close(found.S.double(), s[:rank], rtol=1e-5 if dtype == torch.float32 else 1e-6, atol=0)
    turn = torch.where((found.U.double() * u[:, :rank]).sum(0) < 0, -1.0, 1.0)
    # Vectors of close values turn into each other: sin(angle) <= rounding / gap.
    bar = 2e-3 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(found.U.double() * turn, u[:, :rank], rtol=0, atol=bar)
    torch.testing.assert_close(found.Vh.double().mT * turn, vh[:rank].mT, rtol=0, atol=bar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_where_the_rank_fits(dtype):
    a = (matrix(150, 200, torch.cat([3 / I[:7], 0 * I[7:]]))).to(dtype)
    found = randomized_svd(a, 12)
    check_shape(a, found, 12)
    bar = 1e-13 if dtype == torch.float64 else 3e-6
    assert float(torch.linalg.matrix_norm(residual(a, found), 2)) < bar * 3
    assert float(found.S[7:].max()) < bar and float(found.error) < 30 * bar


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_and_rank_one_in_a_batch(dtype):
    a = matrix(120, 100, SPECTRA["1/i"], batch=(4,)).to(dtype)
    a[1] = 0
    a[2] = torch.outer(torch.eye(120, dtype=dtype)[5], torch.eye(100, dtype=dtype)[7])
    found = randomized_svd(a, 4)
    check_shape(a, found, 4)
    assert float(found.S[1].abs().max()) == 0.0 and float(found.error[1]) == 0.0
    assert abs(float(found.S[2, 0]) - 1) < 1e-5 and float(found.S[2, 1:].max()) < 1e-5
    assert max(errors(a[[0, 3]], randomized_svd(a[[0, 3]], 4))) < 0.05


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (5, 300), (300, 5), (30, 30)])
def test_small_matrices_are_decomposed_completely(shape):
    a = torch.randn(shape)
    rank = min(*shape, 28)
    found = randomized_svd(a, rank)
    assert found.method == "direct"
    check_shape(a, found, rank)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(a)[:rank])
    truth = torch.linalg.matrix_norm(residual(a, found), 2)
    assert float(found.error) >= float(truth) * (1 - 1e-3) or float(truth) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_is_the_float32_computation(dtype):
    a = matrix(200, 180, SPECTRA["exp"]).to(dtype)
    narrow, wide = randomized_svd(a, 8), randomized_svd(a.float(), 8)
    assert torch.equal(narrow.U, wide.U) and torch.equal(narrow.S, wide.S) and torch.equal(narrow.Vh, wide.Vh)


def test_a_batch_is_its_matrices():
    a = matrix(150, 170, SPECTRA["1/i"], batch=(2, 3))
    together = randomized_svd(a, 8, seed=5)
    assert together.error.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = randomized_svd(a[i, j], 8, seed=5)
            torch.testing.assert_close(alone.S, together.S[i, j], rtol=1e-10, atol=0)
            torch.testing.assert_close(alone.U, together.U[i, j], rtol=0, atol=1e-8)
            torch.testing.assert_close(alone.Vh, together.Vh[i, j], rtol=0, atol=1e-8)
            torch.testing.assert_close(alone.error, together.error[i, j])


@pytest.mark.parametrize("batch", [(), (3,)])
def test_an_operator_is_its_matrix(batch):
    a = matrix(150, 170, SPECTRA["1/i"], batch=batch)
    operator = LinearOperator(tuple(a.shape), lambda x: a @ x, lambda y: a.mT @ y, torch.float64)
    one, two = randomized_svd(a, 8), randomized_svd(operator, 8)
    torch.testing.assert_close(one.S, two.S, rtol=1e-10, atol=0)
    torch.testing.assert_close(one.U, two.U, rtol=0, atol=1e-7)
    torch.testing.assert_close(one.error, two.error)
    full = randomized_svd(operator, 150)
    assert full.method == "direct"
    torch.testing.assert_close(full.S, torch.linalg.svdvals(a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("kind", ["1/i", "exp"])
def test_defaults_are_no_worse_than_torch_svd_lowrank(kind, rank):
    a = matrix(256, 256, SPECTRA[kind])
    ours, theirs = [], []
    for seed in range(4):
        ours.append(torch.linalg.matrix_norm(residual(a, randomized_svd(a, rank, seed=seed))))
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(a, rank + 8, niter=2)
        theirs.append(torch.linalg.matrix_norm(a - (u * s)[:, :rank] @ v[:, :rank].mT))
    assert sum(ours) <= sum(theirs) * (1 + 5e-4)


@pytest.mark.parametrize("kind", ["1/i", "exp", "steep"])
def test_the_bound_holds_and_says_something(kind):
    a = matrix(200, 250, SPECTRA[kind])
    for seed in range(20):
        found = randomized_svd(a, 10, seed=seed)
        truth = float(torch.linalg.matrix_norm(residual(a, found), 2))
        assert truth <= float(found.error) <= 20 * truth
    assert float(randomized_svd(a, 10, probes=0).error) == torch.inf
    few, many = (float(randomized_svd(a, 10, probes=p).error) for p in (2, 32))
    assert many < few


def test_the_bound_fails_as_rarely_as_it_says():
    e = torch.zeros(20000, 8)
    e[:, 0] = torch.randn(20000)  # E w for E of rank one and norm 1, one probe at a time
    held = torch.stack([probe_bound(each[None, :1]) for each in e[:, :1].unsqueeze(1)]) >= 1
    assert float(held.double().mean()) > 0.998


def test_scales():
    a = matrix(120, 150, SPECTRA["1/i"]).float()
    one = randomized_svd(a, 8)
    for scale in (2.0**-80, 2.0**80):
        other = randomized_svd(a * scale, 8)
        assert torch.equal(other.U, one.U) and torch.equal(other.S, one.S * scale)
        torch.testing.assert_close(other.error, one.error * scale)


def test_same_seed_same_bits_other_seed_same_triplets():
    a = matrix(200, 200, SPECTRA["steep"]).float()
    one, two, other = (randomized_svd(a, 6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.U, two.U) and torch.equal(one.error, two.error)
    torch.testing.assert_close(one.U, other.U, rtol=0, atol=1e-4)
    assert not torch.equal(one.error, other.error)


def test_not_contiguous_narrow_blocks_and_empty_batch():
    a = matrix(180, 120, SPECTRA["1/i"]).float()
    one, two = randomized_svd(a, 5), randomized_svd(a.mT.contiguous().mT, 5)
    torch.testing.assert_close(one.S, two.S)
    diagonal = torch.diag(torch.cat([torch.tensor([1.0, 0.9]), torch.zeros(98)]))
    for seed in range(6):
        found = randomized_svd(diagonal, 2, n_iter=1, seed=seed)
        torch.testing.assert_close(found.S, torch.tensor([1.0, 0.9]), rtol=1e-5, atol=0)
    empty = randomized_svd(torch.zeros(0, 50, 60), 4)
    assert empty.U.shape == (0, 50, 4) and empty.Vh.shape == (0, 4, 60) and empty.error.shape == (0,)


def test_no_poison(poisoned_memory):
    a = matrix(150, 140, SPECTRA["exp"], batch=(2,)).float()
    check_shape(a, randomized_svd(a, 6), 6)


def test_gradients_do_not_flow():
    a = matrix(100, 90, SPECTRA["exp"]).float().requires_grad_()
    assert not randomized_svd(a, 4).U.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 50}, {"rank": 50, "probes": 0}])
def test_bad_matrix_is_named(bad, dtype, settings):
    a = torch.randn(2, 3, 60, 50).to(dtype)
    a[1, 1, 7, 2] = bad
    with pytest.raises(ValueError, match="matrix 4 of a holds NaN or infinite"):
        randomized_svd(a, **settings)


def test_overflow_is_told_from_nan():
    with pytest.raises(ValueError, match="overflows: scale a down"):
        randomized_svd(torch.full((200, 200), 3e38), 4)


def test_arguments():
    a = torch.randn(60, 50)
    with pytest.raises(ValueError, match="rank is 51, but must be >= 1 and <= 50"):
        randomized_svd(a, 51)
    with pytest.raises(TypeError, match="rank must be an int"):
        randomized_svd(a, 2.0)
    with pytest.raises(TypeError, match="a has dtype int64"):
        randomized_svd(torch.zeros(4, 4, dtype=torch.int64), 1)
    with pytest.raises(TypeError, match=r"a must be a torch.Tensor"):
        randomized_svd([[1.0]], 1)
    with pytest.raises(ValueError, match=r"must be \(..., m, n\)"):
        randomized_svd(torch.zeros(4), 1)
    for name in ("n_iter", "probes"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            randomized_svd(a, 2, **{name: -1})
    with pytest.raises(TypeError, match="dtype is torch.float16"):
        randomized_svd(LinearOperator((4, 4), torch.clone, torch.clone, torch.float16), 1)
    with pytest.raises(ValueError, match=r"matmul returned .*\(50, .*must return .*\(60,"):
        randomized_svd(LinearOperator((60, 50), lambda x: x, lambda y: y), 1)
    with pytest.raises(ValueError, match="matrix 0 of the product with a holds NaN"):
        randomized_svd(LinearOperator((60, 60), lambda x: x * torch.nan, lambda y: y), 1)
