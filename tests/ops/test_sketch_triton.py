"""The Triton kernels in the interpreter (CPU), or for real where there is a GPU."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import project, random_matrix, sketch_
from lora_kernels.ops._rows import Selection, selection
from lora_kernels.ops._tiles import is_aligned, rank_for
from lora_kernels.ops.random_matrix import reference as draws
from lora_kernels.ops.random_matrix.reference import Omega
from lora_kernels.ops.sketch import kernel, reference
from lora_kernels.ops.skinny.config import SkinnyConfig
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["rademacher", "gaussian"]
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = SkinnyConfig(16, 32, 4, 2)
KEY = {"seed": -5, "stream": 2**32 - 3}
# A pair of bfloat16 numbers, of which the interpreter cuts off what it should round.
PAIR = 2.0**-17 if DEVICE == "cuda" else 2.0**-15


def bound_for(left, right, kind):
    """Sums over tokens of sums over columns, in float32.

    P is a pair for bfloat16 rows on the left, and so is a gaussian Omega for those on the right. Float32 draws from the
    normal distribution are right to 1e-6.
    """
    pairs = (left.dtype == torch.bfloat16) + (right.dtype == torch.bfloat16 and kind == "gaussian")
    tokens = left[..., 0].numel()
    sums = rounding(torch.float32, tokens) + rounding(torch.float32, right.shape[-1])
    return sums + pairs * PAIR + (1e-6 if kind == "gaussian" else 0.0)


def run(left, right, k, weight, kind="rademacher", configs=(TINY, TINY), chunk=None, least=1024):
    out, total = torch.zeros(left.shape[1], k, device=DEVICE), torch.zeros(left.shape[1], device=DEVICE)
    omega = Omega(kind, **KEY)
    kernel.sketch(out, left, right, selection(weight), total, omega, configs=configs, chunk=chunk, least=least)
    return out, total


def view(tokens, features, dtype):
    """Rows of a wider matrix that start anywhere."""
    return torch.randn(tokens, 2 * features, device=DEVICE).to(dtype)[:, features // 2 : features // 2 + features]


def make_weight(kind, tokens):
    weight = {
        "none": None,
        "bool": torch.rand(tokens) < 0.6,
        "dense": torch.rand(tokens) + 0.1,
        "sparse": torch.randn(tokens) * (torch.rand(tokens) < 0.6),
    }[kind]
    return None if weight is None else weight.to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "tokens, height, width, k, weighting",
    [
        (1, 17, 0, 4, "dense"),
        (5, 1, 33, 9, "none"),
        (37, 50, 0, 24, "bool"),
        (37, 50, 0, 24, "sparse"),
        (65, 20, 70, 70, "none"),
        (65, 20, 70, 70, "sparse"),
        (100, 33, 1, 131, "dense"),
    ],
)
def test_sketch_matches_float64(tokens, height, width, k, dtype, kind, weighting, poisoned_memory):
    """Where the width is 0, left and right are one tensor."""
    left = view(tokens, height, dtype)
    right = view(tokens, width, dtype) if width else left
    weight = make_weight(weighting, tokens)
    truth, total_truth = reference.sketch(left, right, k, weight, **KEY, kind=kind)
    terms = (left.double() * (1.0 if weight is None else weight.unsqueeze(-1))).square().sum(0).sqrt()
    bound = bound_for(left, right, kind)
    for chunk, least in ((None, 1024), (None, 16), (64, 16)):  # one stage, two over splits, chunks of tokens as well
        out, total = run(left, right, k, weight, kind, chunk=chunk, least=least)
        assert_accurate(out, truth, bound)
        assert_accurate(total, total_truth, rounding(torch.float32, tokens), terms=terms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, width, k", [(1, 17, 4), (5, 1, 33), (37, 150, 24), (20, 65, 131)])
def test_projection_matches_float64(tokens, width, k, dtype, kind, poisoned_memory):
    a = view(tokens, width, dtype)
    truth = reference.project(a, k, **KEY, kind=kind)
    for least in (1024, 16):
        out = torch.empty(tokens, k, device=DEVICE)
        kernel.project(out, a, Omega(kind, **KEY), config=TINY, least=least)
        assert_accurate(out, truth, bound_for(out[:1], a, kind))


@pytest.mark.parametrize("columns", [1, 16, 31, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_omega_is_the_random_matrix(kind, columns):
    """Every place of a word of Philox, by a product with the identity, which is exact for signs."""
    key = {"seed": 2**64 - 9, "stream": 7}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = project(torch.eye(20, device=DEVICE, dtype=dtype), columns, kind=kind, **key, backend="triton").cpu()
        if kind == "rademacher":
            assert torch.equal(found, draws.random_matrix(20, columns, "rademacher", **key, dtype=torch.float32))
        else:
            rest = PAIR if dtype == torch.bfloat16 else 2.0**-20
            drawn = random_matrix(20, columns, kind=kind, **key, device=DEVICE, backend="triton").cpu()
            assert float((found - drawn).abs().max()) <= rest * float(drawn.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_keys_matter(kind):
    a = torch.randn(20, 30, device=DEVICE)
    first = project(a, 8, seed=1, stream=1, kind=kind, backend="triton")
    for other in ({"seed": 2, "stream": 1}, {"seed": 1, "stream": 2}, {"seed": 1 + 2**32, "stream": 1}, {"seed": 1}):
        assert relative_error(project(a, 8, **other, kind=kind, backend="triton"), first) > 0.5


@pytest.mark.parametrize("weighting", ["none", "bool", "sparse"])
@pytest.mark.parametrize(
    "left_dtype, right_dtype",
    list(itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2)),
    ids=str,
)
def test_op_matches_float64(left_dtype, right_dtype, weighting):
    left = torch.randn(3, 15, 21, device=DEVICE).to(left_dtype)
    right = torch.randn(3, 15, 18, device=DEVICE).to(right_dtype)
    weight = make_weight(weighting, 45)
    weight = None if weight is None else weight.reshape(3, 15)
    for kind, two in itertools.product(KINDS, (right, left)):
        out, total = torch.zeros(21, 10, device=DEVICE), torch.zeros(21, device=DEVICE)
        sketch_(out, left, two, weight, **{**KEY, "kind": kind}, column_sum=total, backend="triton")
        truths = reference.sketch(left, two, 10, weight, **KEY, kind=kind)
        assert_accurate(out, truths[0], bound_for(left, two, kind))
        assert_accurate(total, truths[1], rounding(torch.float32, 45))


@pytest.mark.parametrize("weighting", ["bool", "float"])
def test_masked_rows_may_hold_anything(weighting):
    left, right = torch.randn(40, 20, device=DEVICE), torch.randn(40, 12, device=DEVICE)
    keep = (torch.arange(40) % 3 != 0).to(DEVICE)
    dirty_left, dirty_right = left.clone(), right.clone()
    dirty_left[~keep], dirty_right[~keep] = float("nan"), float("inf")
    weight = keep if weighting == "bool" else keep.double()
    for one, two, clean in ((dirty_left, dirty_right, right), (dirty_left, dirty_left, left)):
        out, total = torch.zeros(20, 7, device=DEVICE), torch.zeros(20, device=DEVICE)
        sketch_(out, one, two, weight, seed=1, column_sum=total, backend="triton")
        truths = reference.sketch(left, clean, 7, keep, seed=1)
        assert_accurate(out, truths[0], bound_for(left, clean, "rademacher"))
        assert_accurate(total, truths[1], rounding(torch.float32, 40))


def test_everything_masked_or_empty_changes_nothing():
    nothing = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    for tokens, mask in ((4, nothing), (0, None)):
        out, total = torch.full((9, 3), 3.0, device=DEVICE), torch.full((9,), 2.0, device=DEVICE)
        left, right = torch.randn(tokens, 9, device=DEVICE), torch.randn(tokens, 5, device=DEVICE)
        sketch_(out, left, right, mask, seed=0, column_sum=total, backend="triton")
        assert bool((out == 3.0).all()) and bool((total == 2.0).all())
    for a, k in ((torch.zeros(4, 0), 3), (torch.zeros(4, 5), 0), (torch.zeros(0, 5), 3)):
        assert project(a.to(DEVICE), k, seed=0, backend="triton").tolist() == torch.zeros(len(a), k).tolist()


def test_nothing_to_multiply_leaves_the_sum():
    for width, k in ((0, 3), (5, 0), (0, 0)):
        out, total = torch.full((3, k), 7.0, device=DEVICE), torch.zeros(3, device=DEVICE)
        left, right = torch.ones(4, 3, device=DEVICE), torch.zeros(4, width, device=DEVICE)
        sketch_(out, left, right, seed=0, column_sum=total, backend="triton")
        assert bool((out == 7.0).all()) and bool((total == 4.0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_adds_to_what_is_there_and_repeats_bit_for_bit(kind):
    left, right = torch.randn(90, 40, device=DEVICE), torch.randn(90, 50, device=DEVICE)
    weight = torch.rand(90, device=DEVICE)
    first, second = (run(left, right, 24, weight, kind, least=16) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    out, parts = first[0].clone(), torch.zeros_like(first[0])
    kernel.sketch(out, left, right, Selection(None, weight), None, Omega(kind, **KEY), configs=(TINY, TINY))
    bound = 2 * bound_for(left, right, "rademacher")  # both are rounded, with the same draws
    assert_accurate(out, 2 * first[0], bound)
    for part in (slice(0, 33), slice(33, 90)):
        sketch_(parts, left[part], right[part], weight[part], **KEY, kind=kind, backend="triton")
    assert_accurate(parts, first[0], bound)


def test_bfloat16_products_are_exact():
    """Small integers: exact in bfloat16 and in pairs of them, so that any wrong reading of their bits shows."""
    left, right = (torch.randint(-8, 9, (50, side), device=DEVICE).to(torch.bfloat16) for side in (37, 20))
    for one, two in ((left, right), (left, left)):
        truths = reference.sketch(one, two, 24, **KEY)
        found = run(one, two, 24, None)
        assert torch.equal(found[0].double(), truths[0]) and torch.equal(found[1].double(), truths[1])


def test_pairs_keep_more_than_bfloat16():
    """P rounded to bfloat16 alone would be off by 2^-9."""
    x = torch.randn(200, 40, device=DEVICE).to(torch.bfloat16)
    found, _ = run(x, x, 16, None)
    assert relative_error(found, reference.sketch(x, x, 16, **KEY)[0]) < PAIR


def test_a_narrow_exponent_is_no_limit():
    """Projections of large float16 rows exceed float16."""
    x = torch.full((30, 40), 6e4, device=DEVICE).half()
    for kind in KINDS:
        truth = reference.sketch(x, x, 16, **KEY, kind=kind)[0]
        # Omega is a sum of columns first: equal entries cancel, and what is left of them is rounded like their sizes.
        assert_accurate(run(x, x, 16, None, kind)[0], truth, 3 * bound_for(x, x, kind))


def test_memory_beyond_is_left_alone():
    wide = torch.full((40, 60), -7.0, device=DEVICE)
    left, right = torch.randn(40, 33, device=DEVICE), torch.randn(40, 30, device=DEVICE)
    for least, two in itertools.product((1024, 16), (left, right)):
        out = wide.clone()
        omega = Omega("rademacher", **KEY)
        kernel.sketch(out[:33, 5:26], left, two, Selection(), None, omega, configs=(TINY, TINY), least=least)
        truth = reference.sketch(left, two, 21, **KEY)[0]
        assert_accurate(out[:33, 5:26].double() + 7.0, truth, bound_for(left, two, "rademacher"))
        out[:33, 5:26] = -7.0
        assert torch.equal(out, wide)


SHIPPED = [each for each in vars(kernel).values() if isinstance(each, SkinnyConfig)]


@pytest.mark.parametrize("config", SHIPPED, ids=str)
def test_shipped_configurations(config):
    left, right = torch.randn(70, 140, device=DEVICE).half(), torch.randn(70, 150, device=DEVICE).half()
    if config in (kernel.SHRINK_SINGLE, kernel.TALL_SINGLE):
        left, right = left.float(), right.float()
    for kind, k in itertools.product(KINDS, (16, 40)):
        truth = reference.sketch(left, right, k, **KEY, kind=kind)[0]
        for configs in ((config, TINY), (TINY, config)):
            assert_accurate(run(left, right, k, None, kind, configs)[0], truth, bound_for(left, right, kind))


def test_configuration_depends_on_product_dtype_alignment_and_platform():
    half, single = torch.bfloat16, torch.float32
    assert kernel.config_for("shrink", half) == kernel.SHRINK
    assert kernel.config_for("shrink", single) == kernel.SHRINK_SINGLE
    assert kernel.config_for("shrink", single, aligned=False) == kernel.SHRINK_SINGLE
    assert kernel.config_for("shrink", half, aligned=False) == kernel.SHRINK_RAGGED
    assert kernel.config_for("tall", half) == kernel.TALL
    # The projections of float16 rows exceed float16: they are multiplied as float32.
    assert kernel.config_for("tall", torch.float16) == kernel.config_for("tall", single) == kernel.TALL_SINGLE
    assert kernel.config_for("tall", half, aligned=False) == kernel.TALL_RAGGED
    assert kernel.config_for("shrink", half, platform="hip") == kernel.SHRINK_AMD
    assert kernel.config_for("shrink", single, platform="hip") == kernel.SHRINK_AMD
    assert kernel.config_for("tall", half, aligned=False, platform="hip") == kernel.TALL_AMD


def test_tiling_of_columns():
    assert rank_for(1) == (16, 1) and rank_for(17) == (32, 1) and rank_for(64) == (64, 1)
    assert rank_for(65) == (64, 2) and rank_for(300) == (64, 5)


def test_alignment_is_that_of_width_stride_and_address():
    wide = torch.zeros(40, 64, dtype=torch.float16)
    assert is_aligned(wide[:, :32]) and is_aligned(wide[:, 8:56])  # 8 elements are 16 bytes
    assert not is_aligned(wide[:, 4:36]) and not is_aligned(wide[:, :33])
    assert not is_aligned(torch.zeros(40, 65)[:, :32])


def test_chunks_of_tokens_fit_the_cache():
    for tokens, row_bytes, cache in ((1, 2, 2**25), (4096, 8192, 50 * 2**20), (2**20, 28672, 40 * 2**20)):
        chunk = kernel.token_chunk(tokens, row_bytes, cache)
        assert chunk % 64 == 0 and chunk >= 64
        assert chunk * row_bytes <= max(cache // 2, 2**24) + 64 * row_bytes
    assert kernel.token_chunk(1000, 100, 2**25) >= 1000, "a batch that fits is not cut"


def test_registration_is_sound():
    left, right = torch.randn(20, 18, device=DEVICE), torch.randn(20, 16, device=DEVICE)
    out, total, checks = torch.zeros(18, 5, device=DEVICE), torch.zeros(18, device=DEVICE), ("test_schema",)
    checks = (*checks, "test_faketensor")
    for arguments in (
        (out, left, right, None, total, "rademacher", 1, 2, "triton"),
        (out, left, left, torch.rand(20, device=DEVICE), None, "gaussian", 1, 2, "triton"),
    ):
        torch.library.opcheck(torch.ops.lora_kernels.sketch_.default, arguments, test_utils=checks)
    arguments = (torch.empty(20, 5, device=DEVICE), left, "rademacher", 1, 2, "triton")
    torch.library.opcheck(torch.ops.lora_kernels.project.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("features, k", [(129, 7), (1024, 64), (4096, 24), (4096, 128)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_gpu_error_is_that_of_float32(features, k, dtype, kind):
    x = torch.randn(3001, features, device="cuda").to(dtype)
    g = torch.randn(3001, 500, device="cuda").to(dtype)
    for weight, (left, right) in itertools.product((None, torch.rand(3001, device="cuda") < 0.8), ((x, x), (g, x))):
        out, total = torch.zeros(left.shape[1], k, device="cuda"), torch.zeros(left.shape[1], device="cuda")
        sketch_(out, left, right, weight, seed=3, kind=kind, column_sum=total, backend="triton")
        truths = reference.sketch(left, right, k, weight, seed=3, kind=kind)
        assert_accurate(out, truths[0], bound_for(left, right, kind))
        assert_accurate(total, truths[1], rounding(torch.float32, 3001))


@pytest.mark.gpu
def test_on_gpu_signs_are_those_of_the_cpu():
    for k in (5, 64, 200):
        made = project(torch.eye(300, device="cuda"), k, seed=9, stream=1, backend="triton")
        assert torch.equal(made.cpu(), draws.random_matrix(300, k, "rademacher", seed=9, stream=1, dtype=torch.float32))
