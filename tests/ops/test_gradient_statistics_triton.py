"""The Triton kernels in the interpreter (CPU), or for real where there is a GPU."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import _reduce, _tiles, gradient_statistics_
from lora_kernels.ops._rows import selection
from lora_kernels.ops._tiles import is_aligned
from lora_kernels.ops.gradient_statistics import kernel, reference
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = kernel.TileConfig(16, 16, 16, 4, 2)
TWO_HALVES = kernel.TileConfig(16, 256, 16, 4, 2)


def run(g, x, weight, config, least_chunk=1024):
    out = torch.zeros(g.shape[1], x.shape[1], device=DEVICE)
    index, factor = selection(weight)
    kernel.gradient_statistics(out, g, x, index, None if factor is None else factor.float(), config, least_chunk)
    return out


def squares(g, weight, least_chunk=256):
    out = torch.zeros(g.shape[1], device=DEVICE)
    _reduce.column_sums(out, g, None, weight, square=True, least_chunk=least_chunk)
    return out


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


@pytest.mark.parametrize("config", [TINY, TWO_HALVES], ids=["16x16", "16x256"])
@pytest.mark.parametrize("kind", ["none", "bool", "dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, height, width", [(1, 17, 4), (5, 1, 33), (37, 50, 24), (65, 20, 70), (100, 33, 1)])
def test_gradient_matches_float64(tokens, height, width, dtype, kind, config, poisoned_memory):
    g, x, weight = view(tokens, height, dtype), view(tokens, width, dtype), make_weight(kind, tokens)
    truth = reference.weight_gradient(g, x, weight)
    # Weighted rows are rounded to their dtype before the product.
    bound = rounding(torch.float32, tokens, dtype if kind in ("dense", "sparse") else None)
    for least_chunk in (1024, 16):  # one stage, and two stages over token splits
        out = run(g, x, weight, config, least_chunk)
        assert_accurate(out, truth, bound)


@pytest.mark.parametrize("kind", ["none", "dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, features", [(1, 17), (5, 1), (37, 150), (300, 70)])
def test_squares_match_float64(tokens, features, dtype, kind, poisoned_memory):
    g, weight = view(tokens, features, dtype), make_weight(kind, tokens)
    weight = weight if weight is None else weight.abs()  # no cancellation
    truth = reference.fisher_diagonal(g, weight)
    for least_chunk in (256, 16):
        assert_accurate(squares(g, weight, least_chunk), truth, rounding(torch.float32, tokens))


def test_many_tokens_are_cut_into_parts_that_keep_float32_exact_enough(monkeypatch):
    monkeypatch.setattr(_reduce, "_SUM_CHUNK", 64)
    g = torch.rand(1000, 5, device=DEVICE)
    one_after_another = torch.zeros(5, device=DEVICE)
    for row in g:
        one_after_another += row.square()
    truth = reference.fisher_diagonal(g)
    assert_accurate(squares(g, None, least_chunk=10**9), truth, relative_error(one_after_another, truth) / 2)


@pytest.mark.parametrize("pair", ["none none", "bool none", "none bool", "sparse dense", "bool sparse"])
@pytest.mark.parametrize("g_dtype, x_dtype", list(itertools.product((torch.float32, torch.float16), repeat=2)), ids=str)
def test_op_matches_float64(g_dtype, x_dtype, pair):
    g, x = torch.randn(3, 15, 21, device=DEVICE).to(g_dtype), torch.randn(3, 15, 18, device=DEVICE).to(x_dtype)
    weights = [make_weight(kind, 45) for kind in pair.split()]
    weights = [None if each is None else each.reshape(3, 15) for each in weights]
    gradient, fisher = torch.zeros(21, 18, device=DEVICE), torch.zeros(21, device=DEVICE)
    gradient_statistics_(gradient, fisher, g, x, *weights, backend="triton")
    rounded = g_dtype == x_dtype == torch.float16 and pair.startswith("sparse")
    bound = rounding(torch.float32, 45, torch.float16 if rounded else None)
    assert_accurate(gradient, reference.weight_gradient(g, x, weights[0]), bound)
    assert_accurate(fisher, reference.fisher_diagonal(g, weights[1]), rounding(torch.float32, 45))
    alone = torch.zeros(21, device=DEVICE)
    gradient_statistics_(None, alone, g, fisher_weight=weights[1], backend="triton")
    assert torch.equal(alone, fisher)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_rows_may_hold_anything(kind):
    g, x, number = torch.randn(40, 20, device=DEVICE), torch.randn(40, 12, device=DEVICE), torch.arange(40)
    first, second = (number % 3 != 0).to(DEVICE), (number % 2 != 0).to(DEVICE)
    dirty_g, dirty_x = g.clone(), x.clone()
    dirty_g[~(first | second)], dirty_x[~first] = float("nan"), float("inf")
    gradient, fisher = torch.zeros(20, 12, device=DEVICE), torch.zeros(20, device=DEVICE)
    weights = (first, second) if kind == "bool" else (first.float(), second.double())
    gradient_statistics_(gradient, fisher, dirty_g, dirty_x, *weights, backend="triton")
    assert_accurate(gradient, reference.weight_gradient(g, x, first), rounding(torch.float32, 40))
    assert_accurate(fisher, reference.fisher_diagonal(g, second), rounding(torch.float32, 40))


def test_everything_masked_or_empty_changes_nothing():
    nothing = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    for tokens, mask in ((4, nothing), (0, None)):
        gradient, fisher = torch.full((9, 5), 3.0, device=DEVICE), torch.full((9,), 2.0, device=DEVICE)
        g, x = torch.randn(tokens, 9, device=DEVICE), torch.randn(tokens, 5, device=DEVICE)
        gradient_statistics_(gradient, fisher, g, x, mask, mask, backend="triton")
        assert bool((gradient == 3.0).all()) and bool((fisher == 2.0).all())


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_weights_of_any_size_fit_float16(size):
    """`w x` itself would fall below, or rise above, what float16 can hold."""
    g, x = torch.randn(60, 20, device=DEVICE).half(), torch.randn(60, 18, device=DEVICE).half()
    for weight in (torch.rand(60, device=DEVICE) * size, torch.full((60,), size, device=DEVICE)):
        bound = rounding(torch.float32, 60, torch.float16)
        assert_accurate(run(g, x, weight, TINY, 16), reference.weight_gradient(g, x, weight), bound)


def test_adds_to_what_is_there_and_repeats_bit_for_bit():
    g, x = torch.randn(90, 40, device=DEVICE), torch.randn(90, 24, device=DEVICE)
    first, second = run(g, x, None, TINY, 16), run(g, x, None, TINY, 16)
    assert torch.equal(first, second) and torch.equal(squares(g, None, 16), squares(g, None, 16))
    kernel.gradient_statistics(second, g, x, None, None, TINY)
    assert_accurate(second, 2 * first, 2 * rounding(torch.float32, 90))  # both are rounded


def test_bfloat16_products_are_exact():
    """Small integers: exact in bfloat16, so that any wrong reading of its bits shows."""
    g, x = (torch.randint(-8, 9, (50, side), device=DEVICE).to(torch.bfloat16) for side in (37, 20))
    assert torch.equal(run(g, x, None, TINY), g.float().mT @ x.float())
    assert torch.equal(squares(g, None), g.float().square().sum(0))


def test_memory_beyond_is_left_alone():
    wide = torch.full((40, 60), -7.0, device=DEVICE)
    g, x = torch.randn(40, 33, device=DEVICE), torch.randn(40, 21, device=DEVICE)
    for config, least_chunk in itertools.product((TINY, TWO_HALVES), (1024, 16)):
        out = wide.clone()
        kernel.gradient_statistics(out[:33, 5:26], g, x, None, None, config, least_chunk)
        # The sum with -7 is rounded to the size of that.
        truth = reference.weight_gradient(g, x)
        assert_accurate(out[:33, 5:26].double() + 7.0, truth, 3 * rounding(torch.float32, 40))
        out[:33, 5:26] = -7.0
        assert torch.equal(out, wide)


SHIPPED = [each for each in {**vars(_tiles), **vars(kernel)}.values() if isinstance(each, kernel.TileConfig)]


@pytest.mark.parametrize("config", SHIPPED, ids=str)
def test_shipped_configurations(config):
    g, x = torch.randn(70, 140, device=DEVICE).half(), torch.randn(70, 300, device=DEVICE).half()
    if config is _tiles.SINGLE:
        g, x = g.float(), x.float()
    truth = reference.weight_gradient(g, x)
    assert_accurate(run(g, x, None, config), truth, rounding(torch.float32, 70))
    assert relative_error(run(g, x, torch.rand(70, device=DEVICE) < 0.9, config), truth) > 1e-3, "the mask must matter"


def test_configuration_depends_on_shape_dtype_weights_alignment_and_platform():
    half = torch.bfloat16
    assert kernel.config_for(64, 4096, half) == _tiles.SMALL
    assert kernel.config_for(512, 1024, torch.float16) == _tiles.SMALL
    assert kernel.config_for(1024, 1024, torch.float16) == _tiles.SQUARE
    assert kernel.config_for(1024, 1024, half, capability=(9, 0)) == _tiles.HOPPER_HALF
    assert kernel.config_for(1024, 1024, half, weighted=True, capability=(9, 0)) == _tiles.SQUARE
    assert kernel.config_for(4096, 4096, half) == _tiles.WIDE
    assert kernel.config_for(14336, 512, half) == _tiles.SQUARE
    # With weights the wide tile spills.
    assert kernel.config_for(4096, 4096, half, weighted=True) == _tiles.SQUARE
    assert kernel.config_for(4096, 4096, torch.float32) == _tiles.SINGLE
    assert kernel.config_for(4096, 4095, half, aligned=False) == _tiles.RAGGED
    assert kernel.config_for(4096, 4095, torch.float32, aligned=False) == _tiles.RAGGED
    assert kernel.config_for(4096, 4096, half, weighted=True, capability=None) == kernel.AMD_WEIGHTED
    assert kernel.config_for(4095, 64, torch.float32, aligned=False, capability=None) == kernel.AMD_RAGGED_SINGLE
    # 64 KB of local memory: two stages of both operands, in bytes, must fit.
    for side, dtype, weighted in itertools.product((64, 1024, 4096), (half, torch.float32), (False, True)):
        config = kernel.config_for(side, side, dtype, weighted=weighted, capability=None)
        assert (config.rows + config.columns) * config.tokens * dtype.itemsize * (config.stages - 1) <= 65536
        assert config.stages == 2 and config.columns <= 128


def test_alignment_is_that_of_every_size_stride_and_address():
    wide, out = torch.zeros(40, 64, dtype=torch.float16), torch.zeros(32, 48)
    odd = torch.zeros(40, 65, dtype=torch.float16)
    assert is_aligned(out, wide[:, :32], wide[:, 8:56])  # 8 elements are 16 bytes
    assert not is_aligned(out, wide[:, 4:36], wide[:, :48])
    assert not is_aligned(out, wide[:, :32], wide[:, 4:52])
    assert not is_aligned(out, odd[:, :32], wide[:, :48])
    assert not is_aligned(out, wide[:, :32], odd[:, :48])
    assert not is_aligned(torch.zeros(32, 49)[:, :48], wide[:, :32], wide[:, :48])
    assert not is_aligned(torch.zeros(31, 48), wide[:, :31], wide[:, :48])


def test_registration_is_sound():
    g, x = torch.randn(20, 18, device=DEVICE), torch.randn(20, 16, device=DEVICE)
    gradient, fisher = torch.zeros(18, 16, device=DEVICE), torch.zeros(18, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    for arguments in (
        (gradient, fisher, g, x, None, None, "triton"),
        (None, fisher, g, None, None, torch.rand(20, device=DEVICE), "triton"),
    ):
        torch.library.opcheck(torch.ops.lora_kernels.gradient_statistics_.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("height, width", [(64, 129), (1024, 4096), (4096, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_gpu_error_is_within_twice_that_of_torch(height, width, dtype):
    g, x = torch.randn(3001, height, device="cuda").to(dtype), torch.randn(3001, width, device="cuda").to(dtype)
    for weight in (None, torch.rand(3001, device="cuda") < 0.8):
        gradient, fisher = torch.zeros(height, width, device="cuda"), torch.zeros(height, device="cuda")
        gradient_statistics_(gradient, fisher, g, x, weight, weight, backend="triton")
        left, right = (g, x) if weight is None else (g[weight], x[weight])
        plain, bound = left.float().mT @ right.float(), rounding(torch.float32, len(left))
        assert_accurate(gradient, reference.weight_gradient(left, right), bound, plain=plain)
        assert_accurate(fisher, reference.fisher_diagonal(left), bound)
