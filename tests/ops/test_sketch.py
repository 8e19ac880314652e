import itertools

import pytest
import torch

from lora_kernels.ops import _ext, project, random_matrix, sketch_
from lora_kernels.ops.sketch import op as sketch_op
from lora_kernels.ops.sketch import reference
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["rademacher", "gaussian"]
# (tokens, p, q, k): primes, fewer tokens than a block, more than a chunk; single features; k beyond a block of Philox
# counters, beyond the features, and 1.
SHAPES = [
    (0, 17, 5, 3),
    (1, 33, 4, 7),
    (5, 1, 1, 1),
    (37, 50, 24, 24),
    (100, 29, 129, 131),
    (259, 70, 70, 4),
    (2049, 17, 31, 64),
    (4100, 64, 40, 16),
]


def make_weight(kind, tokens):
    return {
        "none": lambda: None,
        "bool": lambda: torch.rand(tokens) < 0.7,
        "dense": lambda: torch.rand(tokens) + 0.1,
        "sparse": lambda: torch.randn(tokens) * (torch.rand(tokens) < 0.6),
        "double": lambda: torch.rand(tokens, dtype=torch.float64) * (torch.rand(tokens) < 0.8),
    }[kind]()


def make(tokens, height, width, same, left_dtype, right_dtype):
    left = torch.randn(tokens, height, dtype=torch.float64).to(left_dtype)
    return left, left if same else torch.randn(tokens, width, dtype=torch.float64).to(right_dtype)


def draws(kind, dtype):
    """Error of Omega: normal float32 draws are right to 1e-6, as tests/ops/test_random_matrix.py shows."""
    return 1e-6 if kind == "gaussian" and dtype == torch.float32 else 0.0


def check(out, total, left, right, weight, *, kind="rademacher", seed, stream=0):
    """Beside the plain products in the same dtypes: sums over tokens of sums over columns."""
    left, right = (each.reshape(-1, each.shape[-1]) for each in (left, right))
    weight = None if weight is None else weight.reshape(-1)
    dtype = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
    factor = 1.0 if weight is None else weight.to(dtype).unsqueeze(-1)
    key = {"kind": kind, "seed": seed, "stream": stream}
    truth, total_truth = reference.sketch(left, right, out.shape[1], weight, **key)
    omega = random_matrix(right.shape[1], out.shape[1], **key, dtype=dtype, backend="torch")
    rows, weighted = right.to(dtype) @ omega * factor, left.to(dtype) * factor
    tokens = (1 + (dtype == torch.float64)) * rounding(dtype, len(left))  # in float64 the truth is rounded, too
    bound = tokens + rounding(dtype, right.shape[1]) + draws(kind, dtype)
    plain, terms = left.to(dtype).mT @ rows, left.to(dtype).square().mT @ rows.square()
    assert_accurate(out, truth, bound, plain=plain, terms=terms.sqrt())
    if total is not None:
        assert_accurate(total, total_truth, tokens, plain=weighted.sum(0), terms=weighted.square().sum(0).sqrt())


def check_projection(found, a, **key):
    """Sums over the columns of `a`."""
    columns = a.shape[-1]
    bound = rounding(found.dtype, columns) + draws(key.get("kind"), found.dtype)
    terms = a.double().norm(dim=-1, keepdim=True).expand(found.shape)
    truth = reference.project(a, found.shape[-1], **key)
    assert_accurate(found, truth, (1 + (found.dtype == torch.float64)) * bound, terms=terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["none", "bool", "dense", "sparse", "double"])
@pytest.mark.parametrize("same", [True, False], ids=["same", "different"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sketch_matches_float64(shape, dtype, kind, same, weighting, backend, poisoned_memory):
    tokens, height, width, k = shape
    left, right = make(tokens, height, width, same, dtype, dtype)
    weight = make_weight(weighting, tokens)
    out, total = torch.zeros(height, k), torch.zeros(height)
    sketch_(out, left, right, weight, seed=5, stream=2, kind=kind, column_sum=total, backend=backend)
    check(out, total, left, right, weight, kind=kind, seed=5, stream=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_projection_matches_float64(dtype, kind, backend, poisoned_memory):
    if dtype == torch.float64 and backend == "cpp":
        return
    for tokens, _, width, k in SHAPES:
        a = torch.randn(tokens, width, dtype=torch.float64).to(dtype)
        found = project(a, k, seed=5, stream=2, kind=kind, backend=backend)
        assert found.shape == (tokens, k)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check_projection(found, a, seed=5, stream=2, kind=kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_dtype, right_dtype", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_dtypes_may_differ(left_dtype, right_dtype, backend):
    left, right = make(300, 40, 24, False, left_dtype, right_dtype)
    for weighting in ("none", "sparse"):
        weight = make_weight(weighting, 300)
        out, total = torch.zeros(40, 10), torch.zeros(40)
        sketch_(out, left, right, weight, seed=1, column_sum=total, backend=backend)
        check(out, total, left, right, weight, seed=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_omega_is_the_random_matrix(kind, backend):
    """Of the same key; products with the identity are exact."""
    for key in ({"seed": 0}, {"seed": -7, "stream": 2**32 - 1}, {"seed": 2**64 - 1, "stream": 3}):
        omega = random_matrix(70, 33, kind=kind, **key, backend=backend)
        assert torch.equal(project(torch.eye(70), 33, kind=kind, **key, backend=backend), omega)
        out = torch.zeros(70, 33)
        sketch_(out, torch.eye(70), torch.eye(70), kind=kind, **key, backend=backend)
        assert torch.equal(out, omega)


def test_signs_are_the_default():
    assert torch.equal(project(torch.eye(9), 5, seed=3).abs(), torch.ones(9, 5))
    out = torch.zeros(9, 5)
    sketch_(out, torch.eye(9), torch.eye(9), seed=3)
    assert torch.equal(out, project(torch.eye(9), 5, seed=3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_matter_and_a_wider_sketch_has_the_narrower_as_its_corner(kind, backend):
    a = torch.randn(20, 30)
    first = project(a, 8, seed=1, stream=1, kind=kind, backend=backend)
    for other in ({"seed": 2, "stream": 1}, {"seed": 1, "stream": 2}, {"seed": 1 + 2**32, "stream": 1}, {"seed": 1}):
        assert relative_error(project(a, 8, **other, kind=kind, backend=backend), first) > 0.5
    unsigned = project(a, 8, seed=2**64 - 5, kind=kind, backend=backend)
    assert torch.equal(project(a, 8, seed=-5, kind=kind, backend=backend), unsigned)
    wide = project(a, 200, seed=1, stream=1, kind=kind, backend=backend)
    assert_accurate(wide[:, :8], first, 2 * rounding(torch.float32, 30))  # both are rounded


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_add_up_to_one_call(kind, backend):
    left, right, weight = torch.randn(300, 70), torch.randn(300, 31), torch.randn(300)
    whole, parts = (torch.zeros(70, 9), torch.zeros(70)), (torch.zeros(70, 9), torch.zeros(70))
    key = {"seed": 4, "stream": 1, "kind": kind, "backend": backend}
    sketch_(whole[0], left, right, weight, **key, column_sum=whole[1])
    for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
        sketch_(parts[0], left[part], right[part], weight[part], **key, column_sum=parts[1])
    for out, total in (whole, parts):
        check(out, total, left, right, weight, seed=4, stream=1, kind=kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sketch_of_a_second_moment_and_of_a_gradient(backend):
    """What it is for: products with Omega of matrices that are never formed."""
    g, x, weight = torch.randn(90, 20), torch.randn(90, 12), torch.rand(90)
    key = {"seed": 8, "stream": 3}
    weighted = x.double() * weight.double().unsqueeze(-1)
    for left, right, matrix in (
        (x, x, x.double().mT @ weighted),
        (g, x, g.double().mT @ weighted),
        (x, g, weighted.mT @ g.double()),
    ):
        out = torch.zeros(left.shape[1], 6)
        sketch_(out, left, right, weight, **key, backend=backend)
        omega = random_matrix(right.shape[1], 6, **key, dtype=torch.float64, backend="torch")
        assert_accurate(out, matrix @ omega, rounding(torch.float32, 90) + rounding(torch.float32, 20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_twice_is_that_of_two_equal_ones(backend):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 75, 40).to(dtype)[..., 3:30]
        for weighting in ("none", "bool", "sparse"):
            weight = make_weight(weighting, 300)
            weight = None if weight is None else weight.reshape(4, 75)
            outs = [torch.zeros(27, 5) for _ in range(3)]
            for out, right in zip(outs, (x, x.view_as(x), x.clone()), strict=True):
                sketch_(out, x, right, weight, seed=0, backend=backend)
            assert torch.equal(outs[0], outs[1])
            for out in (outs[0], outs[2]):
                check(out, None, x, x, weight, seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_storage_are_not_one_tensor(backend):
    """Same address, yet another shape, stride or dtype."""
    wide = torch.randn(40, 12)
    for left, right in ((wide[:, :6], wide), (wide[:20, :6], wide[::2, :6]), (wide[:12], wide[:12, :12].mT)):
        out = torch.zeros(left.shape[1], 4)
        sketch_(out, left, right, seed=0, backend=backend)
        check(out, None, left, right, None, seed=0)


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
        wide, total = torch.zeros(left.shape[-1], 20), torch.zeros(left.shape[-1])
        out, weight = wide[:, 2:-5], torch.rand(left.shape[:-1])
        sketch_(out, left, right, weight, seed=6, column_sum=total, backend=backend)
        check(out, total, left, right, weight, seed=6)
        assert float(wide[:, :2].abs().max()) == float(wide[:, -5:].abs().max()) == 0.0, name
        found = project(right, 13, seed=6, backend=backend)
        assert found.shape == (*right.shape[:-1], 13), name
        check_projection(found, right, seed=6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_may_hold_anything(dtype, weighting, backend):
    left, right = make(2100, 20, 12, False, dtype, dtype)
    keep = torch.arange(2100) % 3 != 0
    weight = keep if weighting == "bool" else keep.float()
    dirty_left, dirty_right = left.clone(), right.clone()
    dirty_left[~keep], dirty_right[~keep] = float("nan"), float("inf")
    for one, two, clean_one, clean_two in (
        (dirty_left, dirty_right, left, right),
        (dirty_left, dirty_left, left, left),
    ):
        out, total = torch.zeros(20, 7), torch.zeros(20)
        sketch_(out, one, two, weight, seed=2, column_sum=total, backend=backend)
        check(out, total, clean_one, clean_two, keep, seed=2)
        # The definition holds to it as well.
        truths = [reference.sketch(*each, 7, weight, seed=2)[0] for each in ((one, two), (clean_one, clean_two))]
        assert torch.equal(*truths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_masked_changes_nothing(backend):
    for weight in (torch.zeros(4, dtype=torch.bool), torch.zeros(4)):
        out, total = torch.full((9, 5), 3.0), torch.full((9,), 2.0)
        left, right = torch.full((4, 9), float("nan")), torch.randn(4, 5)
        sketch_(out, left, right, weight, seed=0, column_sum=total, backend=backend)
        assert torch.equal(out, torch.full((9, 5), 3.0)) and torch.equal(total, torch.full((9,), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_multiply_leaves_the_sum(backend):
    for width, k in ((0, 3), (5, 0), (0, 0)):
        out, total = torch.full((3, k), 7.0), torch.zeros(3)
        sketch_(out, torch.ones(4, 3), torch.zeros(4, width), seed=0, column_sum=total, backend=backend)
        assert torch.equal(out, torch.full((3, k), 7.0)) and torch.equal(total, torch.full((3,), 4.0))
    sketch_(torch.zeros(0, 3), torch.zeros(4, 0), torch.ones(4, 5), seed=0, backend=backend)
    for a, k in ((torch.zeros(4, 0), 3), (torch.zeros(4, 5), 0), (torch.zeros(0, 5), 3), (torch.zeros(2, 0, 5), 3)):
        assert torch.equal(project(a, k, seed=0, backend=backend), torch.zeros(*a.shape[:-1], k))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(dtype, kind, backend):
    left, right = make(3000, 150, 90, False, dtype, dtype)
    weight, results = make_weight("sparse", 3000), []
    for _ in range(2):
        out, total = torch.zeros(150, 40), torch.zeros(150)
        sketch_(out, left, right, weight, seed=1, kind=kind, column_sum=total, backend=backend)
        results.append((out, total, project(right, 40, seed=1, kind=kind, backend=backend)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_float64():
    left, right = make(200, 30, 20, False, torch.float64, torch.float64)
    for kind, weighting in itertools.product(KINDS, ("none", "bool", "sparse")):
        weight = make_weight(weighting, 200)
        out, total = torch.zeros(30, 9, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
        sketch_(out, left, right, weight, seed=3, kind=kind, column_sum=total)
        check(out, total, left, right, weight, seed=3, kind=kind)


def test_registration_is_sound():
    left, right = torch.randn(7, 5), torch.randn(7, 3)
    for backend in ["torch"] + ["cpp"] * HAS_CPP:
        for weight, total, two, kind in (
            (None, None, right, "gaussian"),
            (torch.rand(7) > 0.5, torch.zeros(5), right, "rademacher"),
            (torch.rand(7), None, left, "rademacher"),
        ):
            arguments = (torch.zeros(5, 4), left, two, weight, total, kind, 3, 1, backend)
            torch.library.opcheck(torch.ops.lora_kernels.sketch_.default, arguments)
        for a in (right, left.reshape(7, 5, 1).half(), left[0], left[:0]):
            arguments = (torch.empty(*a.shape[:-1], 4), a, "gaussian", 3, 1, backend)
            torch.library.opcheck(torch.ops.lora_kernels.project.default, arguments)
    arguments = (torch.empty(7, 4, dtype=torch.float64), left.double(), "rademacher", 3, 1, "torch")
    torch.library.opcheck(torch.ops.lora_kernels.project.default, arguments)


def test_compiles_without_graph_breaks():
    def accumulate(out, total, x, weight):
        sketch_(out, x * 2, x, weight, seed=3, column_sum=total)
        sketch_(out, x, x, seed=3)
        return project(x, 3, seed=1) + 1

    x, weight = torch.randn(30, 12), torch.rand(30)
    eager, compiled = (torch.zeros(12, 7), torch.zeros(12)), (torch.zeros(12, 7), torch.zeros(12))
    first = accumulate(*eager, x, weight)
    second = torch.compile(accumulate, fullgraph=True, backend="aot_eager")(*compiled, x, weight)
    assert torch.equal(first, second) and torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_flow_through(backend):
    left, right = torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    weight, out, total = torch.rand(6, requires_grad=True), torch.zeros(4, 2), torch.zeros(4)
    sketch_(out, left, right, weight, seed=0, column_sum=total, backend=backend)
    assert not out.requires_grad and not total.requires_grad
    assert not project(left, 2, seed=0, backend=backend).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_as_a_weight_is_not_a_mask(backend):
    weight, out, total = torch.tensor([1.0, float("nan")]), torch.zeros(3, 2), torch.zeros(3)
    sketch_(out, torch.ones(2, 3), torch.ones(2, 1), weight, seed=0, column_sum=total, backend=backend)
    assert bool(out.isnan().all()) and bool(total.isnan().all())


def test_errors_name_the_argument():
    good = {"out": torch.zeros(3, 5), "left": torch.randn(4, 3), "right": torch.randn(4, 2), "seed": 0}
    wide = {name: good[name].double() for name in ("out", "left", "right")}
    cases = [
        (dict(left=[1.0]), TypeError, "left must be a torch.Tensor, got list"),
        (dict(left=torch.tensor(1.0)), ValueError, r"left has shape \(\), but must be \(..., p\)"),
        (dict(left=torch.ones(4, 3, dtype=torch.int64)), TypeError, "left has dtype int64"),
        (dict(right=torch.randn(5, 2)), ValueError, r"right has shape \(5, 2\), but must have shape \(4, \*\)"),
        (dict(right=torch.randn(4, 2, dtype=torch.float64)), TypeError, "right has dtype float64"),
        (dict(right=torch.tensor(1.0)), ValueError, r"right has shape \(\)"),
        (dict(left=wide["left"]), TypeError, "right has dtype float32, but must be one of float64"),
        (dict(out=torch.zeros(2, 5)), ValueError, r"out has shape \(2, 5\), but must have shape \(3, \*\)"),
        (dict(out=torch.zeros(3)), ValueError, "out has shape"),
        (dict(out=torch.zeros(3, 10)[:, ::2]), ValueError, "out has strides"),
        (dict(out=torch.zeros(3, 5).half()), TypeError, "out has dtype float16"),
        (dict(weight=torch.ones(5)), ValueError, r"weight has shape \(5,\), but must have shape \(4\)"),
        (dict(weight=torch.ones(4, dtype=torch.int32)), TypeError, "weight has dtype int32"),
        (dict(column_sum=torch.zeros(2)), ValueError, "column_sum has shape"),
        (dict(column_sum=torch.zeros(6)[::2]), ValueError, "column_sum has strides"),
        (dict(column_sum=torch.zeros(3).double()), TypeError, "column_sum has dtype float64"),
        (dict(kind="uniform"), ValueError, "kind is 'uniform', but must be one of 'rademacher', 'gaussian'"),
        (dict(seed=2**64), ValueError, "seed is 18446744073709551616"),
        (dict(seed=1.0), TypeError, "seed must be an int, got float"),
        (dict(stream=-1), ValueError, "stream is -1"),
        (dict(stream=2**32), ValueError, "stream is 4294967296"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda', but must be one of .auto., .triton., .cpp., .torch."),
        (dict(**wide, backend="cpp"), RuntimeError, "sketch_ cannot run on backend 'cpp'"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            sketch_(**{**good, **change})
    fine = {"a": torch.randn(4, 3), "k": 2, "seed": 0}
    for change, kind, message in (
        (dict(a=1), TypeError, "a must be a torch.Tensor"),
        (dict(a=torch.tensor(1.0)), ValueError, r"a has shape \(\), but must be \(..., q\)"),
        (dict(a=torch.ones(4, 3, dtype=torch.int64)), TypeError, "a has dtype int64"),
        (dict(k=-1), ValueError, "k is -1, but must be >= 0"),
        (dict(k=2.0), TypeError, "k must be an int"),
        (dict(kind=""), ValueError, "kind is ''"),
        (dict(seed=True), TypeError, "seed must be an int, got bool"),
        (dict(stream=2**32), ValueError, "stream is"),
        (dict(backend="c"), ValueError, "backend is 'c'"),
        (dict(a=torch.randn(4, 3).double(), backend="cpp"), RuntimeError, "project cannot run on backend 'cpp'"),
    ):
        with pytest.raises(kind, match=message):
            project(**{**fine, **change})


def test_backend_choice_is_explained():
    x = torch.randn(4, 3)
    for dispatcher in (sketch_op.sketch, sketch_op.projection):
        assert dispatcher.choose("auto", x) == ("cpp" if HAS_CPP else "torch")
        assert dispatcher.choose("auto", x.double()) == "torch"
        wide = dispatcher.explain(x.double())
        assert "takes no float64" in (wide["cpp"] or "") or not HAS_CPP
        assert wide["torch"] is None
