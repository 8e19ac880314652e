import pytest
import torch

from lora_kernels.ops import Dropout, _ext, expand, shrink, tsreduce
from lora_kernels.ops.lora_linear import op as lora_op
from lora_kernels.ops.skinny import op as skinny_op
from lora_kernels.ops.skinny import reference
from lora_kernels.ops.skinny._launch import CPP_NAMES
from tests.helpers.accuracy import assert_accurate, rounding

BUILT = [name for name in CPP_NAMES.values() if hasattr(_ext.load()[0], f"lora_shrink{name}")]
HAS_CPP = bool(BUILT)
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="kernels not built"))]
SHAPES = [(0, 17, 4), (1, 33, 1), (5, 1, 24), (37, 50, 5), (100, 129, 20), (65, 200, 64), (2049, 17, 7), (9, 40, 130)]
DROPOUTS = [None, Dropout(0.3, 2**64 - 12345, 7), Dropout(0.999, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PARAMETERS = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped", "nearly all dropped"]),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("tokens, width, rank", SHAPES),
]


def every_case(test):
    for each in PARAMETERS:
        test = each(test)
    return test


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def check(found, compute, operands, length, dtype, backend):
    """Beside torch in the same arithmetic: sums of `length` terms."""
    if backend == "cpp" and CPP_NAMES.get(dtype) not in BUILT:
        pytest.skip("no such kernel")
    found = found()
    truth = compute(*(each.double() for each in operands))
    assert found.shape == truth.shape
    plain = compute(*(each.float() for each in operands)).to(found.dtype)
    terms = compute(*(each.double().square() for each in operands)).sqrt()  # but for the scale
    assert_accurate(found, truth, rounding(torch.float32, length, found.dtype), plain=plain, terms=terms)


@every_case
def test_shrink(tokens, width, rank, dtype, dropout, backend, poisoned_memory):
    x, a = draw(tokens, width, dtype=dtype), draw(rank, width, dtype=dtype)
    run = lambda: shrink(x, a, scale=0.7, dropout=dropout, backend=backend)  # noqa: E731
    check(run, lambda x, a: reference.shrink(x, a, 0.7, dropout), (x, a), width, dtype, backend)


@every_case
def test_tsreduce(tokens, width, rank, dtype, dropout, backend, poisoned_memory):
    t, z = draw(tokens, rank, dtype=dtype), draw(tokens, width, dtype=dtype)
    run = lambda: tsreduce(t, z, dropout=dropout, backend=backend)  # noqa: E731
    check(run, lambda t, z: reference.tsreduce(t, z, dropout), (t, z), tokens, dtype, backend)
    if backend == "torch":
        assert run().dtype == torch.float32


@every_case
def test_expand(tokens, width, rank, dtype, dropout, backend, poisoned_memory):
    t, b, bias = draw(tokens, rank, dtype=dtype), draw(width, rank, dtype=dtype).mT, draw(width, dtype=dtype)
    out = draw(tokens, width, dtype=dtype)
    for start in (None, bias):
        run = lambda start=start: expand(t, b, bias=start, dropout=dropout, backend=backend)  # noqa: E731
        operands = (t, b) if start is None else (t, b, start)
        check(run, lambda *each: reference.expand(*each, dropout=dropout), operands, rank + 1, dtype, backend)
    run = lambda: expand(t, b, out=out.clone(), dropout=dropout, backend=backend)  # noqa: E731
    check(run, lambda *each: reference.expand(*each, dropout=dropout), (t, b, out), rank + 1, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=["whole", "dropped"])
def test_strides(dropout, backend):
    wide = draw(30, 90)
    views = {
        "part": wide[:, 5:55],
        "steps": wide[:, ::2],
        "transposed": draw(45, 30).mT,
        "expanded": wide[:1].expand(30, -1),
    }
    for name, x in views.items():
        d = x.shape[1]
        for a in (draw(6, d), draw(d, 6).mT, draw(12, 2 * d)[::2, ::2]):
            t = shrink(x, a, dropout=dropout, backend=backend)
            truth = reference.shrink(x.double(), a.double(), 1.0, dropout)
            assert_accurate(t, truth, rounding(torch.float32, d), what=name)
            y = expand(t, a, dropout=dropout, backend=backend)
            truth = reference.expand(t.double(), a.double(), dropout=dropout)
            assert_accurate(y, truth, rounding(torch.float32, len(a)), what=name)
        u = draw(30, 12)[:, ::2]
        truth = reference.tsreduce(u.double(), x.double(), dropout)
        assert_accurate(tsreduce(u, x, dropout=dropout, backend=backend), truth, rounding(torch.float32, 30), what=name)
    buffer = torch.full((30, 90), 7.0)
    expand(draw(30, 4), draw(4, 50), out=buffer[:, 5:55], backend=backend)
    assert (buffer[:, :5] == 7).all() and (buffer[:, 55:] == 7).all() and (buffer[:, 5:55] != 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_entries_may_hold_anything(backend):
    dropout = Dropout(0.5, 1)
    x, a = draw(20, 30), draw(3, 30)
    dirty = torch.where(reference.dropped(torch.ones_like(x), dropout) != 0, x, float("nan"))
    assert torch.equal(
        shrink(dirty, a, dropout=dropout, backend=backend), shrink(x, a, dropout=dropout, backend=backend)
    )
    t = draw(20, 3)
    assert torch.equal(
        tsreduce(t, dirty, dropout=dropout, backend=backend), tsreduce(t, x, dropout=dropout, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    x, a, dropout = draw(3000, 150), draw(8, 150), Dropout(0.2, 9)
    t = shrink(x, a, dropout=dropout, backend=backend)
    assert torch.equal(t, shrink(x, a, dropout=dropout, backend=backend))
    assert torch.equal(
        tsreduce(t, x, dropout=dropout, backend=backend), tsreduce(t, x, dropout=dropout, backend=backend)
    )


def test_all_kinds_of_seeds_agree():
    x, a = draw(20, 30), draw(3, 30)
    expected = shrink(x, a, dropout=Dropout(0.5, 2**64 - 1))
    for seed in (-1, torch.tensor([-1]), torch.tensor(-1)):
        assert torch.equal(shrink(x, a, dropout=Dropout(0.5, seed)), expected)
    assert torch.equal(shrink(x, a, dropout=Dropout(0.0, 1)), shrink(x, a))
    torch.manual_seed(5)
    first = Dropout.draw(0.5)
    torch.manual_seed(5)
    assert torch.equal(first.seed, Dropout.draw(0.5).seed) and not torch.equal(first.seed, Dropout.draw(0.5).seed)


def test_float64_stays_float64():
    x, a = draw(9, 20, dtype=torch.float64), draw(3, 20, dtype=torch.float64)
    for dropout in DROPOUTS:
        t = shrink(x, a, dropout=dropout)
        for found, truth, length in (
            (t, reference.shrink(x, a, 1.0, dropout), 20),
            (tsreduce(t, x, dropout=dropout), reference.tsreduce(t, x, dropout), 9),
            (expand(t, a, dropout=dropout), reference.expand(t, a, dropout=dropout), 3),
        ):
            assert_accurate(found, truth, 2 * rounding(torch.float64, length))  # the truth is rounded, too


def test_autocast_leaves_operands_alone():
    x, a = draw(20, 30), draw(3, 30)
    expected = [shrink(x, a), tsreduce(x, x), expand(x[:, :3].contiguous(), a)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [shrink(x, a), tsreduce(x, x), expand(x[:, :3].contiguous(), a)]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_registration_is_sound():
    x, a, seed = draw(7, 9), draw(3, 9), torch.tensor([4])
    t, ops = draw(7, 3), torch.ops.lora_kernels
    for threshold in (0, 9000):
        drop = (threshold, seed if threshold else None, 2, "torch")
        torch.library.opcheck(ops.shrink.default, (draw(7, 3), x, a, 0.5, *drop))
        torch.library.opcheck(ops.tsreduce.default, (draw(3, 9), t, x, *drop))
        for bias, accumulate in ((None, False), (draw(9), False), (None, True)):
            torch.library.opcheck(ops.expand.default, (draw(7, 9), t, a, bias, accumulate, *drop))


def test_compiles_for_any_number_of_tokens():
    def run(x, a, seed):
        dropout = Dropout(0.4, seed, 3)
        t = shrink(x * 1, a, scale=0.5, dropout=dropout)
        return expand(t, a, out=x + 1, dropout=dropout), tsreduce(t, x, dropout=dropout)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    a = draw(3, 20)
    for tokens in (5, 8, 1):
        x, seed = draw(tokens, 20), torch.tensor([tokens])
        for one, two in zip(compiled(x, a, seed), run(x, a, seed), strict=True):
            assert torch.equal(one, two)


def test_errors_name_the_argument():
    x, a, t = draw(4, 6), draw(2, 6), draw(4, 2)
    cases = [
        (lambda: shrink(x, draw(2, 5)), ValueError, r"a has shape \(2, 5\), but must have shape \(\*, 6\)"),
        (lambda: shrink(x, a.half()), TypeError, "a has dtype float16"),
        (lambda: shrink(x[0], a), ValueError, r"x has shape \(6,?\)"),
        (lambda: shrink(x, a, scale="1"), TypeError, "scale must be a number"),
        (lambda: shrink(x, a, scale=float("nan")), ValueError, "scale is nan"),
        (lambda: shrink(x, a, dropout=0.5), TypeError, "dropout must be a Dropout"),
        (lambda: shrink(x, a, dropout=Dropout(1.0, 0)), ValueError, "dropout.p is 1.0"),
        (lambda: shrink(x, a, dropout=Dropout("a", 0)), TypeError, "dropout.p must be a number"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, 2**64)), ValueError, "dropout.seed is"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, 0.5)), TypeError, "dropout.seed must be"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, torch.zeros(1))), TypeError, "dropout.seed has dtype"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, torch.zeros(2, dtype=torch.int64))), ValueError, "must have one"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, 0, -1)), ValueError, "dropout.stream is -1"),
        (lambda: shrink(x, a, dropout=Dropout(0.1, 0, 1.0)), TypeError, "dropout.stream must be an int"),
        (lambda: tsreduce(t, draw(5, 6)), ValueError, "z has shape"),
        (lambda: expand(t, draw(3, 6)), ValueError, "b has shape"),
        (lambda: expand(t, a, bias=draw(5)), ValueError, "bias has shape"),
        (lambda: expand(t, a, bias=draw(6), out=x.clone()), ValueError, "bias cannot be given"),
        (lambda: expand(t, a, out=draw(4, 12)[:, ::2]), ValueError, "out has strides"),
        (lambda: expand(t, a, out=x.clone().requires_grad_()), ValueError, "out requires a gradient"),
        (lambda: shrink(x.double(), a.double(), backend="triton"), RuntimeError, "takes no float64"),
        (lambda: shrink(x, a, backend="gpu"), ValueError, "backend is 'gpu'"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def test_backend_choice(monkeypatch):
    device = torch.device("cpu")
    choose = lora_op.layer.choose
    assert choose("auto", device, torch.bfloat16, False) == "torch"
    assert choose("auto", device, torch.float32, False) == ("cpp" if HAS_CPP else "torch")
    assert choose("auto", device, torch.float32, True) == ("cpp" if HAS_CPP else "torch")
    assert choose("auto", device, torch.bfloat16, True) == ("cpp" if "_bfloat16" in BUILT else "torch")
    assert choose("auto", device, torch.float16, True) == "torch"
    monkeypatch.setattr(skinny_op, "_not_built", lambda name: f"not built: {name}")
    with pytest.raises(RuntimeError, match="cpp: not built: lora_shrink"):
        choose("cpp", device, torch.float32, True)
