import functools

import pytest
import torch

from lora_kernels.ops import Dropout, _ext, lora_delta, lora_linear
from lora_kernels.ops.lora_linear import op, reference
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

HAS_CPP = hasattr(_ext.load()[0], "lora_shrink")
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="kernels not built"))]
DROPPED = Dropout(0.3, 2**64 - 12345, 7)
DROPOUTS = [None, DROPPED]
NAMES = ("x", "weight", "bias", "a", "b")
# Leading sizes, inputs, outputs, rank.
SHAPES = [
    ((0,), 8, 5, 2),
    ((1,), 33, 17, 1),
    ((), 16, 9, 3),
    ((5, 7), 50, 33, 5),
    ((3, 4, 5), 96, 64, 64),
    ((130,), 40, 70, 20),
]


def make(leading, features, outputs, rank, dtype=torch.float32, adapters=None):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    tensors = [
        draw(*leading, features),
        draw(outputs, features),
        draw(outputs),
        draw(rank, features),
        draw(outputs, rank),
    ]
    kinds = [dtype] * 3 + [adapters or dtype] * 2
    return [each.to(kind).requires_grad_() for each, kind in zip(tensors, kinds, strict=True)]


def make_extra(features, outputs, scaling, rank=3, dtype=torch.float32):
    return torch.randn(rank, features).to(dtype), torch.randn(outputs, rank).to(dtype), scaling


def differentiate(function, tensors, grad, dtype=None):
    """The output and the gradients, in a dtype."""
    leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def widened(extra, dtype):
    return None if extra is None else (extra[0].to(dtype), extra[1].to(dtype), extra[2])


def named(function, names, **settings):
    """A function of the tensors of these names; without a bias if it is not among them."""
    return lambda *each: function(**{"bias": None, **dict(zip(names, each, strict=True))}, **settings)


def magnitudes(tensors, dropout, extra, scaling, grad, names):
    """The sums of the magnitudes of all terms, of the output and of each gradient; the sums themselves may cancel."""
    leaves = [tensor.detach().double().abs() for tensor in tensors]
    pair = None if extra is None else (extra[0].double().abs(), extra[1].double().abs(), abs(extra[2]))
    run = named(reference.lora_linear, names, scaling=abs(scaling), dropout=dropout, extra=pair)
    return differentiate(run, leaves, grad.double().abs(), torch.float64)


def check_all(tensors, dropout, extra, backend, scaling=0.7):
    """Output and all gradients: at most twice the error of plain torch; half-scaled ones fail."""
    x, weight = tensors[:2]
    grad = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    run = named(lora_linear, NAMES, scaling=scaling, dropout=dropout, extra=extra, backend=backend)

    def plain(dtype):
        return named(reference.lora_linear, NAMES, scaling=scaling, dropout=dropout, extra=widened(extra, dtype))

    found = differentiate(run, tensors, grad)
    truth = differentiate(plain(torch.float64), tensors, grad, torch.float64)
    own = differentiate(plain(x.dtype), tensors, grad, x.dtype)
    tokens = x.shape[:-1].numel()
    lengths = (x.shape[-1], weight.shape[0], *[tokens] * (len(NAMES) - 1))
    sums = magnitudes(tensors, dropout, extra, scaling, grad, NAMES)
    for name, one, exact, torchs, like, length, total in zip(
        ("y", *NAMES), found, truth, own, (x, *tensors), lengths, sums, strict=True
    ):
        assert one.shape == exact.shape and one.dtype == like.dtype, name
        bar = rounding(torch.float32, length)
        assert_accurate(one, exact, bar, plain=torchs, terms=total / max(length, 1) ** 0.5, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [None, -1.0, 0.4], ids=["no extra", "taken off", "extra"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("leading, features, outputs, rank", SHAPES)
def test_matches_float64(leading, features, outputs, rank, dropout, ratio, backend, poisoned_memory):
    extra = None if ratio is None else make_extra(features, outputs, 0.7 * ratio)
    check_all(make(leading, features, outputs, rank), dropout, extra, backend)


@pytest.mark.skipif(not HAS_CPP, reason="kernels not built")
def test_few_ranks_in_bfloat16_are_one_call_of_cpp():
    choose = functools.partial(op.layer.choose, "auto", torch.device("cpu"))
    assert choose(torch.bfloat16, False, 16) == choose(torch.bfloat16, True, 64) == "cpp"
    assert choose(torch.bfloat16, False, 17) == choose(torch.float16, False, 16) == "torch"
    assert choose(torch.float32, False, 64) == "cpp"


@pytest.mark.skipif(not HAS_CPP, reason="kernels not built")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 4), (8, 64, 64), (10, 64, 32), (50, 96, 40)], ids=str)
def test_an_adapter_that_changes_nothing_changes_no_bit(shape, biased):
    x, weight, bias, a, b = make(shape[:1], *shape[1:], 4)
    bias = bias if biased else None
    with torch.no_grad():
        b.zero_()
    y = lora_linear(x, weight, bias, a, b, scaling=2.0, backend="cpp")
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("ratio", [None, -1.0], ids=["no extra", "taken off"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_triton_in_the_interpreter(dropout, ratio):
    pytest.importorskip("triton")
    extra = None if ratio is None else make_extra(24, 18, 0.7 * ratio)
    check_all(make((3, 5), 24, 18, 8), dropout, extra, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_gpu_like_cpu(dropout, dtype):
    """The same mask on both, and float64's answer; the seed may lie on either."""
    tensors = [each.detach().cuda().requires_grad_() for each in make((300,), 256, 192, 16, dtype)]
    run = lambda drop: lora_linear(*tensors, scaling=0.5, dropout=drop)  # noqa: E731
    y = run(dropout)
    truth = reference.lora_linear(*(each.detach().cpu().double() for each in tensors), scaling=0.5, dropout=dropout)
    assert relative_error(y.detach().cpu(), truth) < {torch.float32: 2e-3, torch.float16: 2e-3}.get(dtype, 1e-2)
    if dropout is not None:
        seed = torch.tensor([dropout.seed - 2**64])
        assert torch.equal(run(Dropout(dropout.p, seed, dropout.stream)), y)
        assert torch.equal(run(Dropout(dropout.p, seed.cuda(), dropout.stream)), y)
    y.sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in tensors)


@pytest.mark.parametrize("extra", [False, True], ids=["no extra", "extra"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "float32 adapters"])
def test_narrow_dtypes(dtype, adapters, dropout, extra):
    tensors = make((40,), 48, 30, 8, dtype, adapters)
    check_all(tensors, dropout, make_extra(48, 30, -0.7, dtype=dtype) if extra else None, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_get_gradients_of_float32_sums(backend):
    """A sum of many products is not rounded to bfloat16 on its way into a float32 gradient; C++ rounds no factor."""
    tensors = make((2000,), 16, 12, 4, torch.bfloat16, torch.float32)
    grad = torch.randn(2000, 12).bfloat16()
    found = differentiate(lambda *each: lora_linear(*each, scaling=1.0, backend=backend), tensors, grad)
    x, _, _, a, b = (each.detach() for each in tensors)
    rounded = (lambda z: z.bfloat16().float()) if backend == "torch" else (lambda z: z)
    u, t = rounded(grad.float() @ rounded(b)), rounded(x.float() @ rounded(a).mT)
    assert relative_error(found[4], u.double().mT @ x.double()) < 1e-5
    assert relative_error(found[5], grad.double().mT @ t.double()) < 1e-5


@pytest.mark.parametrize("scaling, extra_scaling", [(0.0, 0.5), (-2.0, 2.0), (0.3, 0.0), (1e-3, 5.0)])
def test_scales(scaling, extra_scaling):
    for dropout in DROPOUTS:
        check_all(make((20,), 18, 14, 3), dropout, make_extra(18, 14, extra_scaling), "torch", scaling)


def test_the_frozen_pair_takes_off_what_the_adapter_starts_from():
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x, weight, bias, a, b = (each.detach() for each in make((60,), 40, 30, 8, dtype))
        base = torch.nn.functional.linear(x, weight, bias)
        y = lora_linear(x, weight, bias, a, b, scaling=1.5, extra=(a, b, -1.5))
        assert relative_error(y, base) < bound


def test_no_bias_and_a_nearly_certain_dropout():
    x, weight, _, a, b = make((30,), 20, 10, 2)
    for p in (0.0, 1e-6, 0.9999999):
        y = lora_linear(x, weight, None, a, b, scaling=0.5, dropout=Dropout(p, 3)).detach()
        truth = reference.lora_linear(
            x.double(), weight.double(), None, a.double(), b.double(), scaling=0.5, dropout=Dropout(p, 3)
        )
        assert relative_error(y, truth) < 1e-6
    assert torch.equal(
        lora_linear(x, weight, None, a, b, scaling=0.5, dropout=Dropout(0.0, 3)),
        lora_linear(x, weight, None, a, b, scaling=0.5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_with_gaps(backend):
    x, weight, _, a, b = make((7,), 24, 18, 4)
    check_all([x, weight, torch.randn(36)[::2].requires_grad_(), a, b], None, None, backend)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_strides(dropout):
    _, weight, bias, a, b = make((1,), 24, 18, 4)
    wide = torch.randn(6, 5, 60)
    views = {
        "part": wide[..., 7:31],
        "steps": wide[..., ::2][..., :24],
        "turned": torch.randn(24, 5, 6).permute(2, 1, 0),
        "batch turned": wide[..., :24].transpose(0, 1),
        "expanded": torch.randn(1, 1, 24).expand(3, 4, 24),
    }
    for x in views.values():
        check_all([x.requires_grad_(), weight, bias, a, b], dropout, None, "torch")
    turned = [
        views["part"].requires_grad_(),
        torch.randn(24, 18).mT,
        bias,
        torch.randn(24, 4).mT,
        torch.randn(4, 18).mT,
    ]
    check_all(turned, dropout, make_extra(24, 18, 0.2), "torch")
    # A gradient that is one number, expanded.
    tensors = make((3, 4), 24, 18, 4)
    lora_linear(*tensors, scaling=1.0, dropout=dropout).sum().backward()
    reference_grads = torch.autograd.grad(reference.lora_linear(*tensors, scaling=1.0, dropout=dropout).sum(), tensors)
    for each, expected in zip(tensors, reference_grads, strict=True):
        assert relative_error(each.grad, expected) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("extra", [False, True], ids=["no extra", "extra"])
def test_delta(dropout, extra, backend):
    x, _, _, a, b = make((4, 5), 30, 20, 3)
    y = torch.randn(4, 5, 20, requires_grad=True)
    pair = make_extra(30, 20, -0.7) if extra else None
    before, grad = y.detach().clone(), torch.randn(4, 5, 20)
    run = lambda y, x, a, b: lora_delta(y, x, a, b, scaling=0.7, dropout=dropout, extra=pair, backend=backend)  # noqa: E731

    def plain(y, x, a, b):
        more = widened(pair, x.dtype)
        return y + reference.lora_linear(x, None, None, a, b, scaling=0.7, dropout=dropout, extra=more)

    found = differentiate(run, (y, x, a, b), grad)
    truth = differentiate(plain, (y, x, a, b), grad, torch.float64)
    for one, exact in zip(found, truth, strict=True):
        assert relative_error(one, exact) < 1e-6
    assert torch.equal(y.detach(), before), "the base result is not written to"


def test_delta_after_a_base_that_saved_its_result():
    """The sigmoid's backward reads its own output."""
    x, _, _, a, b = make((6,), 10, 8, 2)
    h = torch.randn(6, 8, requires_grad=True)
    lora_delta(h.sigmoid(), x, a, b, scaling=1.0).sum().backward()
    s = h.detach().sigmoid()
    torch.testing.assert_close(h.grad, s * (1 - s))


@pytest.mark.parametrize("needed", [(i,) for i in range(5)] + [(0, 3, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_only_the_gradients_that_are_asked_for(needed, dropout):
    tensors = make((7,), 12, 9, 3)
    grad = torch.randn(7, 9)
    all_of_them = differentiate(lambda *each: lora_linear(*each, scaling=0.6, dropout=dropout), tensors, grad)[1:]
    leaves = [each.detach().requires_grad_(i in needed) for i, each in enumerate(tensors)]
    lora_linear(*leaves, scaling=0.6, dropout=dropout).backward(grad)
    for i, (leaf, expected) in enumerate(zip(leaves, all_of_them, strict=True)):
        assert (leaf.grad is not None) == (i in needed)
        assert i not in needed or torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_what_is_saved(dropout):
    """Beyond the inputs themselves: t, and the seed."""
    tokens, rank = 50, 4
    tensors = make((tokens,), 64, 48, rank)
    tensors[1].requires_grad_(False), tensors[2].requires_grad_(False)
    known = {each.untyped_storage().data_ptr() for each in tensors}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        y = lora_linear(*tensors, scaling=1.0, dropout=dropout)
    fresh = [each for each in saved if each.untyped_storage().data_ptr() not in known]
    assert sum(each.untyped_storage().nbytes() for each in fresh) <= tokens * rank * 4 + 64
    assert len(saved) - len(fresh) == 4  # x, W, A, B: no copies
    y.sum().backward()
    # Nothing of x is kept where neither A nor W learns.
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        lora_linear(tensors[0], *(each.detach() for each in tensors[1:]), scaling=1.0, dropout=dropout)
    assert all(each.data_ptr() != tensors[0].data_ptr() and each.shape != (tokens, rank) for each in saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leaf", [torch.float32, "same"], ids=["float32 x", "narrow x"])
def test_autocast(dtype, leaf):
    """As `torch.nn.functional.linear`: operands cast, result narrow, gradients in the dtypes of the leaves."""
    tensors = make((20,), 32, 24, 4)
    if leaf == "same":
        tensors[0] = tensors[0].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = lora_linear(*tensors, scaling=0.5, dropout=DROPPED, extra=make_extra(32, 24, -0.5))
        base = lora_delta(torch.zeros(20, 24), tensors[0], *tensors[3:], scaling=0.5)
        plain = torch.nn.functional.linear(tensors[0], tensors[1])
    assert y.dtype == base.dtype == plain.dtype == dtype
    y.backward(torch.ones_like(y))
    narrow = [each.detach().to(dtype) for each in tensors]
    torch.manual_seed(0)
    for each, expected in zip(
        tensors,
        differentiate(
            lambda *leaves: reference.lora_linear(*leaves, scaling=0.5, dropout=DROPPED),
            narrow,
            torch.ones_like(y),
            torch.float64,
        )[1:],
        strict=True,
    ):
        assert each.grad.dtype == each.dtype
        if each is not tensors[0]:  # x's has the frozen pair in it
            assert relative_error(each.grad, expected) < 2e-2


def test_autocast_inside_leaves_float64_alone():
    tensors = make((5,), 8, 6, 2, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(*tensors, scaling=0.5)
    assert y.dtype == torch.float64 and relative_error(y, reference.lora_linear(*tensors, scaling=0.5)) < 1e-14


def test_errors_name_the_argument():
    x, weight, bias, a, b = make((4,), 6, 5, 2)
    good = dict(x=x, weight=weight, bias=bias, a=a, b=b, scaling=1.0)
    cases = [
        (dict(x=torch.zeros(())), ValueError, "x has shape"),
        (dict(x=None), TypeError, "x must be a torch.Tensor"),
        (dict(weight=torch.zeros(5, 7)), ValueError, r"weight has shape \(5, 7\), but must have shape \(\*, 6\)"),
        (dict(weight=weight.bfloat16()), TypeError, "weight has dtype bfloat16"),
        (dict(bias=torch.zeros(6)), ValueError, "bias has shape"),
        (dict(a=torch.zeros(2, 5)), ValueError, "a has shape"),
        (dict(b=torch.zeros(5, 3)), ValueError, "b has shape"),
        (dict(b=torch.zeros(4, 2)), ValueError, "b has shape"),
        (dict(a=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "a has dtype int64"),
        (dict(scaling=None), TypeError, "scaling must be a number"),
        (dict(dropout=0.1), TypeError, "dropout must be a Dropout"),
        (dict(extra=(a, b)), TypeError, "extra must be"),
        (dict(extra=(torch.zeros(2, 5), b, 1.0)), ValueError, r"extra\[0\] has shape"),
        (dict(extra=(a, torch.zeros(5, 3), 1.0)), ValueError, r"extra\[1\] has shape"),
        (dict(extra=(a, b, "1")), TypeError, r"extra\[2\] must be a number"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda'"),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            lora_linear(**{**good, **change})
    with pytest.raises(ValueError, match="y has shape"):
        lora_delta(torch.zeros(4, 6), x, a, b, scaling=1.0)
    with pytest.raises(RuntimeError, match="takes no float64"):
        lora_linear(*make((4,), 6, 5, 2, torch.float64), scaling=1.0, backend="triton")
