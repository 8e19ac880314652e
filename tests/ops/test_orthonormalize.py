import pytest
import torch

from lora_kernels.ops import orthonormalize
from lora_kernels.ops.orthonormalize import op, reference
from lora_kernels.ops.orthonormalize.op import gram, times
from tests.helpers.accuracy import assert_accurate, rounding

# |Q^T Q - 1|, then |y - Q R| / |y|, as documented.
BARS = {torch.float64: (1e-13, 1e-14), torch.float32: (1e-6, 5e-7)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True, params=["cholesky", "householder"])
def _method(request, monkeypatch):
    monkeypatch.setattr(
        op, "_householder_is_faster", lambda y: request.param == "householder" and y.dtype == torch.float64
    )


def check(y, q, r):
    kept = torch.float64 if y.dtype == torch.float64 else torch.float32
    assert q.dtype == r.dtype == kept and q.shape == y.shape and r.shape == (*y.shape[:-2], y.shape[-1], y.shape[-1])
    orthogonal, backward = BARS[kept]
    wide, q, r = y.double(), q.double(), r.double()
    eye = torch.eye(y.shape[-1], dtype=torch.float64)
    assert float((q.mT @ q - eye).abs().amax()) <= orthogonal
    scale = torch.linalg.matrix_norm(wide)
    assert (torch.linalg.matrix_norm(wide - q @ r) <= backward * y.shape[-1] ** 0.5 * scale).all()
    assert torch.equal(r.tril(-1), torch.zeros_like(r)) and (r.diagonal(dim1=-2, dim2=-1) >= 0).all()


def conditioned(n, k, log10, dtype=torch.float32, batch=()):
    u = torch.linalg.qr(torch.randn(*batch, n, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(*batch, k, k, dtype=torch.float64)).Q
    return ((u * torch.logspace(0, -log10, k, dtype=torch.float64)) @ v.mT).to(dtype)


SHAPES = [(1, 1), (7, 1), (7, 7), (131, 24), (1009, 4), (3, 127, 24), (2, 3, 31, 5), (5000, 17)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_householder(shape, dtype):
    y = torch.randn(shape).to(dtype)
    q, r = orthonormalize(y)
    check(y, q, r)
    truth, _ = reference.orthonormalize(y)
    if shape[-2] > shape[-1]:  # a square gaussian matrix may be as ill conditioned as it likes
        assert float((q - truth).abs().max()) <= 17 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log10", [0, 3, 5, 7, 9, 12, 15, 30])
def test_condition_numbers(log10, dtype):
    y = conditioned(257, 16, log10, dtype)
    check(y, *orthonormalize(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_deficient_zero_and_repeated(dtype):
    low = torch.randn(60, 3, dtype=dtype) @ torch.randn(3, 8, dtype=dtype)
    repeated = torch.randn(60, 1, dtype=dtype).expand(60, 8)
    gap = torch.randn(60, 8, dtype=dtype)
    gap[:, 4] = 0
    y = torch.stack([low, torch.zeros_like(low), repeated, gap, torch.randn(60, 8, dtype=dtype)])
    q, r = orthonormalize(y)
    check(y, q, r)
    assert float(r[1].abs().max()) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e15])
def test_scales(scale):
    y = torch.randn(100, 8)
    q, r = orthonormalize(y * scale)
    check(y * scale, q, r)
    columns = 10.0 ** torch.linspace(-15, 15, 8)
    check(y * columns, *orthonormalize(y * columns))


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_float64_squares_out_of_range(scale):
    y = torch.randn(50, 6, dtype=torch.float64)
    q, r = orthonormalize(y * scale)
    check(y, q, r / scale)


def test_one_bad_matrix_leaves_the_others_alone():
    good = torch.randn(5, 90, 12)
    mixed = good.clone()
    mixed[2] = conditioned(90, 12, 12)
    alone, together = orthonormalize(good)[0], orthonormalize(mixed)[0]
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(together[keep], alone[keep], rtol=0, atol=1e-7)
    check(mixed, *orthonormalize(mixed))


def test_not_contiguous_and_untouched():
    y = torch.randn(24, 400)[:, ::2].mT
    before = y.clone()
    check(y, *orthonormalize(y))
    assert torch.equal(y, before)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0), (0, 0)])
def test_empty(shape):
    q, r = orthonormalize(torch.zeros(shape))
    assert q.shape == shape and r.shape == (*shape[:-2], shape[-1], shape[-1])


def test_same_bits_and_no_poison(poisoned_memory):
    y = torch.randn(3, 500, 20)
    one, two = orthonormalize(y), orthonormalize(y)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    check(y, *one)


def test_the_check_sees_a_half_scaled_result():
    y = torch.randn(40, 4)
    q, r = orthonormalize(y)
    for spoiled in ((q / 2, r * 2), (q, r / 2)):
        with pytest.raises(AssertionError):
            check(y, *spoiled)


def test_registration_is_sound():
    for dtype in (torch.float16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        results = torch.empty(2, 9, 4, dtype=wide), torch.empty(2, 4, 4, dtype=wide)
        arguments = (*results, torch.randn(2, 9, 4).to(dtype), "torch")
        torch.library.opcheck(torch.ops.lora_kernels.orthonormalize.default, arguments)


def test_compiles():
    y = torch.randn(30, 4)
    compiled = torch.compile(lambda x: orthonormalize(x)[0] * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(y), orthonormalize(y)[0] * 2)


def test_gram_and_times_do_not_round_to_float32():
    y = conditioned(700, 5, 6, batch=(40,))
    other = torch.randn(40, 700, 3)
    truth = y.double().mT @ y.double()
    bound = 2 * rounding(torch.float64, 700)  # the truth is rounded, too
    assert_accurate(gram(y), truth, bound)
    assert_accurate(gram(y[3], other[3]), y[3].double().mT @ other[3].double(), bound)
    small = torch.randn(40, 5, 2, dtype=torch.float64)
    assert torch.equal(times(y, small), (y.double() @ small).float())


def test_batches_are_not_walked_through_on_a_gpu():
    assert len(op._blocks(torch.empty(224, 4096, 40, device="meta"))) == 1  # like all but the CPU
    assert len(op._blocks(torch.empty(8, 1 << 20, 16, device="meta"))) == 2  # 512 MB at a time
    assert len(op._blocks(torch.empty(3, 4096, 40))) == 3  # rows of all three


def test_arguments():
    with pytest.raises(TypeError, match="y has dtype int64"):
        orthonormalize(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"y must be a torch.Tensor"):
        orthonormalize([[1.0]])
    with pytest.raises(ValueError, match="at least as many rows as columns"):
        orthonormalize(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"must be \(..., n, k\)"):
        orthonormalize(torch.zeros(3))
    with pytest.raises(RuntimeError, match="no 'triton' implementation"):
        orthonormalize(torch.zeros(3, 2), backend="triton")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bad_matrix_is_named(bad, dtype):
    y = torch.randn(2, 3, 20, 4, dtype=dtype)
    y[1, 1, 7, 2] = bad
    with pytest.raises(ValueError, match="matrix 4 of y holds NaN or infinite"):
        orthonormalize(y)


@pytest.mark.gpu
@pytest.mark.parametrize("log10", [0, 5, 12])
def test_cuda(log10):
    y = conditioned(1000, 24, log10, batch=(4,))
    q, r = orthonormalize(y.cuda())
    check(y, q.cpu(), r.cpu())


def test_what_is_left_of_a_deficient_matrix_is_rounding():
    """A span that misses a part of y shows here and not in the orthogonality."""
    y = torch.randn(150, 7).double() @ torch.randn(7, 20).double()
    q, r = orthonormalize(y)
    assert_accurate(q @ r, y, BARS[torch.float64][1] * 20**0.5)
    ill = torch.linalg.qr(torch.randn(200, 12).double()).Q * torch.logspace(0, -6, 12).double()
    ill = ill @ torch.linalg.qr(torch.randn(12, 12).double()).Q
    q, r = orthonormalize(ill)
    assert_accurate(q @ r, ill, BARS[torch.float64][1] * 12**0.5)
