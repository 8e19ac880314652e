import math

import pytest
import torch

from lora_kernels.ops import _ext, random_matrix
from lora_kernels.ops.random_matrix import reference
from tests.ops.test_philox import KNOWN

HAS_CPP = _ext.load()[0] is not None
COMPILED = [pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
try:
    import triton
    import triton.language as tl

    from lora_kernels.ops._tl import philox

    @triton.jit(do_not_specialize=["key0", "key1"])
    def known_answer_kernel(words_ptr, key0, key1):
        lane = tl.arange(0, 1).to(tl.uint32)
        c0 = lane + tl.load(words_ptr).to(tl.uint32)
        c1 = lane + tl.load(words_ptr + 1).to(tl.uint32)
        c2 = lane + tl.load(words_ptr + 2).to(tl.uint32)
        c3 = lane + tl.load(words_ptr + 3).to(tl.uint32)
        words = philox(c0, c1, c2, c3, tl.cast(key0, tl.uint32), tl.cast(key1, tl.uint32))
        for each in tl.static_range(4):
            tl.store(words_ptr + each + tl.arange(0, 1), words[each].to(tl.int32))

    HAS_TRITON = True
    COMPILED.append("triton")
except ImportError:
    HAS_TRITON = False
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["rademacher", "gaussian"]
SHAPES = [(1, 1), (2, 4), (33, 31), (40, 129), (129, 40), (17, 300)]
KEYS = [(0, 0, 0), (5, 3, 1), (-7, 2**32 - 1, 2**31), (2**64 - 1, 1, 2**32 - 1), (-(2**63), 7, 0)]


def where(backend):
    return DEVICE if backend == "triton" else "cpu"


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_signs_are_the_bits_of_a_known_answer(backend):
    seed, counter, answer = KNOWN[0]
    assert seed == 0 and not any(counter)
    signs = random_matrix(1, 128, seed=0, device=where(backend), backend=backend).cpu().reshape(4, 32)
    assert tuple(sum(1 << bit for bit in range(32) if signs[word, bit] < 0) for word in range(4)) == answer


@pytest.mark.skipif(not HAS_TRITON, reason="no triton")
@pytest.mark.parametrize("seed, counter, answer", KNOWN)
def test_known_answers_in_triton(seed, counter, answer):
    def signed(word):
        return word - 2**32 if word >= 2**31 else word

    words = torch.tensor([signed(each) for each in counter], dtype=torch.int32, device=DEVICE)
    key = (signed(seed & 0xFFFFFFFF), signed(seed >> 32))
    known_answer_kernel[(1,)](words, *key)
    assert tuple(int(each) & 0xFFFFFFFF for each in words) == answer


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("seed, stream, step", KEYS)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_same_numbers_as_the_definition(rows, columns, seed, stream, step, backend, poisoned_memory):
    key = {"seed": seed, "stream": stream, "step": step}
    signs = random_matrix(rows, columns, **key, device=where(backend), backend=backend)
    assert torch.equal(signs.cpu(), reference.random_matrix(rows, columns, "rademacher", **key, dtype=torch.float32))
    draws = random_matrix(rows, columns, kind="gaussian", **key, device=where(backend), backend=backend)
    truth = reference.random_matrix(rows, columns, "gaussian", **key)
    assert float((draws.cpu().double() - truth).abs().max()) < 1e-6
    assert float((0.5 * draws.cpu().double() - truth).abs().max()) > 1e-6


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype, backend):
    for kind in KINDS:
        found = random_matrix(30, 70, kind=kind, seed=3, dtype=dtype, device=where(backend), backend=backend).cpu()
        truth = random_matrix(30, 70, kind=kind, seed=3, dtype=torch.float64, backend="torch")
        assert found.dtype == dtype
        # The interpreter truncates where the device rounds to the nearest.
        bound = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-22}[dtype]
        assert bool(((found.double() - truth).abs() <= bound * truth.abs() + 1e-6).all())


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
@pytest.mark.parametrize("kind", KINDS)
def test_an_element_depends_on_its_position_alone(kind, backend):
    def draw(rows, columns, **key):
        return random_matrix(rows, columns, kind=kind, **key, device=where(backend), backend=backend)

    whole = draw(70, 260, seed=5, stream=3)
    for rows, columns in ((1, 1), (20, 11), (69, 131), (70, 259)):
        assert torch.equal(draw(rows, columns, seed=5, stream=3), whole[:rows, :columns])
    for other in ({"seed": 6, "stream": 3}, {"seed": 5, "stream": 4}, {"seed": 5, "stream": 3, "step": 1}):
        assert not torch.equal(draw(70, 260, **other), whole)
    assert torch.equal(draw(4, 9, seed=-1), draw(4, 9, seed=2**64 - 1))


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_the_tails_keep_the_bound():
    """Ten million draws reach beyond five standard deviations, and radii down to 1e-3."""
    draws = random_matrix(2500, 4000, kind="gaussian", seed=11, backend="cpp")
    truth = reference.random_matrix(2500, 4000, "gaussian", seed=11)
    assert float(truth.abs().max()) > 5.0
    assert float((draws.double() - truth).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    draws = random_matrix(1000, 1000, kind=kind, seed=1).double()
    count = draws.numel()
    fourth, sixth = {"rademacher": (1.0, 1.0), "gaussian": (3.0, 96.0)}[kind]
    assert abs(float(draws.mean())) < 5 / count**0.5
    assert abs(float((draws**2).mean()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((draws**4).mean()) - fourth) < 5 * (sixth / count) ** 0.5
    for other in (draws.roll(1, 0), draws.roll(1, 1), draws.roll(32, 1), draws.mT):
        pairs = (draws * other).triu(1)
        assert abs(float(pairs.sum())) < 5 * math.sqrt(count / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_an_isotropic_frame(kind):
    """E[Omega Omega^T] = k I: every entry within 5 of its standard deviations."""
    rows, k = 60, 20000
    omega = random_matrix(rows, k, kind=kind, seed=8).double()
    gram = omega @ omega.mT / k - torch.eye(rows, dtype=torch.float64)
    spread = torch.full((rows, rows), (1 / k) ** 0.5, dtype=torch.float64)
    spread.fill_diagonal_(1e-12 if kind == "rademacher" else (2 / k) ** 0.5)
    assert bool((gram.abs() <= 5 * spread).all())


def test_streams_are_independent():
    one, two = (random_matrix(500, 500, seed=4, stream=stream).double() for stream in (0, 1))
    assert abs(float((one * two).mean())) < 5 / 500
    assert float((one @ two.mT).abs().max()) < 6 * 500**0.5


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
def test_empty(backend):
    for shape in ((0, 5), (5, 0), (0, 0)):
        for kind in KINDS:
            assert random_matrix(*shape, kind=kind, seed=0, device=where(backend), backend=backend).shape == shape


def test_float64_and_defaults():
    assert random_matrix(2, 3, seed=0).dtype == torch.float32
    wide = random_matrix(20, 30, kind="gaussian", seed=9, dtype=torch.float64)
    assert torch.equal(wide, reference.random_matrix(20, 30, "gaussian", seed=9))


def test_registration_is_sound():
    names = ["torch"] + ["cpp"] * HAS_CPP
    for backend in names:
        for kind in KINDS:
            arguments = (torch.empty(7, 5), kind, -3, 1, 2, backend)
            torch.library.opcheck(torch.ops.lora_kernels.random_matrix.default, arguments)


def test_compiles_without_graph_breaks():
    def use(x):
        return x @ random_matrix(6, 4, seed=2**63 + 5, stream=1)

    x = torch.randn(3, 6)
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(use(x), compiled)


def test_errors_name_the_argument():
    cases = [
        (dict(rows=-1), ValueError, "rows is -1, but must be >= 0"),
        (dict(columns=2.0), TypeError, "columns must be an int, got float"),
        (dict(kind="uniform"), ValueError, "kind is 'uniform', but must be one of 'rademacher', 'gaussian'"),
        (dict(seed=2**64), ValueError, "seed is 18446744073709551616, but must be a 64-bit integer"),
        (dict(seed=-(2**63) - 1), ValueError, "seed is -9223372036854775809, but must be a 64-bit integer"),
        (dict(seed=1.5), TypeError, "seed must be an int, got float"),
        (dict(seed=True), TypeError, "seed must be an int, got bool"),
        (dict(stream=-1), ValueError, "stream is -1, but must be >= 0"),
        (dict(stream=2**32), ValueError, "stream is 4294967296, but must be >= 0 and <= 4294967295"),
        (dict(step=-1), ValueError, "step is -1"),
        (dict(dtype=torch.int32), TypeError, "dtype is torch.int32, but must be one of float16"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda'"),
        (dict(dtype=torch.float64, backend="cpp"), RuntimeError, "cannot run on backend 'cpp'"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            random_matrix(**{"rows": 2, "columns": 3, "seed": 0, **change})
