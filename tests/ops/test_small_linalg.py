from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels.ops import _ext
from lora_kernels.ops.small_linalg import eigh, fix_signs, reference

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}


def check(matrices, values, vectors):
    """Backward error, orthogonality, order and signs; independent of any other eigensolver."""
    wide, v, w = matrices.double(), vectors.double(), values.double()
    wide = wide.tril() + wide.tril(-1).mT
    n, bound = matrices.shape[-1], TOLERANCE[matrices.dtype]
    scale = torch.linalg.matrix_norm(wide).clamp_min(1e-300)[..., None, None]
    assert (((wide @ v - v * w.unsqueeze(-2)) / scale).abs() <= bound * n**0.5).all()
    assert ((v.mT @ v - torch.eye(n)).abs() <= bound * n).all()
    assert (w.diff(dim=-1) >= 0).all()
    assert torch.equal(fix_signs(vectors), vectors)


def spectrum(kind, n):
    return {
        "random": torch.randn(n).double(),
        "clustered": 1 + 1e-9 * torch.randn(n).double(),
        "zero": torch.zeros(n).double(),
        "deficient": torch.cat([torch.zeros(n // 2), torch.rand(n - n // 2)]).double(),
        "graded": 10.0 ** (-12 * torch.arange(n) / n).double(),
    }[kind]


def symmetric(batch, n, kind, dtype):
    q = torch.linalg.qr(torch.randn(batch, n, n, dtype=torch.float64)).Q
    a = (q * spectrum(kind, n)) @ q.mT
    return ((a + a.mT) / 2).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["random", "clustered", "zero", "deficient", "graded"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 16, 33, 64])
def test_eigenpairs(n, kind, dtype, backend):
    matrices = symmetric(11 if n < 64 else 2, n, kind, dtype)
    values, vectors = eigh(matrices, backend=backend)
    check(matrices, values, vectors)
    truth = torch.linalg.eigvalsh(matrices.double())
    assert (values.double() - truth).abs().max() <= TOLERANCE[dtype] * n**0.5 * max(1e-3, float(truth.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 5), (300, 6), (2, 3, 4)])
def test_batches(shape, backend):
    a = torch.randn(*shape, shape[-1], dtype=torch.float64)
    a = a + a.mT
    values, vectors = eigh(a, backend=backend)
    assert values.shape == a.shape[:-1] and vectors.shape == a.shape
    check(a, values, vectors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_extreme_scales(scale, backend):
    a = symmetric(3, 9, "random", torch.float64)
    values, _ = eigh(a * scale, backend=backend)
    torch.testing.assert_close(values / scale, eigh(a, backend="torch")[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_lower_triangle_is_read(backend):
    a = symmetric(4, 10, "random", torch.float64)
    spoiled = torch.where(torch.ones(10, 10).tril().bool(), a, torch.tensor(float("nan"), dtype=torch.float64))
    values, vectors = eigh(spoiled, backend=backend)
    check(a, values, vectors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_matrix_is_named(bad, backend):
    a = symmetric(40, 6, "random", torch.float64)
    a[23, 4, 1] = bad
    with pytest.raises(ValueError, match="matrix 23 holds NaN or infinite"):
        eigh(a, backend=backend)


def test_arguments():
    with pytest.raises(TypeError, match="matrices has dtype float16"):
        eigh(torch.eye(3).half())
    with pytest.raises(ValueError, match=r"must be \(..., n, n\)"):
        eigh(torch.zeros(3, 4))
    if HAS_CPP:
        with pytest.raises(RuntimeError, match="order 200 exceeds 128"):
            eigh(torch.eye(200), backend="cpp")


def test_registration_is_sound():
    a = symmetric(3, 5, "random", torch.float64)
    for backend in ["torch"] + ["cpp"] * HAS_CPP:
        torch.library.opcheck(torch.ops.lora_kernels.eigh.default, (a, backend))


def test_threads_do_not_change_bits():
    if not HAS_CPP:
        pytest.skip("extension not built")
    a, before = symmetric(100, 12, "random", torch.float64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = eigh(a, backend="cpp")
        torch.set_num_threads(2)
        two = eigh(a, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 64, 100])
def test_cuda(n, dtype):
    a = symmetric(37, n, "random", dtype).cuda()
    values, vectors = eigh(a, backend="cpp")
    check(a.cpu(), values.cpu(), vectors.cpu())


def test_reference_is_torch_with_signs():
    a = symmetric(5, 7, "random", torch.float64)
    torch.testing.assert_close(reference.eigh(a)[0], torch.linalg.eigvalsh(a))


GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "symmetric_eigen.safetensors")
CASES = sorted({name.rsplit(".", 1)[0] for name in GOLDEN})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_golden(case, dtype, backend):
    """Well and ill conditioned, repeated, clustered and rank-deficient matrices with float64 truths by LAPACK."""
    matrices, truth = GOLDEN[f"{case}.S"].to(dtype), GOLDEN[f"{case}.w"]
    values, vectors = eigh(matrices, backend=backend)
    check(matrices, values, vectors)
    scale = truth.abs().amax(-1, keepdim=True)
    assert ((values.double() - truth).abs() <= TOLERANCE[dtype] * scale).all()
