import os
import subprocess
import sys

import pytest
import torch

from lora_kernels.ops import _ext, lora_pro_adam_, use_backend
from lora_kernels.ops.lora_pro_adam import op, reference
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding
from tests.ops.lora_pro_cases import (
    BETAS,
    EPS,
    EXACT,
    SCALING,
    batch,
    by_definition,
    check,
    make,
    trajectory,
    whole_numbers,
)

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]
SHAPES = [(1, 1, 1), (7, 5, 2), (1, 300, 4), (300, 1, 3), (17, 200, 5), (129, 33, 8), (70, 250, 24), (101, 777, 16)]
SHAPES += [(90, 400, 64), (40, 210, 130)]
NUMBERS = {"scaling": SCALING, "betas": BETAS, "eps": EPS}


def copies(moments):
    return [each.clone() for each in moments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("rows, columns, rank", SHAPES)
def test_matches_float64(rows, columns, rank, dtype, backend, poisoned_memory):
    moments, factors = make(rows, columns, rank, dtype)
    truth = reference.lora_pro_adam(*moments, *factors, **NUMBERS, step=3)
    results = lora_pro_adam_(*moments, *factors, **NUMBERS, step=3, backend=backend)
    assert [each.dtype for each in results] == [dtype, dtype]
    assert [tuple(each.shape) for each in results] == [(rank, columns), (rows, rank)]
    check((*moments, *results), truth, rows, columns, rank)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows, columns, rank", [(64, 96, 4), (130, 210, 16), (65, 50, 40)])
def test_ten_steps_are_within_twice_the_error_of_torch(rows, columns, rank, backend):
    moments, factors = make(rows, columns, rank)
    moments = [torch.zeros_like(each) for each in moments]
    truth = trajectory(moments, factors, 10, by_definition(torch.float64))
    plain = trajectory(moments, factors, 10, by_definition(torch.float32))
    found = trajectory(
        copies(moments), factors, 10, lambda m, f, step: lora_pro_adam_(*m, *f, **NUMBERS, step=step, backend=backend)
    )
    check(found, truth, rows, columns, rank, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layers, rows, columns, rank", [(1, 9, 12, 2), (5, 17, 33, 3), (3, 200, 210, 16), (70, 5, 8, 1)]
)
def test_a_batch_is_each_of_its_layers(layers, rows, columns, rank, state, backend, poisoned_memory):
    """In one call, on views of moments that lie side by side; each layer has random bits of its own rows."""
    dtype = torch.promote_types(state, torch.float32)
    moments, factors = batch(layers, rows, columns, rank, dtype, state)
    call = {**NUMBERS, "step": 3, "seed": 5, "backend": backend}
    for step in (20, None):
        mine = copies(moments)
        assert mine[0].stride() == (columns, layers * columns, 1)
        results = lora_pro_adam_(*mine, *factors, **call, row_offset=4, row_step=step)
        for layer in range(layers):
            one = [moment[layer].clone() for moment in moments]
            truth = reference.lora_pro_adam(*one, *(factor[layer] for factor in factors), **NUMBERS, step=3)
            found = [tensor[layer] for tensor in (*mine, *results)]
            check(found, truth, rows, columns, rank, state=state)
            offset = 4 + layer * (step or rows)
            alone = lora_pro_adam_(*one, *(factor[layer] for factor in factors), **call, row_offset=offset)
            if backend == "cpp":
                assert all(torch.equal(*pair) for pair in zip(found, (*one, *alone), strict=True))
            elif state == torch.bfloat16:  # rounding of E may move a few numbers across a random threshold
                assert float((found[0] == one[0]).double().mean()) > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_adam_on_the_full_gradient(backend):
    """torch's own Adam moves a weight by lr * H."""
    (m, v), (a, b, grad_a, grad_b) = make(30, 40, 3)
    weight = torch.zeros(30, 40, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1.0, betas=BETAS, eps=EPS)
    moments = [torch.zeros_like(m), torch.zeros_like(v)]
    for step in range(1, 4):
        before = weight.detach().clone()
        weight.grad = SCALING * (b.double() @ (step * grad_a).double() + grad_b.double() @ a.double())
        adam.step()
        h = before - weight.detach()
        bt_h, h_at = lora_pro_adam_(*moments, a, b, step * grad_a, grad_b, **NUMBERS, step=step, backend=backend)
        check((bt_h, h_at), (SCALING * b.double().mT @ h, SCALING * h @ a.double().mT), 30, 40, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_with_b_zero(backend):
    moments, (a, b, grad_a, grad_b) = make(33, 50, 4)
    moments = [torch.zeros_like(each) for each in moments]
    bt_h, h_at = lora_pro_adam_(*moments, a, 0 * b, grad_a, grad_b, scaling=2.0, step=1, backend=backend)
    assert torch.equal(bt_h, torch.zeros_like(bt_h))
    signs = (grad_b.double() @ a.double()).sign()  # the first direction, up to eps
    assert relative_error(h_at, 2.0 * signs @ a.double().mT) < 1e-5
    other = [torch.zeros_like(each) for each in moments]
    again = lora_pro_adam_(*other, a, 0 * b, 7 * grad_a, grad_b, scaling=2.0, step=1, backend=backend)
    assert torch.equal(again[1], h_at) and torch.equal(other[1], moments[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_direction(backend):
    (m, v), (a, b, grad_a, grad_b) = make(20, 60, 4)
    decayed = 0.5 * m, 0.25 * v
    moments = torch.zeros_like(m), torch.zeros_like(v)
    for step in (1, 2, 2**32 - 1):
        results = lora_pro_adam_(*moments, a, b, 0 * grad_a, 0 * grad_b, scaling=1.0, step=step, backend=backend)
        assert all(torch.equal(each, torch.zeros_like(each)) for each in (*moments, *results))
    # The moments decay where they are not zero.
    lora_pro_adam_(m, v, a, b, 0 * grad_a, 0 * grad_b, scaling=1.0, step=1, backend=backend, betas=(0.5, 0.25))
    assert torch.equal(m, decayed[0]) and torch.equal(v, decayed[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_goes_where_it_must_and_nowhere_else(state, backend):
    moments, (a, b, grad_a, grad_b) = make(37, 90, 4, state=state)
    call = {"scaling": 1.0, "step": 2, "seed": 3, "backend": backend}
    clean = copies(moments)
    results = lora_pro_adam_(*clean, a, b, grad_a, grad_b, **call)
    column, row = grad_a.clone(), grad_b.clone()
    # A NaN whose bits are all ones: rounding must not carry them over into a number.
    column[2, 11] = row[5, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for grads, hit, hit_bt, hit_at in (
        ((column, grad_b), (slice(None), 11), (slice(None), 11), (slice(None),)),
        ((grad_a, row), (5,), (slice(None),), (5,)),
    ):
        found = copies(moments)
        given = lora_pro_adam_(*found, a, b, *grads, **call)
        places = zip((*found, *given), (*clean, *results), (hit, hit, hit_bt, hit_at), strict=True)
        for one, other, where in places:
            expected = torch.zeros(one.shape, dtype=torch.bool)
            expected[where] = True
            assert torch.equal(one.isnan(), expected)
            torch.testing.assert_close(one[~expected], other[~expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_be_shared_out(state, backend):
    moments, (a, b, grad_a, grad_b) = whole_numbers(75, 110, 6, state)
    parts = copies(moments)
    for step in (1, 2):
        call = {**EXACT, "step": step, "seed": 11, "backend": backend}
        bt_h, h_at = lora_pro_adam_(*moments, a, b, grad_a, grad_b, **call)
        total = torch.zeros_like(bt_h)
        for part in (slice(0, 20), slice(20, 21), slice(21, 75)):
            rows = [each[part] for each in parts]
            found = lora_pro_adam_(*rows, a, b[part], grad_a, grad_b[part], **call, row_offset=part.start)
            total += found[0]
            assert_accurate(found[1], h_at[part], 2 * rounding(torch.float32, 110))  # both are rounded
        assert_accurate(total, bt_h, 2 * rounding(torch.float32, 75))
        assert torch.equal(parts[0], moments[0]) and torch.equal(parts[1], moments[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_views_and_dtypes(state, backend):
    moments, factors = make(40, 70, 5, torch.float16, state)
    truth = reference.lora_pro_adam(*moments, *factors, **NUMBERS, step=4)
    wide = [torch.full((40, 79), -7.0, dtype=state) for _ in moments]
    views = [each[:, 3:73] for each in wide]
    for view, moment in zip(views, moments, strict=True):
        view.copy_(moment)
    a, b, grad_a, grad_b = factors
    strided = torch.zeros(5, 140, dtype=torch.float16)[:, ::2].copy_(grad_a)
    results = lora_pro_adam_(
        *views, a.mT.contiguous().mT, b.double(), strided, grad_b.mT.contiguous().mT, **NUMBERS, step=4, seed=0,
        backend=backend,
    )  # fmt: skip
    assert results[0].dtype == torch.promote_types(state, torch.float32)
    check((*views, *results), truth, 40, 70, 5, state=state)
    for each in wide:
        assert bool((each[:, :3] == -7).all()) and bool((each[:, 73:] == -7).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    for state in (torch.float32, torch.bfloat16):
        moments, factors = make(200, 500, 16, state=state)
        found = []
        for threads in (1, 1, 2, 3):
            mine = copies(moments)
            before = torch.get_num_threads()
            torch.set_num_threads(threads if backend == "cpp" else 1)
            try:
                results = lora_pro_adam_(*mine, *factors, **NUMBERS, step=7, seed=9, backend=backend)
            finally:
                torch.set_num_threads(before)
            found.append((*mine, *results))
        for other in found[1:]:
            assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_parts_of_a_large_matrix():
    """So large that both axes are cut into parts, whose sums are added; factors too large for one panel."""
    for rows, columns, rank in ((1000, 1700, 4), (300, 900, 100)):
        moments, factors = make(rows, columns, rank)
        truth = reference.lora_pro_adam(*moments, *factors, **NUMBERS, step=2)
        results = lora_pro_adam_(*moments, *factors, **NUMBERS, step=2, backend="cpp")
        check((*moments, *results), truth, rows, columns, rank)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured on Linux only")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_size_of_the_matrix_is_made(backend):
    code = f"""
from pathlib import Path
import torch
from lora_kernels.ops import lora_pro_adam_
torch.set_num_threads(1)
def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
def run(rows, columns, rank=8):
    m, v = torch.zeros(rows, columns), torch.zeros(rows, columns)
    factors = [torch.ones(shape) for shape in ((rank, columns), (rows, rank), (rank, columns), (rows, rank))]
    m.add_(1), v.add_(1)
    before = resident("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    lora_pro_adam_(m, v, *factors, scaling=1.0, step=1, backend="{backend}")
    return 1024 * (resident("VmHWM:") - before) / (2 * m.nbytes)
run(64, 64)
print(run(3000, 3000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # The torch backend's temporaries are a 64th of the matrix each, and what the allocator keeps of them varies.
    assert float(done.stdout) < {"cpp": 0.05, "torch": 0.15}[backend]


def test_registration_is_sound():
    for backend in ["torch"] + ["cpp"] * HAS_CPP:
        for state in (torch.float32, torch.bfloat16):
            moments, factors = make(9, 20, 3, state=state)
            results = torch.empty(3, 20), torch.empty(9, 3)
            seed = torch.tensor([5]) if state == torch.bfloat16 else None
            arguments = (*moments, *factors, *results, 0.5, 0.9, 0.999, 1e-8, 3, seed, 0, 9, backend)
            torch.library.opcheck(torch.ops.lora_kernels.lora_pro_adam_.default, arguments)


def test_compiles_without_graph_breaks():
    def step(m, v, a, b, grad_a, grad_b, seed):
        bt_h, h_at = lora_pro_adam_(m, v, a, b, 2 * grad_a, grad_b, scaling=0.5, step=3, seed=seed)
        return bt_h.sum() + h_at.sum()

    for state in (torch.float32, torch.bfloat16):
        moments, factors = make(12, 30, 2, state=state)
        other = copies(moments)
        eager = step(*moments, *factors, torch.tensor(4))
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*other, *factors, torch.tensor(4))
        assert torch.equal(eager, compiled) and torch.equal(moments[0], other[0]) and torch.equal(moments[1], other[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_do_not_flow_through(backend):
    moments, factors = make(5, 6, 2)
    results = lora_pro_adam_(*moments, *(each.requires_grad_() for each in factors), scaling=1.0, step=1)
    assert not any(each.requires_grad for each in (*moments, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    moments, factors = batch(2, 3, 5, 3)
    none = lora_pro_adam_(*(each[:0] for each in (*moments, *factors)), scaling=1.0, step=1, backend=backend)
    assert [tuple(each.shape) for each in none] == [(0, 3, 5), (0, 3, 3)]
    for rows, columns in ((0, 5), (5, 0)):
        moments, factors = make(rows, columns, 3)
        bt_h, h_at = lora_pro_adam_(*moments, *factors, scaling=1.0, step=1, backend=backend)
        assert torch.equal(bt_h, torch.zeros(3, columns)) and torch.equal(h_at, torch.zeros(rows, 3))


def test_errors_name_the_argument():
    (m, v), (a, b, grad_a, grad_b) = make(6, 8, 2)
    half = {"exp_avg": m.bfloat16(), "exp_avg_sq": v.bfloat16()}
    cases = [
        (dict(exp_avg=m.half()), TypeError, "exp_avg has dtype float16, but must be one of float32, float64, bfloat16"),
        (dict(exp_avg=m[0]), ValueError, r"exp_avg has shape \(8,\), but must have shape \(\*, \*\)"),
        (dict(exp_avg_sq=v.double()), TypeError, "exp_avg_sq has dtype float64, but must be one of float32"),
        (dict(exp_avg_sq=v[:5]), ValueError, r"exp_avg_sq has shape \(5, 8\), but must have shape \(6, 8\)"),
        (dict(exp_avg=m.mT.contiguous().mT), ValueError, "exp_avg has strides .*, but its rows must be contiguous"),
        (dict(exp_avg_sq=v[:1].expand(6, 8)), ValueError, "exp_avg_sq has strides .*, but its rows must be"),
        (dict(exp_avg_sq=m), ValueError, "exp_avg and exp_avg_sq share memory"),
        (dict(a=a[:, :7]), ValueError, r"a has shape \(2, 7\), but must have shape \(\*, 8\)"),
        (dict(a=a[:0]), ValueError, r"a has shape \(0, 8\), but must have at least one row"),
        (dict(a=None), TypeError, "a must be a torch.Tensor, got NoneType"),
        (dict(b=b[:, :1]), ValueError, r"b has shape \(6, 1\), but must have shape \(6, 2\)"),
        (dict(grad_a=grad_a.mT), ValueError, r"grad_a has shape \(8, 2\), but must have shape \(2, 8\)"),
        (dict(grad_b=grad_b.long()), TypeError, "grad_b has dtype int64"),
        (dict(scaling="1"), TypeError, "scaling must be a number, got str"),
        (dict(scaling=float("nan")), ValueError, "scaling is nan"),
        (dict(betas=(1.0, 0.9)), ValueError, r"betas\[0\] is 1.0, but must be below 1"),
        (dict(betas=(0.9, -0.1)), ValueError, r"betas\[1\] is -0.1, but must be >= 0"),
        (dict(betas=(0.9,)), ValueError, r"betas is \(0.9,\), but must be two numbers"),
        (dict(eps=0.0), ValueError, "eps is 0.0, but must be above 0"),
        (dict(step=0), ValueError, "step is 0, but must be >= 1"),
        (dict(step=1.5), TypeError, "step must be an int, got float"),
        (dict(row_offset=-1), ValueError, "row_offset is -1, but must be >= 0"),
        (dict(row_offset=2**32 - 5), ValueError, "row_offset is 4294967291, but must be >= 0 and <= 4294967290"),
        (half, ValueError, "seed is None, but must be given for bfloat16 moments"),
        (dict(**half, seed=1.0), TypeError, "seed must be an int or a tensor, got float"),
        (dict(**half, seed=2**64), ValueError, "seed is 18446744073709551616, but must be a 64-bit integer"),
        (dict(**half, seed=torch.zeros(1)), TypeError, "seed has dtype float32, but must be int64"),
        (dict(**half, seed=torch.zeros(2, dtype=torch.int64)), ValueError, "seed has 2 elements, but must have one"),
        (dict(row_step=-1), ValueError, "row_step is -1, but must be >= 0"),
        (dict(row_step=2.0), TypeError, "row_step must be an int, got float"),
        (dict(exp_avg=m[None]), ValueError, r"exp_avg_sq has shape \(6, 8\), but must have shape \(1, 6, 8\)"),
        (dict(exp_avg=m[None], exp_avg_sq=v[None]), ValueError, r"a has .* \(2, 8\), but must have shape \(1, \*, 8\)"),
        (dict(backend="cuda"), ValueError, "backend is 'cuda'"),
    ]  # fmt: skip
    base = {"exp_avg": m, "exp_avg_sq": v, "a": a, "b": b, "grad_a": grad_a, "grad_b": grad_b}
    for change, kind, message in cases:
        before = m.clone()
        with pytest.raises(kind, match=message):
            lora_pro_adam_(**{**base, "scaling": 1.0, "step": 1, **change})
        assert torch.equal(m, before)


def test_backend_choice_is_explained(monkeypatch):
    m = torch.zeros(3, 4)
    few, many = torch.zeros(2, 4), torch.zeros(200, 4)
    assert op.adam.choose("auto", m, m, few) == ("cpp" if HAS_CPP else "torch")
    with use_backend("torch"):
        assert op.adam.choose("auto", m, m, few) == "torch"
    if HAS_CPP:
        assert op.adam.choose("auto", m.double(), m, few) == op.adam.choose("auto", m.bfloat16(), m, many) == "cpp"
    reasons = op.adam.explain(m.double(), m, few)
    assert reasons["torch"] is None and reasons["triton"] is not None
    monkeypatch.setattr(_ext, "missing", lambda: "not built")
    with pytest.raises(RuntimeError, match="cpp: not built"):
        op.adam.choose("cpp", m, m, few)


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
@pytest.mark.parametrize("lane_bytes", [16, 32])
def test_narrower_machines(lane_bytes):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "cpp and (matches and (70 or 300 or 90) or nan or shared or batch and 33) or parts"]
    environment = {**os.environ, "LORA_KERNELS_LANE_BYTES": str(lane_bytes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
