"""Cholesky factors and solves, and Sylvester equations."""

import pytest
import torch

from lora_kernels.ops import _ext
from lora_kernels.ops.small_linalg import drivers, reference
from lora_kernels.ops.small_linalg.op import cholesky, cholesky_solve, sylvester
from tests.conftest import relative_error
from tests.ops.linalg_cases import (
    BATCHES,
    DTYPES,
    EPSILON,
    ORDERS,
    RUNS,
    bits_with_threads,
    few,
    lower_only,
    positive,
    strided,
    with_spectrum,
)

HAS_CPP = _ext.load()[0] is not None
NAN = float("nan")


def within_the_bar(found, truth, by_torch, condition):
    """At most twice the error that torch makes in the same dtype, and not a bar that half the result passes."""
    # The float64 truth is itself wrong by the condition.
    bound = 2 * relative_error(by_torch, truth) + 10 * EPSILON[found.dtype] + condition * EPSILON[torch.float64]
    assert relative_error(found, truth) <= bound
    assert relative_error(0.5 * found, truth) > bound


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [10, 1e5])
@pytest.mark.parametrize("n", ORDERS)
def test_cholesky(n, condition, dtype, run, poisoned_memory):
    backend, device = run
    a = positive((few(n),), n, dtype, device, condition)
    found, wide = cholesky(a, backend=backend), a.double()
    assert torch.equal(found, found.tril()) and bool((found.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert relative_error(found.double() @ found.double().mT, wide) <= 4 * EPSILON[dtype]
    within_the_bar(found, torch.linalg.cholesky(wide), torch.linalg.cholesky(a), condition)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 64, 65, 200])
@pytest.mark.parametrize("n", ORDERS)
def test_cholesky_solve(n, columns, dtype, run, poisoned_memory):
    backend, device = run
    a = positive((few(n),), n, dtype, device)
    rhs = torch.randn(few(n), n, columns, dtype=dtype).to(device)
    truth = torch.linalg.solve(a.double(), rhs.double())
    by_torch = torch.cholesky_solve(rhs, torch.linalg.cholesky(a))
    within_the_bar(cholesky_solve(a, rhs, backend=backend), truth, by_torch, 100)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch, run):
    backend, device = run
    a, q = positive(batch, 5, torch.float64, device), positive(batch, 3, torch.float64, device)
    rhs = torch.randn(*batch, 5, 3, dtype=torch.float64).to(device)
    factor, solution = cholesky(a, backend=backend), cholesky_solve(a, rhs, backend=backend)
    between = sylvester(a, q, rhs, backend=backend)
    assert factor.shape == a.shape and solution.shape == between.shape == rhs.shape
    torch.testing.assert_close(factor @ factor.mT, a)
    torch.testing.assert_close(a @ solution, rhs)
    torch.testing.assert_close(a @ between + between @ q, rhs)


@pytest.mark.parametrize("run", RUNS)
def test_sizes_of_zero(run):
    backend, device = run
    a, empty = positive((3,), 4, torch.float32, device), torch.zeros(3, 0, 0, device=device)
    assert cholesky(empty, backend=backend).shape == (3, 0, 0)
    assert cholesky_solve(a, a[..., :0], backend=backend).shape == (3, 4, 0)
    assert sylvester(a, empty, a[..., :0], backend=backend).shape == (3, 4, 0)
    with pytest.raises(ValueError, match="matrix 0 is not positive definite"):
        cholesky_solve(-a, a[..., :0], backend=backend)


@pytest.mark.parametrize("run", RUNS)
def test_strides_and_the_upper_triangle_do_not_matter(run):
    backend, device = run
    a, q = positive((5,), 10, torch.float64, device), positive((5,), 6, torch.float64, device)
    rhs = torch.randn(5, 10, 6, dtype=torch.float64).to(device)
    ops = [
        (cholesky, (a,), ()),
        (cholesky_solve, (a,), (rhs,)),
        (sylvester, (a, q), (rhs,)),
    ]
    for op, matrices, rest in ops:
        expected = op(*matrices, *rest, backend=backend)
        changes = (strided, lower_only)
        for change in changes:
            others = [change(each) for each in matrices]
            found = op(*others, *(strided(each) for each in rest), backend=backend)
            assert torch.equal(found, expected), (op, change)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("op", [cholesky, lambda a, **to: cholesky_solve(a, a, **to)], ids=["factor", "solve"])
def test_a_bad_matrix_is_named(op, run):
    backend, device = run
    a = positive((40,), 6, torch.float64, device)
    a[30, 2, 1] = NAN
    with pytest.raises(ValueError, match="matrix 30 holds NaN or infinite"):
        op(a, backend=backend)
    a[17, 3, 3] = -1.0
    with pytest.raises(ValueError, match=r"matrix 17 is not positive definite \(its leading minor of order 4 is not\)"):
        op(a, backend=backend)
    a[17] = 0
    with pytest.raises(ValueError, match="matrix 17 is not positive definite .*order 1 "):
        op(a, backend=backend)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_right_hand_side_stays_in_its_column(bad, run):
    backend, device = run
    a = positive((5,), 9, torch.float64, device)
    rhs = torch.randn(5, 9, 70, dtype=torch.float64).to(device)
    clean = cholesky_solve(a, rhs, backend=backend)
    rhs[2, 4, 66] = bad
    found = cholesky_solve(a, rhs, backend=backend)
    assert not bool(torch.isfinite(found[2, :, 66]).any())
    found[2, :, 66] = clean[2, :, 66]
    torch.testing.assert_close(found, clean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r, k", [(1, 1), (2, 3), (3, 2), (7, 16), (16, 7), (24, 24), (31, 5), (64, 64), (128, 31)])
def test_sylvester(r, k, dtype, run, poisoned_memory):
    backend, device = run
    batch = few(max(r, k))
    p, q = positive((batch,), r, dtype, device), positive((batch,), k, dtype, device)
    rhs = torch.randn(batch, r, k, dtype=dtype).to(device)
    truth = reference.sylvester(p.double(), q.double(), rhs.double())
    residual = p.double() @ truth + truth @ q.double() - rhs.double()
    assert torch.linalg.norm(residual) <= 1e-12 * torch.linalg.norm(rhs), "the truth itself"
    found = sylvester(p, q, rhs, backend=backend)
    within_the_bar(found, truth, reference.sylvester(p, q, rhs), 100)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sylvester_gives_the_solution_of_least_norm(dtype, run):
    backend, device = run
    eye = torch.eye(6, dtype=torch.float64)
    for p_values, q_values in [
        ([0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 2, 2]),  # both singular: 3 x 2 coefficients are free
        ([0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]),  # P = 0, as for a LoRA adapter before its first step
        ([-3, -2, -1, 1, 2, 3], [1, 1, 5, 6, 7, 8]),  # p_i = -q_j
    ]:
        p = with_spectrum((4,), torch.tensor(p_values, dtype=torch.float64), dtype)
        q = with_spectrum((4,), torch.tensor(q_values, dtype=torch.float64), dtype)
        rhs = torch.randn(4, 6, 6, dtype=dtype)
        found = sylvester(p.to(device), q.to(device), rhs.to(device), backend=backend).cpu()
        for one in range(4):
            operator = torch.kron(p[one].double(), eye) + torch.kron(eye, q[one].double())
            pseudo = torch.linalg.pinv(operator, rtol=1e-5, hermitian=True)
            truth = (pseudo @ rhs[one].double().reshape(-1)).reshape(6, 6)
            assert relative_error(found[one], truth) <= 300 * EPSILON[dtype]


@pytest.mark.parametrize("run", RUNS)
def test_sylvester_of_zeros_is_zero(run):
    backend, device = run
    zero = torch.zeros(3, 5, 5, device=device)
    assert not bool(sylvester(zero, zero, torch.randn(3, 5, 5).to(device), backend=backend).any())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("scale", [1e-140, 1e140])
def test_sylvester_at_extreme_scales(scale, run):
    backend, device = run
    p, q = positive((3,), 6, torch.float64, device), positive((3,), 4, torch.float64, device)
    rhs = torch.randn(3, 6, 4, dtype=torch.float64).to(device)
    found = sylvester(p * scale, q * scale, rhs, backend=backend) * scale
    torch.testing.assert_close(found, reference.sylvester(p, q, rhs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_bad_sylvester_problem_is_named(which, run):
    backend, device = run
    tensors = [positive((40,), 4, torch.float64, device) for _ in range(3)]
    tensors[which][19, 3, 0] = NAN
    with pytest.raises(ValueError, match="matrix 19 holds NaN or infinite"):
        sylvester(*tensors, backend=backend)


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_a_problem_without_convergence_is_named(monkeypatch):
    monkeypatch.setattr(drivers, "_entry", lambda *_: lambda *_: (2, 5))
    eye = torch.eye(3).expand(7, 3, 3)
    with pytest.raises(RuntimeError, match="did not converge for matrix 5"):
        sylvester(eye, eye, eye, backend="cpp")


def test_arguments():
    eye = torch.eye(3)
    for op in (cholesky, lambda a, **to: cholesky_solve(a, a, **to)):
        with pytest.raises(TypeError, match="matrices has dtype bfloat16"):
            op(eye.bfloat16())
        with pytest.raises(ValueError, match=r"must be \(..., n, n\)"):
            op(torch.zeros(3, 4))
        if HAS_CPP:
            with pytest.raises(RuntimeError, match="order 200 exceeds 128"):
                op(torch.eye(200), backend="cpp")
    with pytest.raises(ValueError, match="rhs has shape"):
        cholesky_solve(eye, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="rhs has shape"):
        cholesky_solve(eye.expand(2, 3, 3), torch.zeros(3, 5))
    with pytest.raises(TypeError, match="rhs has dtype float64"):
        cholesky_solve(eye, eye.double())
    with pytest.raises(ValueError, match="q has shape"):
        sylvester(eye, eye.expand(2, 3, 3), eye)
    with pytest.raises(ValueError, match="rhs has shape"):
        sylvester(eye, torch.eye(4), torch.zeros(4, 3))
    with pytest.raises(TypeError, match="q has dtype float64"):
        sylvester(eye, eye.double(), eye)
    if HAS_CPP:
        with pytest.raises(RuntimeError, match="order 200 exceeds 128"):
            sylvester(eye, torch.eye(200), torch.zeros(3, 200), backend="cpp")


@pytest.mark.parametrize("run", RUNS)
def test_registration_is_sound(run):
    backend, device = run
    for batch in [(3,), (0,), ()]:
        a, q = positive(batch, 5, torch.float64, device), positive(batch, 3, torch.float64, device)
        rhs = torch.randn(*batch, 5, 3, dtype=torch.float64).to(device)
        torch.library.opcheck(torch.ops.lora_kernels.cholesky.default, (a.clone(), a, backend))
        torch.library.opcheck(torch.ops.lora_kernels.cholesky_solve.default, (rhs.clone(), a, rhs, backend))
        torch.library.opcheck(torch.ops.lora_kernels.sylvester.default, (rhs.clone(), a, q, rhs, backend))


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
def test_threads_do_not_change_bits():
    a, rhs = positive((100,), 12, torch.float64), torch.randn(100, 12, 30, dtype=torch.float64)
    q = positive((100,), 30, torch.float64)
    one, two = bits_with_threads(lambda: (cholesky_solve(a, rhs, backend="cpp"), sylvester(a, q, rhs, backend="cpp")))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
