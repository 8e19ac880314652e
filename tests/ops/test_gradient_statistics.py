import itertools

import pytest
import torch

from lora_kernels.ops import _ext, gradient_statistics_
from lora_kernels.ops.gradient_statistics import op as gradient_op
from lora_kernels.ops.gradient_statistics import reference
from tests.helpers.accuracy import assert_accurate, rounding

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (tokens, m, n): primes, fewer tokens than a block, more than a chunk; single features; either side the narrower one.
SHAPES = [
    (0, 17, 5),
    (1, 33, 4),
    (5, 1, 1),
    (37, 50, 24),
    (100, 29, 129),
    (259, 70, 70),
    (2049, 17, 31),
    (4100, 64, 40),
]
# Weights of the gradient, and of the Fisher diagonal: "same" is the same tensor, "equal" one with the same values,
# "within" a part of the gradient's rows, "beyond" other rows too.
PAIRS = [
    ("none", "none"), ("none", "bool"), ("none", "float"), ("bool", "none"), ("bool", "same"), ("bool", "equal"),
    ("bool", "within"), ("bool", "beyond"), ("float", "same"), ("float", "none"), ("float", "within"),
    ("negative", "negative"), ("negative", "beyond"),
]  # fmt: skip


def make_weight(kind, tokens, other=None):
    return {
        "none": lambda: None,
        "bool": lambda: torch.rand(tokens) < 0.7,
        "float": lambda: torch.rand(tokens) * (torch.rand(tokens) < 0.8),
        "negative": lambda: torch.randn(tokens),
        "same": lambda: other,
        "equal": lambda: other.clone(),
        "within": lambda: torch.randn(tokens) * (other != 0) * (torch.rand(tokens) < 0.5),
        "beyond": lambda: torch.rand(tokens),
    }[kind]()


def make(tokens, height, width, g_dtype, x_dtype, pair):
    g = torch.randn(tokens, height, dtype=torch.float64).to(g_dtype)
    x = torch.randn(tokens, width, dtype=torch.float64).to(x_dtype)
    weight = make_weight(pair[0], tokens)
    return g, x, weight, make_weight(pair[1], tokens, weight)


def check(gradient, fisher, g, x, weight, fisher_weight):
    """Beside the plain products in the same dtypes, accumulated in float32."""
    w, v = (1.0 if each is None else each.float().unsqueeze(-1) for each in (weight, fisher_weight))
    left, right = g.float() * w, x.float()
    squares = g.float().square() * v
    for found, plain, truth, terms in (
        (gradient, left.mT @ right, reference.weight_gradient(g, x, weight), left.square().mT @ right.square()),
        (fisher, squares.sum(0), reference.fisher_diagonal(g, fisher_weight), squares.square().sum(0)),
    ):
        assert_accurate(found, truth, rounding(torch.float32, len(g)), plain=plain, terms=terms.sqrt())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, pair, backend, poisoned_memory):
    g, x, weight, fisher_weight = make(*shape, dtype, dtype, pair)
    gradient, fisher = torch.zeros(shape[1:]), torch.zeros(shape[1])
    gradient_statistics_(gradient, fisher, g, x, weight, fisher_weight, backend=backend)
    check(gradient, fisher, g, x, weight, fisher_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("g_dtype, x_dtype", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_dtypes_may_differ(g_dtype, x_dtype, backend):
    for pair in (("none", "none"), ("float", "same")):
        g, x, weight, fisher_weight = make(300, 40, 24, g_dtype, x_dtype, pair)
        gradient, fisher = torch.zeros(40, 24), torch.zeros(40)
        gradient_statistics_(gradient, fisher, g, x, weight, fisher_weight, backend=backend)
        check(gradient, fisher, g, x, weight, fisher_weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_one_result_alone_is_that_of_both(pair, backend):
    g, x, weight, fisher_weight = make(300, 40, 24, torch.float32, torch.float32, pair)
    gradient, fisher = torch.ones(40, 24), torch.ones(40)
    gradient_statistics_(gradient, None, g, x, weight, backend=backend)
    gradient_statistics_(None, fisher, g, fisher_weight=fisher_weight, backend=backend)
    check(gradient.double() - 1, fisher.double() - 1, g, x, weight, fisher_weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulates_over_calls_and_matches_one_call(backend):
    g, x, weight, fisher_weight = make(300, 70, 31, torch.float32, torch.float32, ("float", "beyond"))
    whole, parts = (torch.zeros(70, 31), torch.zeros(70)), (torch.zeros(70, 31), torch.zeros(70))
    gradient_statistics_(*whole, g, x, weight, fisher_weight, backend=backend)
    for part in (slice(0, 100), slice(100, 300)):
        gradient_statistics_(*parts, g[part], x[part], weight[part], fisher_weight[part], backend=backend)
    check(*whole, g, x, weight, fisher_weight)
    check(*parts, g, x, weight, fisher_weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_leading_sizes(backend):
    g, x = torch.randn(6, 11, 90), torch.randn(6, 11, 70)
    cases = {
        "strided rows": (g[..., 5:55], x[..., 3:30]),
        "transposed batch": (g[..., :50].transpose(0, 1), x.transpose(0, 1)),
        "strided columns": (g[..., ::2], x[..., 1::3]),
        "one row": (g[0, 0, :50], x[0, 0]),
        "one repeated row": (g[0, :1].expand(11, 90), x[0]),
    }
    for name, (left, right) in cases.items():
        wide = torch.zeros(left.shape[-1], right.shape[-1] + 7)
        gradient, fisher = wide[:, 2:-5], torch.zeros(left.shape[-1])
        weight, fisher_weight = torch.rand(left.shape[:-1]), torch.rand(left.shape[:-1])
        gradient_statistics_(gradient, fisher, left, right, weight, fisher_weight, backend=backend)
        rows = [each.reshape(-1, *each.shape[left.dim() - 1 :]) for each in (left, right, weight, fisher_weight)]
        check(gradient, fisher, *rows)
        assert float(wide[:, :2].abs().max()) == float(wide[:, -5:].abs().max()) == 0.0, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_may_hold_anything(dtype, kind, backend):
    """Rows that only one result leaves out must count in the other, and those that both leave out in none."""
    g, x = torch.randn(40, 20).to(dtype), torch.randn(40, 12).to(dtype)
    number = torch.arange(40)
    keeps = {"gradient": number % 3 != 0, "fisher": number % 2 != 0, "within": number % 6 == 1}
    for first, second in itertools.product(keeps.values(), repeat=2):
        dirty_g, dirty_x = g.clone(), x.clone()
        dirty_g[~(first | second)] = float("nan")
        dirty_x[~first] = float("inf")
        gradient, fisher = torch.zeros(20, 12), torch.zeros(20)
        weights = (first, second) if kind == "bool" else (first.float(), second.double())
        gradient_statistics_(gradient, fisher, dirty_g, dirty_x, *weights, backend=backend)
        check(gradient, fisher, g, x, first, second)
    # Rows of g that the gradient counts may be bad for the Fisher only.
    dirty = g.clone()
    dirty[~keeps["within"]] = float("nan")
    fisher = torch.zeros(20)
    gradient_statistics_(torch.zeros(20, 12), fisher, dirty, x, None, keeps["within"], backend=backend)
    assert_accurate(fisher, reference.fisher_diagonal(g, keeps["within"]), rounding(torch.float32, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked_changes_nothing(backend):
    nothing = torch.zeros(4, dtype=torch.bool)
    for fisher_weight in (nothing, nothing.float()):
        gradient, fisher = torch.full((9, 5), 3.0), torch.full((9,), 2.0)
        gradient_statistics_(
            gradient, fisher, torch.randn(4, 9), torch.randn(4, 5), nothing, fisher_weight, backend=backend
        )
        assert torch.equal(gradient, torch.full((9, 5), 3.0)) and torch.equal(fisher, torch.full((9,), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_features(backend):
    gradient_statistics_(torch.zeros(0, 3), torch.zeros(0), torch.zeros(4, 0), torch.ones(4, 3), backend=backend)
    fisher = torch.zeros(3)
    gradient_statistics_(torch.zeros(3, 0), fisher, torch.ones(4, 3), torch.zeros(4, 0), backend=backend)
    assert torch.equal(fisher, torch.full((3,), 4.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(dtype, backend):
    g, x, weight, fisher_weight = make(3000, 150, 90, dtype, dtype, ("float", "within"))
    results = []
    for _ in range(2):
        gradient, fisher = torch.zeros(150, 90), torch.zeros(150)
        gradient_statistics_(gradient, fisher, g, x, weight, fisher_weight, backend=backend)
        results.append((gradient, fisher))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_fisher_does_not_depend_on_the_number_of_threads():
    g, weight, before = torch.randn(3000, 75), torch.randn(3000), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fisher = torch.zeros(75)
            gradient_statistics_(None, fisher, g, fisher_weight=weight, backend="cpp")
            results.append(fisher)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_fisher_is_summed_in_more_than_float32():
    """One large square among many small ones: in float32 each of these would be lost."""
    g = torch.full((2000, 3), 1e-4)
    g[0] = 1.0
    fisher = torch.zeros(3)
    gradient_statistics_(None, fisher, g, backend="cpp")
    # Only the result is rounded: by half an eps at most.
    assert_accurate(fisher, reference.fisher_diagonal(g), torch.finfo(torch.float32).eps / 2)


def test_float64_sums():
    g, x, weight, fisher_weight = make(200, 30, 20, torch.float64, torch.float64, ("float", "beyond"))
    for left, right in ((g, x), (g.float(), x), (g.float(), x.float())):
        gradient, fisher = torch.zeros(30, 20, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
        gradient_statistics_(gradient, fisher, left, right, weight, fisher_weight)
        bound = 2 * rounding(torch.float64, 200)  # the truth is rounded, too
        assert_accurate(gradient, reference.weight_gradient(left, right, weight), bound)
        assert_accurate(fisher, reference.fisher_diagonal(left, fisher_weight), bound)


def test_registration_is_sound():
    g, x = torch.randn(7, 5), torch.randn(7, 3)
    for backend in ["torch"] + ["cpp"] * HAS_CPP:
        for weight, fisher_weight in ((None, None), (torch.rand(7) > 0.5, torch.rand(7)), (torch.rand(7), None)):
            arguments = (torch.zeros(5, 3), torch.zeros(5), g, x, weight, fisher_weight, backend)
            torch.library.opcheck(torch.ops.lora_kernels.gradient_statistics_.default, arguments)
        for arguments in (
            (None, torch.zeros(5), g, None, None, torch.rand(7), backend),
            (torch.zeros(5, 3), None, g, x, None, None, backend),
        ):
            torch.library.opcheck(torch.ops.lora_kernels.gradient_statistics_.default, arguments)


def test_compiles_without_graph_breaks():
    def accumulate(gradient, fisher, g, x, weight):
        gradient_statistics_(gradient, fisher, g * 2, x, weight, weight)
        return gradient / fisher.unsqueeze(-1)

    g, x, weight = torch.randn(30, 12), torch.randn(30, 7), torch.rand(30)
    eager, compiled = (torch.zeros(12, 7), torch.zeros(12)), (torch.zeros(12, 7), torch.zeros(12))
    first = accumulate(*eager, g, x, weight)
    second = torch.compile(accumulate, fullgraph=True, backend="aot_eager")(*compiled, g, x, weight)
    assert torch.equal(first, second) and torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_flow_through(backend):
    g, x = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    weight = torch.rand(6, requires_grad=True)
    gradient, fisher = torch.zeros(4, 3), torch.zeros(4)
    gradient_statistics_(gradient, fisher, g, x, weight, weight, backend=backend)
    assert not gradient.requires_grad and not fisher.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_as_a_weight_is_not_a_mask(backend):
    weight = torch.tensor([1.0, float("nan")])
    gradient, fisher = torch.zeros(3, 2), torch.zeros(3)
    gradient_statistics_(gradient, fisher, torch.ones(2, 3), torch.ones(2, 2), weight, weight, backend=backend)
    assert bool(gradient.isnan().all()) and bool(fisher.isnan().all())


def test_errors_name_the_argument():
    g, x, gradient, fisher = torch.randn(4, 3), torch.randn(4, 2), torch.zeros(3, 2), torch.zeros(3)
    wide = dict(g=g.double(), gradient=gradient.double(), fisher=fisher.double())
    cases = [
        (dict(gradient=None, fisher=None, x=None), ValueError, "gradient and fisher are both None"),
        (dict(x=None), ValueError, "x is None, but must be given with gradient"),
        (dict(gradient=None), ValueError, "x is given, but gradient, which it is for, is None"),
        (dict(gradient=None, x=None, weight=torch.ones(4)), ValueError, "weight is given, but gradient"),
        (dict(fisher=None, fisher_weight=torch.ones(4)), ValueError, "fisher_weight is given, but fisher"),
        (dict(gradient=torch.zeros(2, 3)), ValueError, r"gradient has shape \(2, 3\), but must have shape \(3, 2\)"),
        (dict(gradient=torch.zeros(3, 4)[:, ::2]), ValueError, "gradient has strides"),
        (dict(gradient=gradient.half()), TypeError, "gradient has dtype float16"),
        (dict(fisher=torch.zeros(2)), ValueError, "fisher has shape"),
        (dict(fisher=torch.zeros(6)[::2]), ValueError, "fisher has strides"),
        (dict(fisher=fisher.double()), TypeError, "fisher has dtype float64, but must be one of float32"),
        (dict(g=g.double()), TypeError, "gradient has dtype float32, but must be one of float64"),
        (dict(g=torch.ones(4, 3, dtype=torch.int64)), TypeError, "g has dtype int64"),
        (dict(g=[1.0]), TypeError, "g must be a torch.Tensor, got list"),
        (dict(g=torch.tensor(1.0)), ValueError, r"g has shape \(\), but must be"),
        (dict(x=torch.randn(5, 2)), ValueError, r"x has shape \(5, 2\), but must have shape \(4, \*\)"),
        (dict(weight=torch.ones(5)), ValueError, r"weight has shape \(5,\), but must have shape \(4\)"),
        (dict(fisher_weight=torch.ones(4, dtype=torch.int32)), TypeError, "fisher_weight has dtype int32"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda', but must be one of .auto., .triton., .cpp., .torch."),
        (dict(**wide, backend="cpp"), RuntimeError, "cannot run on backend 'cpp'"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            gradient_statistics_(**{"gradient": gradient, "fisher": fisher, "g": g, "x": x, **change})


def test_backend_choice_is_explained():
    gradient, fisher, g, x = torch.zeros(3, 2), torch.zeros(3), torch.randn(4, 3), torch.randn(4, 2)
    assert gradient_op.gradient_statistics.choose("auto", gradient, fisher, g, x) == ("cpp" if HAS_CPP else "torch")
    wide = gradient_op.gradient_statistics.explain(None, fisher.double(), g, None)
    assert "takes no float64" in (wide["cpp"] or "") or not HAS_CPP
    assert wide["torch"] is None
