"""The Triton kernels in the interpreter (CPU), or for real where there is a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import _tiles
from lora_kernels.ops._rows import Selection
from lora_kernels.ops._tiles import is_aligned, lower_tiles, token_splits
from lora_kernels.ops.covariance import kernel, reference
from lora_kernels.ops.covariance.op import covariance_
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = kernel.TileConfig(16, 16, 16, 4, 2)
TWO_HALVES = kernel.TileConfig(16, 256, 16, 4, 2)


def run(x, weight, config, least_chunk=1024):
    features = x.shape[1]
    out, total = torch.zeros(features, features, device=DEVICE), torch.zeros(features, device=DEVICE)
    selected = Selection()
    if weight is not None:
        index = weight.nonzero().squeeze(-1)
        selected = Selection(index, None if weight.dtype == torch.bool else weight[index].float())
    kernel.covariance(out, x, selected, total, config, least_chunk)
    return out, total


@pytest.mark.parametrize("config", [TINY, TWO_HALVES], ids=["16x16", "16x256"])
@pytest.mark.parametrize("weights", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, features", [(1, 17), (5, 33), (37, 50), (65, 70), (100, 129), (0, 20)])
def test_matches_float64(tokens, features, dtype, weights, config, poisoned_memory):
    x = torch.randn(tokens, 2 * features, device=DEVICE).to(dtype)[:, features // 2 : features // 2 + features]
    weight = {"none": None, "bool": torch.rand(tokens) < 0.6, "float": torch.rand(tokens)}[weights]
    weight = weight if weight is None else weight.to(DEVICE)
    for least_chunk in (1024, 16):  # one stage, and two stages over token splits
        out, total = run(x, weight, config, least_chunk)
        truth, truth_total = reference.covariance(x, weight)
        # Weighted rows are rounded to their dtype before the product.
        assert_accurate(
            out.tril(), truth.tril(), rounding(torch.float32, tokens, dtype if weights == "float" else None)
        )
        terms = (x.double() * (1.0 if weight is None else weight.unsqueeze(-1))).square().sum(0).sqrt()
        assert_accurate(total, truth_total, rounding(torch.float32, tokens), terms=terms)


SHIPPED = [config for config in {**vars(_tiles), **vars(kernel)}.values() if isinstance(config, kernel.TileConfig)]


@pytest.mark.parametrize("config", SHIPPED, ids=str)
def test_shipped_configurations(config):
    x = torch.randn(70, 300, device=DEVICE).half()
    x = x.float() if config is _tiles.SINGLE else x
    out, _ = run(x, torch.rand(70, device=DEVICE) < 0.9, config)
    truth, _ = reference.covariance(x, None)
    assert relative_error(out.tril(), truth.tril()) > 1e-3, "the mask must matter"
    out, _ = run(x, None, config)
    assert_accurate(out.tril(), truth.tril(), rounding(torch.float32, 70))


def test_adds_to_what_is_there_and_repeats_bit_for_bit():
    x = torch.randn(90, 40, device=DEVICE)
    first, _ = run(x, None, TINY, least_chunk=16)
    second, _ = run(x, None, TINY, least_chunk=16)
    assert torch.equal(first.tril(), second.tril())
    kernel.covariance(second, x, config=TINY)
    assert_accurate(second.tril(), 2 * first.tril(), 2 * rounding(torch.float32, 90))  # both are rounded


def test_a_narrow_exponent_needs_float32_sums():
    """300 * 300 exceeds float16, and so does the sum of 80 products of 30 * 30: neither may overflow."""
    for value, tokens in ((300.0, 3), (30.0, 80)):
        out, total = run(torch.full((tokens, 18), value, device=DEVICE).half(), None, TINY)
        assert torch.equal(out.tril(), torch.full((18, 18), value * value * tokens, device=DEVICE).tril())
        assert torch.equal(total, torch.full((18,), value * tokens, device=DEVICE))


def test_bfloat16_products_are_exact():
    """Small integers: exact in bfloat16, so that any wrong reading of its bits shows."""
    x = torch.randint(-8, 9, (50, 37), device=DEVICE).to(torch.bfloat16)
    out, total = run(x, None, TINY)
    assert torch.equal(out.tril(), (x.float().mT @ x.float()).tril())
    assert torch.equal(total, x.float().sum(0))


def test_strict_upper_triangle_and_memory_beyond_are_left_alone():
    wide = torch.full((33, 60), -7.0, device=DEVICE)
    x = torch.randn(40, 33, device=DEVICE)
    for least_chunk in (1024, 16):
        out = wide.clone()
        kernel.covariance(out[:, :33], x, config=TINY, least_chunk=least_chunk)
        outside = torch.ones(33, 60, dtype=torch.bool, device=DEVICE).triu(1)
        assert torch.equal(out[outside], wide[outside])
        assert float((out[:, :33].tril() - wide[:, :33].tril()).abs().max()) > 1.0


def test_configuration_depends_on_shape_dtype_alignment_and_platform():
    half = torch.bfloat16
    assert kernel.config_for(64, half) == _tiles.SMALL
    assert kernel.config_for(1024, torch.float16) == _tiles.SQUARE
    assert kernel.config_for(1024, half, capability=(9, 0)) == _tiles.HOPPER_HALF
    assert kernel.config_for(3072, half, capability=(9, 0)) == kernel.HOPPER_SQUARE
    # No Hopper chip, of 132 multiprocessors at most, splits its tokens.
    tiles = lower_tiles(3072, kernel.HOPPER_SQUARE.rows, kernel.HOPPER_SQUARE.columns)
    assert token_splits(len(tiles), 10**6, 132) == 1
    assert kernel.config_for(8192, half) == _tiles.WIDE
    assert kernel.config_for(8192, half, weighted=True) == _tiles.SQUARE
    assert kernel.config_for(8192, half, weighted=True, capability=(9, 0)) == kernel.HOPPER_SQUARE
    assert kernel.config_for(8192, torch.float32) == _tiles.SINGLE
    # Where addresses cannot be vectorised the large tiles spill.
    assert kernel.config_for(8191, half, aligned=False) == _tiles.RAGGED
    assert kernel.config_for(8191, torch.float32, aligned=False) == _tiles.RAGGED
    # 64 KB of local memory: two stages of both operands, in bytes, must fit.
    for features in (64, 1024, 8192):
        for dtype in (half, torch.float32):
            config = kernel.config_for(features, dtype, capability=None)
            assert (config.rows + config.columns) * config.tokens * dtype.itemsize * (config.stages - 1) <= 65536
            assert config.stages == 2 and config.columns <= 128


def test_alignment_is_that_of_every_size_stride_and_address():
    wide = torch.zeros(40, 64, dtype=torch.float16)
    out = torch.zeros(32, 32)
    assert is_aligned(out, wide[:, :32])
    assert is_aligned(out, wide[:, 8:40])  # 8 elements are 16 bytes
    assert not is_aligned(out, wide[:, 4:36])
    assert not is_aligned(out, torch.zeros(40, 33, dtype=torch.float16)[:, :32])
    assert not is_aligned(torch.zeros(32, 33)[:, :32], wide[:, :32])
    assert not is_aligned(torch.zeros(31, 31), wide[:, :31])


def test_op_reaches_the_kernels_only_on_request_on_cpu():
    x = torch.randn(20, 18, device=DEVICE)
    out = torch.zeros(18, 18, device=DEVICE)
    covariance_(out, x, torch.rand(20, device=DEVICE) < 0.5, backend="triton")
    assert float(out.norm()) > 0
    torch.library.opcheck(
        torch.ops.lora_kernels.covariance_.default,
        (torch.zeros(18, 18, device=DEVICE), x, None, torch.zeros(18, device=DEVICE), "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("features", [64, 129, 1024, 4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_gpu_error_is_within_twice_that_of_torch(features, dtype):
    x = torch.randn(3001, features, device="cuda").to(dtype)
    weight = torch.rand(3001, device="cuda") < 0.8
    out, total = run(x, weight, None)
    rows = x[weight]
    truth = rows.double().mT @ rows.double()
    plain = rows.float().mT @ rows.float()
    assert_accurate(out.tril(), truth.tril(), rounding(torch.float32, len(rows)), plain=plain.tril())
    terms = rows.double().square().sum(0).sqrt()
    assert_accurate(total, rows.double().sum(0), rounding(torch.float32, len(rows)), terms=terms)
