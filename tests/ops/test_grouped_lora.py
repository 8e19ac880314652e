"""The low-rank part of many experts against float64, in autograd, under tracing and in compiled graphs."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops import Dropout, _ext, grouped_lora, lora_delta
from lora_kernels.ops._philox import keep_mask
from lora_kernels.ops.grouped_lora import op, passes, reference
from tests.helpers.accuracy import assert_accurate, rounding

HAS_CPP = hasattr(_ext.load()[0], "grouped_lora_forward")
NEEDS_CPP = pytest.mark.skipif(not HAS_CPP, reason="kernels not built")
BACKENDS = ["torch", pytest.param("cpp", marks=NEEDS_CPP)]
DROPOUTS = [None, Dropout(0.3, 2**64 - 12345, 7)]
# Offsets, rows, inputs, outputs, rank: no rows, experts without rows, rows of no expert, one expert with all.
SHAPES = [
    ([0, 0, 0], 0, 8, 5, 2),
    ([0, 1], 1, 33, 17, 1),
    ([0, 5, 5, 5, 12], 12, 16, 9, 3),
    ([0, 0, 37, 40], 50, 50, 33, 5),
    ([0, 0, 0], 7, 24, 40, 4),
    ([0, 300, 300, 301, 301], 301, 96, 64, 64),
    ([0, *range(7, 260, 9), 260], 263, 129, 200, 20),
    ([0], 4, 6, 7, 2),
]


def make(offsets, rows, inputs, outputs, rank, dtype=torch.float32, adapters=None):
    """y, x, A and B as leaves, and the offsets."""
    experts = len(offsets) - 1
    shapes = ((rows, outputs), (rows, inputs), (experts, rank, inputs), (experts, outputs, rank))
    kinds = (dtype, dtype, adapters or dtype, adapters or dtype)
    draws = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    leaves = [draw.to(kind).requires_grad_() for draw, kind in zip(draws, kinds, strict=True)]
    return leaves, torch.tensor(offsets)


def differentiate(function, leaves, offsets, grad, dtype=None):
    """The output and the gradients, in a dtype."""
    y, x, a, b = leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out = function(y, x, offsets, a, b)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype), materialize_grads=True)]


def check_all(leaves, offsets, dropout, backend, scaling=0.7):
    """Output and gradients: at most twice the error of plain torch; half-scaled ones fail."""
    y, x, a, b = leaves
    grad = torch.randn(y.shape).to(x.dtype)
    run = lambda *args: grouped_lora(*args, scaling=scaling, dropout=dropout, backend=backend)  # noqa: E731
    plain = lambda *args: reference.grouped_lora(*args, scaling=scaling, dropout=dropout)  # noqa: E731
    found = differentiate(run, leaves, offsets, grad)
    truth = differentiate(plain, leaves, offsets, grad, torch.float64)
    own = differentiate(plain, leaves, offsets, grad, x.dtype)
    sums = differentiate(plain, [leaf.abs() for leaf in leaves], offsets, grad.abs(), torch.float64)
    lengths = (x.shape[1], 1, b.shape[1], x.shape[0], x.shape[0])
    for name, one, exact, torchs, like, length, total in zip(
        ("out", "y", "x", "a", "b"), found, truth, own, (x, *leaves), lengths, sums, strict=True
    ):
        assert one.shape == exact.shape and one.dtype == like.dtype, name
        bar = rounding(torch.float32, length)
        assert_accurate(one, exact, bar, plain=torchs, terms=total / max(length, 1) ** 0.5, what=name)
    # Gradients are of the factors alone.
    if not (scaling and x.shape[0] and dropout is None):
        return
    rest = differentiate(run, [y.detach() * 0, x, a, b], offsets, grad)
    delta = truth[0] - y.detach().double()
    terms = sums[0] - y.detach().double().abs()
    assert_accurate(rest[0], delta, rounding(torch.float32, lengths[0], x.dtype), own[0] - y.detach(), terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dropout, backend, poisoned_memory):
    check_all(*make(*shape), dropout, backend)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_triton_in_the_interpreter(shape, dropout, poisoned_memory):
    pytest.importorskip("triton")
    check_all(*make(*shape), dropout, "triton")


@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype, dropout, adapters):
    check_all(*make([0, 20, 20, 41, 60], 60, 48, 30, 8, dtype, adapters), dropout, "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("shape", [*SHAPES, ([0, *range(3, 1000, 11), 1000], 1024, 512, 256, 16)], ids=str)
def test_gpu_like_cpu(shape, dropout, dtype):
    """The same mask on both, and float64's answer; offsets of either width."""
    leaves, offsets = make(*shape, dtype)
    plain = lambda *args: reference.grouped_lora(*args, scaling=0.5, dropout=dropout)  # noqa: E731
    grad = torch.randn(leaves[0].shape).to(dtype)
    truth = differentiate(plain, leaves, offsets, grad, torch.float64)
    scale = differentiate(plain, [leaf.abs() for leaf in leaves], offsets, grad.abs(), torch.float64)
    run = lambda *args: grouped_lora(*args, scaling=0.5, dropout=dropout)  # noqa: E731
    for kind in (torch.int32, torch.int64):
        found = differentiate(run, [leaf.detach().cuda() for leaf in leaves], offsets.to("cuda", kind), grad.cuda())
        for one, exact, terms in zip(found, truth, scale, strict=True):
            bar = {torch.float32: 2e-4, torch.float16: 2e-3}.get(dtype, 1e-2)
            assert_accurate(one.cpu(), exact, bar, terms=terms / shape[2] ** 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_one_expert_is_a_linear_layer(dropout, backend):
    (y, x, a, b), offsets = make([0, 40], 40, 30, 20, 4)
    found = grouped_lora(y, x, offsets, a, b, scaling=0.5, dropout=dropout, backend=backend)
    expected = lora_delta(y, x, a[0], b[0], scaling=0.5, dropout=dropout, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_the_mask_is_that_of_the_rows_of_x(backend):
    """Products with ones and unit vectors show the mask itself, whatever the experts."""
    dropout, offsets = Dropout(0.4, 123456789012345, 3), torch.tensor([0, 7, 7, 19, 30])
    expected = keep_mask(30, 24, p=0.4, seed=dropout.seed, stream=3).float()
    eye = torch.eye(24).expand(4, 24, 24)
    x = torch.ones(30, 24, requires_grad=True)
    out = grouped_lora(torch.zeros(30, 24), x, offsets, eye, eye, scaling=1.0, dropout=dropout, backend=backend)
    assert torch.equal((out != 0).float(), expected)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal((dx != 0).float(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_nothing_but_the_call(dtype, backend):
    leaves, offsets = make([0, 0, 700, 712, 712, 900], 1000, 260, 190, 24, dtype)
    grad = torch.randn(1000, 190).to(dtype)
    run = lambda *args: grouped_lora(*args, scaling=0.7, dropout=DROPOUTS[1], backend=backend)  # noqa: E731
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5) if backend == "cpp" else (1, 1):
            torch.set_num_threads(number)
            results.append(differentiate(run, leaves, offsets, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    (y, x, a, b), offsets = make([0, 9, 30], 30, 24, 16, 4)
    expected = grouped_lora(y, x, offsets, a, b, scaling=0.5, backend=backend)
    wide = torch.randn(30, 60)
    wide[:, 5:29] = x.detach()
    # The layout of PEFT's factors: A by expert, B with the expert as its fastest index.
    packed = b.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for other in (wide[:, 5:29], x.detach().mT.contiguous().mT):
        found = grouped_lora(y.mT.contiguous().mT, other, offsets.int(), a, packed, scaling=0.5, backend=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    leaves, offsets = make([0, 2, 2, 5], 6, 7, 5, 3, torch.float64)
    for dropout in DROPOUTS:
        run = lambda y, x, a, b: grouped_lora(y, x, offsets, a, b, scaling=0.7, dropout=dropout)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, leaves)


def test_only_what_is_needed():
    (y, x, a, b), offsets = make([0, 3, 8], 9, 6, 5, 2)
    whole = torch.autograd.grad(grouped_lora(y, x, offsets, a, b, scaling=1.0).square().sum(), (y, x, a, b))
    for number, leaf in enumerate((y, x, a, b)):
        args = [other if other is leaf else other.detach() for other in (y, x, a, b)]
        out = grouped_lora(*args[:2], offsets, *args[2:], scaling=1.0)
        assert torch.equal(torch.autograd.grad(out.square().sum(), leaf)[0], whole[number])


def test_second_derivatives_are_refused():
    (y, x, a, b), offsets = make([0, 3, 8], 9, 6, 5, 2)
    loss = lambda x: grouped_lora(y, x, offsets, a, b, scaling=1.0).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="twice.*reference_mode"):
        torch.autograd.grad(loss(x), a, create_graph=True)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="torch.func transforms.*reference_mode"):
            transform(loss)(x.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_is_sound(backend):
    (y, x, a, b), offsets = make([0, 2, 2, 5], 6, 7, 5, 3)
    y, x, a, b, seed = y.detach(), x.detach(), a.detach(), b.detach(), torch.tensor([4])
    ops = torch.ops.lora_kernels
    for drop in ((None, 0.5, 0, 0), (seed, 0.5, 20000, 3)):
        torch.library.opcheck(ops.grouped_lora.default, (y, x, offsets, a, b, *drop, backend))
        t = ops.grouped_lora.default(y, x, offsets, a, b, *drop, backend)[1]
        for source, low, need_x in ((x, t, True), (None, t, True), (x, None, False)):
            args = (torch.randn(6, 5), source, low, offsets, a, b, *drop, backend, need_x)
            torch.library.opcheck(ops.grouped_lora_backward.default, args)


def test_compiles_for_any_number_of_rows():
    a, b = torch.randn(3, 4, 12, requires_grad=True), torch.randn(3, 9, 4, requires_grad=True)

    def step(function, x, offsets):
        x = x.detach().requires_grad_()
        torch.manual_seed(3)
        out = function(x, offsets)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, a, b))]

    def layer(x, offsets):
        y = x[:, :9].tanh()
        return grouped_lora(y, x, offsets, a, b, scaling=0.5, dropout=Dropout.draw(0.4)).tanh()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for offsets in ([0, 3, 3, 8], [0, 0, 9, 20], [0, 5, 11, 17]):
        x, offsets = torch.randn(offsets[-1], 12), torch.tensor(offsets)
        for one, two in zip(step(compiled, x, offsets), step(layer, x, offsets), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    x, offsets = torch.randn(11, 12), torch.tensor([0, 3, 3, 8])
    recomputed = lambda x, offsets: checkpoint(layer, x, offsets, use_reentrant=False)  # noqa: E731
    assert all(torch.equal(*pair) for pair in zip(step(recomputed, x, offsets), step(layer, x, offsets), strict=True))
    meta = [torch.empty(size, device="meta") for size in ((6, 5), (6, 8), (2, 3, 8), (2, 5, 3))]
    found = grouped_lora(*meta[:2], torch.empty(3, dtype=torch.int64, device="meta"), *meta[2:], scaling=1.0)
    assert found.shape == (6, 5)


def test_autocast_and_dtypes_of_y():
    (y, x, a, b), offsets = make([0, 3, 8], 9, 6, 5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = grouped_lora(y, x, offsets, a, b, scaling=1.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, grouped_lora(y, x.bfloat16(), offsets, a, b, scaling=1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_entries_and_rows_of_no_expert_may_hold_anything(backend):
    (y, x, a, b), offsets = make([0, 3, 8], 12, 30, 5, 2)
    dropout = Dropout(0.5, 1)
    keep = keep_mask(12, 30, p=0.5, seed=1)
    dirty = torch.where(keep, x.detach(), float("nan"))
    dirty[8:] = float("nan")
    run = lambda x: differentiate(  # noqa: E731
        lambda *args: grouped_lora(*args, scaling=0.5, dropout=dropout, backend=backend),
        (y, x, a, b), offsets, torch.ones(12, 5),
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(run(dirty), run(x), strict=True))


def test_errors_name_the_argument():
    (y, x, a, b), offsets = make([0, 3, 8], 9, 6, 5, 2)
    cases = [
        ((y, x[0], offsets, a, b), ValueError, r"x has shape \(6,\)"),
        ((y, x, offsets, a[0], b), ValueError, "a has shape"),
        ((y, x, offsets, a, b[:1]), ValueError, r"b has shape \(1, 5, 2\), but must have shape \(2, \*, 2\)"),
        ((y[:3], x, offsets, a, b), ValueError, "y has shape"),
        ((y, x, offsets[:2], a, b), ValueError, r"offsets has shape \(2,\), but must have shape \(3\)"),
        ((y, x, offsets.float(), a, b), TypeError, "offsets has dtype float32"),
        ((y, x, torch.tensor([1, 3, 8]), a, b), ValueError, "offsets must begin with 0"),
        ((y, x, torch.tensor([0, 4, 3]), a, b), ValueError, "offsets must begin with 0"),
        ((y, x, torch.tensor([0, 4, 10]), a, b), ValueError, "or before"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            grouped_lora(*args, scaling=1.0)
    with pytest.raises(TypeError, match="scaling must be a number"):
        grouped_lora(y, x, offsets, a, b, scaling="1")
    with pytest.raises(RuntimeError, match="cpp: takes no torch.float16"):
        grouped_lora(y, x.half(), offsets, a, b, scaling=1.0, backend="cpp")
    with pytest.raises(ValueError, match="offsets must begin with 0"):
        torch.ops.lora_kernels.grouped_lora(y, x, torch.tensor([0, 4, 10]), a, b, None, 1.0, 0, 0, "torch")


def test_products_that_nobody_else_has_are_added_to_in_place():
    """The same bits, in y's own memory; not where y is a view, or a leaf that is trained."""
    x, offsets = torch.randn(30, 12), torch.tensor([0, 10, 10, 25])
    a, b = torch.randn(3, 4, 12).requires_grad_(), torch.randn(3, 8, 4).requires_grad_()
    scalars = passes.Scalars(0.5, 0, 0, op.experts.choose("auto", x))
    weight = torch.randn(12, 8).requires_grad_()
    gradients = []
    for in_place in (False, True):
        y = x @ weight
        address = y.data_ptr()
        out = op.run(y, x, offsets, a, b, None, None, scalars, in_place)
        assert (out.data_ptr() == address) == in_place
        gradients.append([out.detach(), *torch.autograd.grad(out.square().sum(), (weight, a, b))])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    for y in (torch.randn(30, 8).requires_grad_(), torch.randn(1, 30, 8)[0]):
        before = y.detach().clone()
        op.run(y, x, offsets, a, b, None, None, scalars, True).sum().backward()
        assert torch.equal(y.detach(), before)
    y = x @ weight
    kept = y.sin()  # whose backward needs y as it was
    op.run(y, x, offsets, a, b, None, None, scalars, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
