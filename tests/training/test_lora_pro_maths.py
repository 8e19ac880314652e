"""The adjustment: what it minimises, and both modes against the book, over ragged shapes."""

import pytest
import torch

from lora_kernels.training.lora_pro.adjustment import Adjustment
from lora_kernels.training.lora_pro.buckets import Bucket, Layout, Scratch
from tests.conftest import relative_error
from tests.training.lora_pro_cases import (
    SHAPES,
    ByTheBook,
    adjusted,
    factors,
    full_gradients,
    optimizer_for,
    set_gradients,
)


def adjust(a, b, scaling, damping, *, cross=True):
    """The library's adjustment of one pair with its `.grad`."""
    with torch.no_grad():
        bucket = Bucket([0], [scaling], [(a, b)], Layout()).fill(Scratch(), 0)
        Adjustment([bucket], torch.tensor([scaling], dtype=torch.float64), damping)(cross=cross)
    return bucket.out_a[0].clone(), bucket.out_b[0].clone()


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
@pytest.mark.parametrize("scaling", [0.25, 3.0, -1.0])
def test_no_other_pair_moves_the_weight_closer_to_the_full_gradient(shape, scaling):
    (a, b), (g,) = factors([shape], torch.float64)[0], full_gradients(3, [shape])
    set_gradients([(a, b)], scaling, 3, [shape])
    d_a, d_b = adjust(a, b, scaling, 0.0)
    a, b, (m, n, _) = a.detach(), b.detach(), shape
    moved = scaling * (b @ d_a + d_b @ a)
    # vec(s B dA + s dB A) as one dense matrix: rows of G one after another.
    eye = torch.eye
    dense = scaling * torch.cat(
        [
            torch.kron(b, eye(n, dtype=b.dtype)),
            torch.kron(eye(m, dtype=b.dtype), a.T.clone(memory_format=torch.contiguous_format)),
        ],
        dim=1,
    )
    best = torch.linalg.lstsq(dense, g.reshape(-1, 1), driver="gelsd").solution
    assert relative_error(moved, (dense @ best).reshape(m, n)) < 1e-10
    assert float((g * moved).sum()) >= 0.0  # the loss does not rise, to first order
    assert float(((g - moved) * moved).sum().abs()) < 1e-10 * float(g.square().sum())  # a projection


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
@pytest.mark.parametrize("cross", [True, False])
def test_adjustment_is_the_closed_form_and_its_x_terms_leave_the_product_alone(shape, cross):
    a, b = factors([shape], torch.float64, b_scale=1e-4)[0]  # B^T B is near the damping
    set_gradients([(a, b)], 0.7, 5, [shape])
    found = adjust(a, b, 0.7, 1e-8, cross=cross)
    for one, other in zip(found, adjusted(a, b, a.grad, b.grad, 0.7, cross=cross), strict=True):
        assert relative_error(one, other) < 1e-9
    plain = adjust(a, b, 0.7, 1e-8, cross=False)
    product = [b.detach() @ d_a + d_b @ a.detach() for d_a, d_b in (found, plain)]
    assert relative_error(product[0], product[1]) < 1e-9


def test_gradients_that_come_from_no_one_full_gradient_are_taken_as_they_are():
    a, b = factors([(13, 17, 4)], torch.float64)[0]
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)  # clipped one by one, say
    for one, other in zip(adjust(a, b, 2.0, 1e-8), adjusted(a, b, a.grad, b.grad, 2.0), strict=True):
        assert relative_error(one, other) < 1e-9


def test_a_zero_b_takes_the_gradient_of_a_as_it_is_whatever_the_gradient():
    a, b = factors([(13, 17, 4)], b_scale=0.0)[0]
    a.grad, b.grad = 1e-6 * torch.randn_like(a), torch.randn_like(b)  # noise in what should be zero
    d_a, d_b = adjust(a, b, 2.0, 1e-8)
    assert torch.equal(d_a, a.grad)
    assert relative_error(d_b, adjusted(a, b, a.grad, b.grad, 2.0)[1]) < 1e-5


@pytest.mark.parametrize("damping", [0.0, 1e-8])
def test_factors_that_lost_their_rank_stay_finite(damping):
    for which in range(2):
        pair = factors([(13, 17, 4)], torch.float64)[0]
        with torch.no_grad():
            for each in pair if which else pair[:1]:
                each.copy_(torch.zeros_like(each))
        set_gradients([pair], 2.0, 1, [(13, 17, 4)])
        found = adjust(*pair, 2.0, damping)
        assert all(bool(each.isfinite().all()) for each in found)
    a, b = factors([(13, 17, 4)], torch.float64)[0]
    with torch.no_grad():
        b[:, 3], a[2] = b[:, 0], 0.0
    set_gradients([(a, b)], 2.0, 1, [(13, 17, 4)])
    d_a, d_b = adjust(a, b, 2.0, damping)
    assert bool(d_a.isfinite().all() and d_b.isfinite().all())
    assert max(float(d_a.abs().max()), float(d_b.abs().max())) < 1e3


@pytest.mark.parametrize("which", ["few rows of B", "few columns of A", "equal rows of A", "product", "nearly"])
def test_rounding_errors_in_lost_directions_are_not_raised(which):
    """Float32 gradients against the pseudo-inverse of the same factors in float64, with exact gradients."""
    shape = {"few rows of B": (2, 17, 5), "few columns of A": (19, 3, 5)}.get(which, (19, 17, 5))
    a, b = factors([shape], torch.float64, b_scale=5.0)[0]
    with torch.no_grad():
        if which == "equal rows of A":
            a[3] = a[1]
        if which == "product":
            b.copy_(b[:, :2] @ torch.randn(2, 5, dtype=b.dtype))
        if which == "nearly":  # a product, but for what float32 gradients cannot resolve
            u, s, v = torch.linalg.svd(b, full_matrices=False)
            b.copy_(u @ torch.diag(s * torch.tensor([1.0, 1.0, 2e-7, 2e-7, 2e-7])) @ v)
    a, b = (torch.nn.Parameter(each.detach().float()) for each in (a, b))
    set_gradients([(a, b)], 2.0, 1, [shape])
    found = adjust(a, b, 2.0, 1e-8)
    a64, b64, (g,) = a.detach().double(), b.detach().double(), full_gradients(1, [shape])
    if which in ("product", "nearly"):  # of rank 2 before it was rounded
        u, s, v = torch.linalg.svd(b64, full_matrices=False)
        b64 = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    left, right = torch.linalg.pinv(b64.T @ b64, rtol=1e-10), torch.linalg.pinv(a64 @ a64.T, rtol=1e-10)
    product = b64 @ left @ b64.T @ g + (torch.eye(len(b64)).double() - b64 @ left @ b64.T) @ g @ a64.T @ right @ a64
    moved = 2.0 * (b64 @ found[0].double() + found[1].double() @ a64)
    assert relative_error(moved, product) < 1e-4
    assert max(float(each.abs().max()) for each in found) < 5.0


def test_ill_conditioned_float32_factors_keep_their_small_directions():
    """Gram matrices in float32 would lose a direction whose singular value is 3e-4 of the largest."""
    a, b = factors([(200, 300, 8)], torch.float64)[0]
    with torch.no_grad():
        u, _, v = torch.linalg.svd(b, full_matrices=False)
        b.copy_(u @ torch.diag(torch.logspace(0, -3.5, 8, dtype=torch.float64)) @ v)
    a, b = (torch.nn.Parameter(each.detach().float()) for each in (a, b))
    set_gradients([(a, b)], 2.0, 1, [(200, 300, 8)])
    truth = adjusted(a, b, a.grad, b.grad, 2.0, damping=1e-8)
    for one, other in zip(adjust(a, b, 2.0, 1e-8), truth, strict=True):
        # Float32 factors of this condition; its square, which Gram matrices have, would leave nothing.
        assert relative_error(one, other) <= 10**3.5 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("mode", ["efficient", "full"])
@pytest.mark.parametrize("b_scale", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_trajectories_are_those_of_the_book(mode, b_scale, dtype, bound):
    scalings = [1.5, 0.5, 2.0, -1.0, 4.0]
    pairs = factors(dtype=dtype, b_scale=b_scale)
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = optimizer_for(pairs, scalings, mode=mode, **options)
    book = ByTheBook(pairs, scalings, 0.02, mode, **options)
    start = [(a.detach().clone(), b.detach().clone()) for a, b in pairs]
    for step in range(6):
        set_gradients(pairs, scalings, step)
        optimizer.step()
        book.step(full_gradients(step))
    for pair, truth, first in zip(pairs, book.pairs, start, strict=True):
        for found, wanted, before in zip(pair, truth, first, strict=True):
            assert relative_error(found.detach() - before, wanted - before) < bound


@pytest.mark.parametrize("mode", ["efficient", "full"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_short_parameters_move_by_float32_arithmetic_rounded_once(mode, dtype, bound):
    pairs = factors(dtype=dtype)
    start = [tuple(each.detach().clone() for each in pair) for pair in pairs]
    set_gradients(pairs, 2.0, 0)
    wide = [tuple(torch.nn.Parameter(each.detach().float()) for each in pair) for pair in pairs]
    for pair, copy in zip(pairs, wide, strict=True):
        for each, other in zip(pair, copy, strict=True):
            other.grad = each.grad.float()
    for each in (pairs, wide):
        optimizer_for(each, 2.0, mode=mode).step()
    for pair, copy, first in zip(pairs, wide, start, strict=True):
        for each, other, before in zip(pair, copy, first, strict=True):
            assert each.dtype == dtype and not torch.equal(each, before)
            assert bool(((each.float() - other).abs() <= bound * other.abs() + 1e-7).all())


def test_waves_of_pairs_change_nothing(monkeypatch):
    from lora_kernels.training.lora_pro import optimizer as module

    results = []
    for limit in (2**24, 300, 200):  # all pairs at once, or few, or one at a time
        monkeypatch.setitem(module._WAVE, "cpu", limit)
        pairs = factors(dtype=torch.float64)
        optimizer = optimizer_for(pairs)
        for step in range(3):
            set_gradients(pairs, 1.5, step)
            optimizer.step()
        set_gradients(pairs, 1.5, 3)
        waves = [[pair for bucket in wave for pair in bucket.parameters] for wave in optimizer._waves()]
        assert all(len(wave) == 1 or sum(a.numel() + b.numel() for a, b in wave) <= limit for wave in waves)
        results.append((waves, [each for pair in pairs for each in pair]))
    assert len(results[0][0]) == 3 <= len(results[1][0]) < len(results[2][0])
    for one, *others in zip(*(parameters for _, parameters in results), strict=True):
        assert all(relative_error(one.detach(), each.detach()) < 1e-12 for each in others)
