import pytest
import torch

from lora_kernels.ops import _ext, use_backend
from lora_kernels.ops.covariance import op as covariance_op
from lora_kernels.ops.covariance import reference
from lora_kernels.ops.covariance.op import covariance_, symmetrize_
from tests.helpers.accuracy import assert_accurate, rounding

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
# Primes, fewer tokens than a block, more than a chunk; one feature; widths around block edges.
SHAPES = [(0, 17), (1, 33), (5, 1), (37, 50), (100, 129), (65, 200), (2049, 17), (4100, 140)]
WEIGHTS = ["none", "bool", "float", "negative"]


def make(tokens, features, dtype, weights):
    x = torch.randn(tokens, features, dtype=torch.float64).to(dtype)
    weight = {
        "none": None,
        "bool": torch.rand(tokens) < 0.7,
        "float": torch.rand(tokens) * (torch.rand(tokens) < 0.8),
        "negative": torch.randn(tokens),
    }[weights]
    return x, weight


def check(out, x, weight, what=""):
    """Beside the plain product in the same dtypes, accumulated in float32."""
    x = x.reshape(-1, x.shape[-1])
    w = 1.0 if weight is None else weight.float().reshape(-1, 1)
    left, right = x.float() * w, x.float()
    truth, plain, terms = reference.covariance(x, weight)[0], left.mT @ right, left.square().mT @ right.square()
    out, truth, plain, terms = (each.tril() for each in (out, truth, plain, terms.sqrt()))
    assert_accurate(out, truth, rounding(torch.float32, len(x)), plain=plain, terms=terms, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, features", SHAPES)
def test_matches_float64(tokens, features, dtype, weights, backend, poisoned_memory):
    x, weight = make(tokens, features, dtype, weights)
    out, total = torch.zeros(features, features), torch.zeros(features)
    covariance_(out, x, weight, total, backend=backend)
    check(out, x, weight)
    w = 1.0 if weight is None else weight.float().unsqueeze(-1)
    terms = (x.float() * w).square().sum(0).sqrt()
    assert_accurate(total, reference.covariance(x, weight)[1], rounding(torch.float32, tokens), terms=terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_numbers_of_every_kind_are_widened_exactly(dtype, backend):
    limits = torch.finfo(dtype)
    values = [
        float("inf"),
        -float("inf"),
        float("nan"),
        limits.max,
        limits.smallest_normal,
        limits.tiny / 4,
        -0.0,
        -3.0,
    ]
    x, total = torch.tensor([values], dtype=dtype), torch.zeros(len(values))
    covariance_(torch.zeros(len(values), len(values)), x, None, total, backend=backend)
    torch.testing.assert_close(total, x[0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_over_calls_and_matches_one_call(backend):
    x, weight = make(300, 70, torch.float32, "float")
    whole, parts = torch.zeros(70, 70), torch.zeros(70, 70)
    covariance_(whole, x, weight, backend=backend)
    covariance_(parts, x[:100], weight[:100], backend=backend)
    covariance_(parts, x[100:], weight[100:], backend=backend)
    check(whole, x, weight)
    check(parts, x, weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_leading_sizes(backend):
    wide = torch.randn(6, 11, 90)
    cases = {
        "strided rows": wide[..., 5:55],
        "transposed batch": wide[..., :50].transpose(0, 1),
        "strided columns": wide[..., ::2],
        "one row": wide[0, 0, :50],
    }
    for name, x in cases.items():
        out = torch.zeros(x.shape[-1], x.shape[-1])
        weight = torch.rand(x.shape[:-1])
        covariance_(out, x, weight, backend=backend)
        check(out, x, weight, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_rows_may_hold_anything(backend, kind):
    x, keep = torch.randn(40, 20), torch.arange(40) % 3 != 0
    clean = x.clone()
    x[~keep] = torch.tensor([float("nan"), float("inf")]).repeat(10)
    out, total = torch.zeros(20, 20), torch.zeros(20)
    covariance_(out, x, keep if kind == "bool" else keep.float(), total, backend=backend)
    check(out, clean, keep)
    assert_accurate(total, clean[keep].double().sum(0), rounding(torch.float32, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked_changes_nothing(backend):
    out, total = torch.full((9, 9), 3.0), torch.full((9,), 2.0)
    covariance_(out, torch.randn(4, 9), torch.zeros(4, dtype=torch.bool), total, backend=backend)
    assert torch.equal(out, torch.full((9, 9), 3.0)) and torch.equal(total, torch.full((9,), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    x, weight = make(3000, 150, torch.bfloat16, "float")
    results = []
    for _ in range(2):
        out, total = torch.zeros(150, 150), torch.zeros(150)
        covariance_(out, x, weight, total, backend=backend)
        results.append((out, total))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_float64_sums():
    x, weight = make(200, 30, torch.float64, "float")
    out, total = torch.zeros(30, 30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    covariance_(out, x, weight, total)
    truth = reference.covariance(x, weight)[0]
    assert_accurate(out.tril(), truth.tril(), 2 * rounding(torch.float64, 200))  # the truth is rounded, too


def test_symmetrize_ignores_the_upper_triangle():
    full = torch.randn(1100, 1100)
    full = full + full.mT
    lower = full.tril() + torch.full((1100, 1100), float("nan")).triu(1)
    assert torch.equal(symmetrize_(lower), full)


def test_registration_is_sound():
    for backend in ["torch"] + ["cpp"] * HAS_CPP:
        for weight in (None, torch.rand(7) > 0.5, torch.rand(7)):
            arguments = (torch.zeros(5, 5), torch.randn(7, 5), weight, torch.zeros(5), backend)
            torch.library.opcheck(torch.ops.lora_kernels.covariance_.default, arguments)


def test_compiles_without_graph_breaks():
    def accumulate(out, x, weight):
        covariance_(out, x * 2, weight)
        return out.sum()

    x, weight = torch.randn(30, 12), torch.rand(30)
    eager, compiled = torch.zeros(12, 12), torch.zeros(12, 12)
    accumulate(eager, x, weight)
    torch.compile(accumulate, fullgraph=True, backend="aot_eager")(compiled, x, weight)
    assert torch.equal(eager.tril(), compiled.tril())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_flow_through(backend):
    x, weight = torch.randn(6, 4, requires_grad=True), torch.rand(6, requires_grad=True)
    out = torch.zeros(4, 4)
    covariance_(out, x, weight, backend=backend)
    assert not out.requires_grad
    check(out, x.detach(), weight.detach())


def test_not_a_number_as_a_weight_is_not_a_mask():
    out = torch.zeros(3, 3)
    covariance_(out, torch.ones(2, 3), torch.tensor([1.0, float("nan")]))
    assert bool(out.tril().isnan().any())


def test_symmetrize_errors():
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 3\), but must be square"):
        symmetrize_(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="matrix must be a torch.Tensor, got NoneType"):
        symmetrize_(None)


def test_errors_name_the_argument():
    x, out = torch.randn(4, 3), torch.zeros(3, 3)
    cases = [
        (dict(out=torch.zeros(3, 4)), ValueError, r"out has shape \(3, 4\), but must have shape \(3, 3\)"),
        (dict(out=torch.zeros(3, 3, dtype=torch.float16)), TypeError, "out has dtype float16"),
        (dict(out=torch.zeros(3, 6)[:, ::2]), ValueError, "out has strides"),
        (dict(x=torch.ones(4, 3, dtype=torch.int64)), TypeError, "x has dtype int64"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(weight=torch.ones(5)), ValueError, r"weight has shape \(5,\), but must have shape \(4\)"),
        (dict(weight=torch.ones(4, dtype=torch.int32)), TypeError, "weight has dtype int32"),
        (dict(column_sum=torch.ones(2)), ValueError, "column_sum has shape"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda', but must be one of .auto., .triton., .cpp., .torch."),
        (dict(x=x.double(), out=out.double(), backend="cpp"), RuntimeError, "cannot run on backend 'cpp'"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            covariance_(**{"out": out, "x": x, **change})


def test_backend_choice_is_explained_and_overridable(monkeypatch):
    out, x = torch.zeros(3, 3), torch.randn(2, 3)
    dispatcher = covariance_op.covariance
    assert dispatcher.choose("auto", out, x) == ("cpp" if HAS_CPP else "torch")
    with use_backend("torch"):
        assert dispatcher.choose("auto", out, x) == "torch"
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "torch")
    assert dispatcher.choose("auto", out, x) == "torch"
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="LORA_KERNELS_BACKEND is 'fast'"):
        dispatcher.choose("auto", out, x)


def test_missing_extension_warns_once_and_uses_torch(monkeypatch):
    from lora_kernels.ops import _backend

    monkeypatch.setattr(_ext, "missing", lambda: "not built")
    _backend._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain torch backend: not built"):
        assert covariance_op.covariance.choose("auto", torch.zeros(3, 3), torch.randn(2, 3)) == "torch"
    with pytest.raises(RuntimeError, match="cpp: not built"):
        covariance_op.covariance.choose("cpp", torch.zeros(3, 3), torch.randn(2, 3))
