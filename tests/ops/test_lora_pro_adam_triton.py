"""The Triton kernels of the LoRA-Pro Adam op in the interpreter (CPU), or for real where there is a GPU."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from lora_kernels.ops import lora_pro_adam_, use_backend
from lora_kernels.ops._tiles import is_aligned
from lora_kernels.ops.lora_pro_adam import config, kernel, op, reference
from lora_kernels.ops.lora_pro_adam.config import Adam
from tests.helpers import accuracy
from tests.helpers.accuracy import assert_accurate, rounding
from tests.ops.lora_pro_cases import BETAS, EPS, EXACT, SCALING, batch, check, make, whole_numbers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = Adam(SCALING, *BETAS, EPS, 3, 0, 0)
TINY = config.ProConfig(16, 16, 1, 1)


def to_device(*groups):
    return tuple(tuple(each.to(DEVICE) for each in group) for group in groups)


def run(moments, factors, tiles=TINY, parts=None, numbers=NUMBERS, seed=None):
    a, b = factors[:2]
    bt_h, h_at = torch.empty(a.shape, device=DEVICE), torch.empty(b.shape, device=DEVICE)
    states, matrices = ([tensor.unsqueeze(0) for tensor in group] for group in (moments, factors))
    kernel.lora_pro_adam(states, matrices, numbers, seed, bt_h[None], h_at[None], tiles, parts)
    return bt_h, h_at


@pytest.mark.parametrize("parts", [None, (1, 1), (2, 3), (99, 99)], ids=str)
@pytest.mark.parametrize("rows, columns, rank", [(1, 1, 1), (7, 5, 2), (17, 70, 5), (50, 33, 24), (64, 48, 16)])
def test_matches_float64(rows, columns, rank, parts, poisoned_memory):
    moments, factors = to_device(*make(rows, columns, rank))
    truth = reference.lora_pro_adam(*moments, *factors, scaling=SCALING, betas=BETAS, eps=EPS, step=3)
    check((*moments, *run(moments, factors, TINY, parts)), truth, rows, columns, rank)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_each_of_its_layers(state, poisoned_memory):
    moments, factors = batch(3, 37, 50, 4, state=state)
    wide = [moment.transpose(0, 1).reshape(37, 150).to(DEVICE, copy=True) for moment in moments]
    mine = [moment.view(37, 3, 50).transpose(0, 1) for moment in wide]
    factors = to_device(factors)[0]
    numbers, seed = Adam(SCALING, *BETAS, EPS, 3, 11, 60), torch.tensor([5]) if state == torch.bfloat16 else None
    results = torch.empty_like(factors[0]), torch.empty_like(factors[1])
    kernel.lora_pro_adam(mine, factors, numbers, seed, *results, TINY, (2, 2))
    for layer in range(3):
        one = [moment[layer].to(DEVICE) for moment in moments]
        own = [factor[layer] for factor in factors]
        truth = reference.lora_pro_adam(*one, *own, scaling=SCALING, betas=BETAS, eps=EPS, step=3)
        alone = run(one, own, TINY, (2, 2), Adam(SCALING, *BETAS, EPS, 3, 11 + 60 * layer, 0), seed)
        found = [tensor[layer] for tensor in (*mine, *results)]
        check(found, truth, 37, 50, 4, state=state)
        assert all(torch.equal(*pair) for pair in zip(found, (*one, *alone), strict=True))


def apart(pairs, rows, columns, state):
    """Moments of pairs, each in a matrix of its own: as wide, or wider and starting where no vector does."""
    for number in range(pairs):
        wide = [torch.full((rows, columns + 8 * number), -7.0, dtype=state, device=DEVICE) for _ in range(2)]
        yield tuple(each[:, number : number + columns].unsqueeze(0) for each in wide)


@pytest.mark.parametrize("most", [2**29, 1], ids=["one launch", "launches"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_whose_moments_lie_apart(state, most, poisoned_memory, monkeypatch):
    """In one launch, or in several where temporaries are large, they get what each gets alone."""
    monkeypatch.setattr(kernel, "_MOST_BYTES", most)
    starts, factors = batch(4, 37, 50, 4, state=state)
    factors = to_device(factors)[0]
    mine, theirs = (list(apart(4, 37, 50, state)) for _ in range(2))
    for pairs in (mine, theirs):
        for pair, *values in zip(pairs, *starts, strict=True):
            for moment, value in zip(pair, values, strict=True):
                moment[0].copy_(value)
    seeds = torch.tensor([3, -4, 2**40, 0]) if state == torch.bfloat16 else None
    results = torch.empty_like(factors[0]), torch.empty_like(factors[1])
    kernel.adam_pairs(mine, factors, NUMBERS, seeds, *results, TINY, (2, 2))
    for layer, pair in enumerate(theirs):
        own, seed = [factor[layer] for factor in factors], None if seeds is None else seeds[layer : layer + 1]
        truth = reference.lora_pro_adam(
            *(start[layer].to(DEVICE) for start in starts), *own, scaling=SCALING, betas=BETAS, eps=EPS, step=3
        )
        alone = run([moment[0] for moment in pair], own, TINY, (2, 2), NUMBERS, seed)
        found = (*(moment[0] for moment in mine[layer]), *(result[layer] for result in results))
        check(found, truth, 37, 50, 4, state=state)
        assert all(torch.equal(*both) for both in zip(found, (*(moment[0] for moment in pair), *alone), strict=True))
        outside = [moment._base for moment in mine[layer]]
        assert all(int((each == -7).sum()) == 37 * 8 * layer for each in outside)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_of_an_optimizer_are_those_of_the_other_backends(state):
    """Numbers are exact: what differs is a wrong bit."""
    made = [whole_numbers(21, 50, 4, state) for _ in range(3)]
    factors = [torch.stack([factors[i] for _, factors in made]) for i in range(4)]
    numbers, found = {**EXACT, "eps": EPS, "step": 2, "row_offset": 5, "row_step": 30}, []
    for backend in ("torch", "triton"):
        where = DEVICE if backend == "triton" else "cpu"
        moments = [tuple(moment.to(where, copy=True).unsqueeze(0) for moment in moments) for moments, _ in made]
        mine = tuple(factor.to(where) for factor in factors)
        # As experts have them: not contiguous.
        out = torch.zeros(4, 3, 50, device=where).transpose(0, 1), torch.zeros(3, 21, 4, device=where)
        with use_backend(backend):
            op.adam_pairs(moments, mine, out, numbers, [7, 8, 2**62] if state == torch.bfloat16 else None)
        found.append(([moment.cpu() for pair in moments for moment in pair], [each.cpu() for each in out]))
    (first, ours), (second, theirs) = found
    assert all(torch.equal(*both) for both in zip(first, second, strict=True))
    assert all(
        torch.allclose(*both, rtol=1e-5, atol=1e-5) and bool(both[0].any()) for both in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("rank", [3, 20, 50, 100])
def test_shipped_configurations(rank):
    for stochastic in (False, True):
        moments, factors = to_device(*make(70, 37, rank, state=torch.bfloat16 if stochastic else torch.float32))
        truth = reference.lora_pro_adam(*moments, *factors, scaling=SCALING, betas=BETAS, eps=EPS, step=3)
        width = config.rank_for(rank)
        assert width >= rank and width in config.RANKS
        seed = torch.tensor([1]) if stochastic else None
        results = run(moments, factors, config.config_for(width, stochastic), seed=seed)
        check((*moments, *results), truth, 70, 37, rank, state=moments[0].dtype)


def tensor_core(a, b, acc, precision, _upcast):
    """`dot` as tensor cores form it: operands cut to tf32, blocks added exactly, each partial sum rounded to zero."""
    assert precision == "tf32"
    left, right = ((each.handle.data.view(np.int32) & -0x2000).view(np.float32).astype(float) for each in (a, b))
    total = acc.handle.data
    for first in range(0, left.shape[1], 4):
        exact = total + left[:, first : first + 4] @ right[first : first + 4]
        total = exact.astype(np.float32)
        away = abs(total.astype(float)) > abs(exact)
        total = np.where(away, np.nextafter(total, np.float32(0)), total)
    return tl.core.tensor(TensorHandle(total, acc.handle.dtype), acc.type)


@pytest.mark.skipif(DEVICE == "cuda", reason="models a GPU")
@pytest.mark.parametrize("rank", [16, 40])
def test_three_products_of_tensor_cores_have_the_accuracy_of_float32(rank, monkeypatch):
    monkeypatch.setattr(accuracy, "TRUNCATES", True)
    monkeypatch.setattr(kernel, "dot", tensor_core)
    moments, factors = make(130, 500, rank)
    truth = reference.lora_pro_adam(*moments, *factors, scaling=SCALING, betas=BETAS, eps=EPS, step=3)
    start = [each.clone() for each in moments]
    results = run(moments, factors, config.config_for(config.rank_for(rank), False))
    check((*moments, *results), truth, 130, 500, rank)
    # One product has not.
    monkeypatch.setattr(kernel, "precision_for", lambda _platform: "tf32")
    results = run(start, factors, config.config_for(config.rank_for(rank), False))
    for one, exact in zip((*start, *results), truth, strict=True):
        with pytest.raises(AssertionError, match="but must be at most"):
            assert_accurate(one, exact, 2 * rounding(torch.float32, 500))


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 12345])
def test_same_bits_as_the_other_backends(seed):
    """All numbers but the random ones are exact: what differs is a wrong bit."""
    moments, factors = whole_numbers(37, 50, 4)
    mine = to_device(moments)[0] if DEVICE == "cuda" else [each.clone() for each in moments]
    theirs = {"torch": [each.clone() for each in moments]}
    for step in (1, 2, 2**32 - 1):
        call = {**EXACT, "step": step, "seed": seed, "row_offset": 2**32 - 50}
        lora_pro_adam_(*mine, *(each.to(DEVICE) for each in factors), **call, backend="triton")
        for name, states in theirs.items():
            lora_pro_adam_(*states, *factors, **call, backend=name)
            assert torch.equal(states[0], mine[0].cpu()) and torch.equal(states[1], mine[1].cpu())
    assert float(mine[0].float().abs().max()) > 0


def test_repeats_bit_for_bit_and_rows_may_be_shared_out():
    moments, factors = to_device(*make(60, 70, 5))
    found = []
    for _ in range(2):
        mine = [each.clone() for each in moments]
        found.append((*mine, *run(mine, factors, parts=(2, 2))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    a, b, grad_a, grad_b = factors
    total = torch.zeros_like(found[0][2])
    for part in (slice(0, 20), slice(20, 60)):
        rows = [each[part] for each in moments]
        bt_h, h_at = run(rows, (a, b[part], grad_a, grad_b[part]))
        total += bt_h
        assert_accurate(h_at, found[0][3][part], 2 * rounding(torch.float32, 70))  # both are rounded
    assert_accurate(total, found[0][2], 2 * rounding(torch.float32, 60))
    for one, other in zip(moments, found[0][:2], strict=True):
        assert_accurate(one, other, 2 * rounding(torch.float32, 2 * 5 + 1))


def test_memory_beyond_the_matrix_is_left_alone():
    wide = [torch.full((33, 60), -7.0, device=DEVICE) for _ in range(2)]
    moments, factors = to_device(*make(30, 45, 5))
    views = [each[:30, 3:48].copy_(moment) for each, moment in zip(wide, moments, strict=True)]
    run(views, factors)
    outside = torch.ones(33, 60, dtype=torch.bool, device=DEVICE)
    outside[:30, 3:48] = False
    for each, view, moment in zip(wide, views, moments, strict=True):
        assert bool((each[outside] == -7).all())
        assert float((view - moment).abs().max()) > 0.1


def test_a_nan_goes_where_it_must_and_nowhere_else():
    moments, (a, b, grad_a, grad_b) = to_device(*make(37, 50, 4))
    row = grad_b.clone()
    row[5, 1] = torch.nan
    found = [each.clone() for each in moments]
    bt_h, h_at = run(found, (a, b, grad_a, row))
    expected = torch.zeros(37, dtype=torch.bool, device=DEVICE)
    expected[5] = True
    for each in (*found, h_at):
        assert torch.equal(each.isnan().all(1), expected) and torch.equal(each.isnan().any(1), expected)
    assert bool(bt_h.isnan().all())
    states = [each.bfloat16() for each in moments]
    run(states, (a, b, grad_a, row), seed=torch.tensor([3]))
    for each in states:
        assert torch.equal(each.isnan().all(1), expected) and torch.equal(each.isnan().any(1), expected)


class NoLaunch:
    def __getitem__(self, _grid):
        return lambda *_args, **_kwargs: None


def test_nothing_of_the_size_of_the_matrix_is_made(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Total(TorchDispatchMode):
        made = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.made[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
            return out

    for name in ("join_kernel", "adam_kernel", "sum_slabs_kernel"):
        monkeypatch.setattr(kernel, name, NoLaunch())
    monkeypatch.setattr(kernel, "processors", lambda _device: 132)
    moments = torch.empty(8192, 8192), torch.empty(8192, 8192)  # never touched
    factors = [torch.empty(shape) for shape in ((16, 8192), (8192, 16), (16, 8192), (8192, 16))]
    with Total() as total:
        run(moments, factors, None)
    known = {each.untyped_storage().data_ptr() for each in (*moments, *factors)}
    made = sum(size for place, size in total.made.items() if place not in known)
    assert 0 < made < 0.05 * sum(each.nbytes for each in moments)


def test_parts_fill_the_chip_and_cover_the_matrix():
    for tall, wide in ((1, 1), (16, 64), (64, 256), (3, 200), (200, 3), (1000, 1000)):
        for processors in (4, 132):
            blocks, steps = config.parts_for(tall, wide, processors)
            assert 1 <= blocks <= min(tall, 8) and 1 <= steps <= min(wide, 32)
            programs = -(-tall // blocks) * -(-wide // steps)
            assert 2 * programs >= min(3 * processors, 2 * tall * -(-wide // 4))
    assert config.parts_for(1000, 1000, 132) == (8, 32)  # large: whole slabs


def test_precision_is_that_of_float32_unless_the_user_allows_less(monkeypatch):
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert config.precision_for("cuda") == "tf32x3" and config.precision_for("hip") == "ieee"
        matmul.allow_tf32 = True
        assert config.precision_for("cuda") == "tf32" and config.precision_for("hip") == "ieee"
    finally:
        matmul.allow_tf32 = before


def test_alignment_and_refusals():
    wide = torch.zeros(40, 64)
    assert is_aligned(wide, wide[:, :32]) and not is_aligned(wide, wide[:, :31])
    assert not is_aligned(wide[:, 1:33]) and not is_aligned(torch.zeros(4, 33)[:, :32])
    if DEVICE == "cpu":
        assert op.adam.choose("auto", wide, wide, wide[:4]) != "triton"
    with pytest.raises(RuntimeError, match="triton: takes no float64"):
        op.adam.choose("triton", wide.double().to(DEVICE), wide, wide[:4])
    with pytest.raises(RuntimeError, match="triton: takes ranks up to 128, not 129"):
        op.adam.choose("triton", wide.to(DEVICE), wide, torch.zeros(129, 64))


def test_registration_is_sound():
    moments, factors = to_device(*make(20, 18, 3))
    results = torch.empty(3, 18, device=DEVICE), torch.empty(20, 3, device=DEVICE)
    torch.library.opcheck(
        torch.ops.lora_kernels.lora_pro_adam_.default,
        (*moments, *factors, *results, 0.5, 0.9, 0.999, 1e-8, 3, None, 0, 20, "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("rows, columns, rank", [(1024, 2752, 16), (513, 777, 5), (4096, 4096, 64), (1024, 1024, 128)])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_on_gpu_error_is_within_twice_that_of_torch(rows, columns, rank, state):
    moments, factors = to_device(*make(rows, columns, rank, state=state))
    call = {"scaling": SCALING, "betas": BETAS, "eps": EPS, "step": 3}
    truth = reference.lora_pro_adam(*moments, *factors, **call)
    plain = reference.lora_pro_adam(*moments, *factors, **call, dtype=torch.float32)
    other = [each.clone() for each in moments]
    results = lora_pro_adam_(*moments, *factors, **call, seed=1, backend="triton")
    check(results, truth[2:], rows, columns, rank, plain[2:])
    again = lora_pro_adam_(*other, *factors, **call, seed=1, backend="triton")
    assert all(torch.equal(*pair) for pair in zip((*moments, *results), (*other, *again), strict=True))
