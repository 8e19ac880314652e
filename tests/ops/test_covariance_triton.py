"""The Triton kernels in the interpreter (CPU), or for real where there is a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import _tiles
from lora_kernels.ops.covariance import covariance_, kernel, reference
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = kernel.SyrkConfig(16, 16, 16, 4, 2)
TWO_HALVES = kernel.SyrkConfig(16, 256, 16, 4, 2)


def run(x, weight, config, least_chunk=1024):
    features = x.shape[1]
    out, total = torch.zeros(features, features, device=DEVICE), torch.zeros(features, device=DEVICE)
    index, weights = None, None
    if weight is not None:
        index = weight.nonzero().squeeze(-1)
        weights = None if weight.dtype == torch.bool else weight[index].float()
    kernel.covariance(out, x, index, weights, total, config, least_chunk)
    return out, total


@pytest.mark.parametrize("config", [TINY, TWO_HALVES], ids=["16x16", "16x256"])
@pytest.mark.parametrize("weights", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-7), (torch.float16, 5e-4)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, features", [(1, 17), (5, 33), (37, 50), (65, 70), (100, 129), (0, 20)])
def test_matches_float64(tokens, features, dtype, bound, weights, config, poisoned_memory):
    x = torch.randn(tokens, 2 * features, device=DEVICE).to(dtype)[:, features // 2 : features // 2 + features]
    weight = {"none": None, "bool": torch.rand(tokens) < 0.6, "float": torch.rand(tokens)}[weights]
    weight = weight if weight is None else weight.to(DEVICE)
    for least_chunk in (1024, 16):  # one stage, and two stages over token splits
        out, total = run(x, weight, config, least_chunk)
        truth, truth_total = reference.covariance(x, weight)
        assert relative_error(out.tril(), truth.tril()) <= bound
        assert (total.double() - truth_total).abs().max() <= 1e-5
        if tokens and float(truth.norm()) > 0:
            assert relative_error(0.5 * out.tril(), truth.tril()) > bound


@pytest.mark.parametrize("config", [kernel.SMALL, kernel.SQUARE, kernel.WIDE, kernel.SINGLE], ids=str)
def test_shipped_configurations(config):
    x = torch.randn(70, 300, device=DEVICE).half()
    x = x.float() if config is kernel.SINGLE else x
    out, _ = run(x, torch.rand(70, device=DEVICE) < 0.9, config)
    truth, _ = reference.covariance(x, None)
    assert relative_error(out.tril(), truth.tril()) > 1e-3, "the mask must matter"
    out, _ = run(x, None, config)
    assert relative_error(out.tril(), truth.tril()) < 3e-7


def test_adds_to_what_is_there_and_repeats_bit_for_bit():
    x = torch.randn(90, 40, device=DEVICE)
    first, _ = run(x, None, TINY, least_chunk=16)
    second, _ = run(x, None, TINY, least_chunk=16)
    assert torch.equal(first.tril(), second.tril())
    kernel.covariance(second, x, None, None, None, TINY)
    assert relative_error(second.tril(), 2 * first.tril()) < 1e-6


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
    assert relative_error(out.tril(), truth.tril()) <= 2 * relative_error(plain.tril(), truth.tril()) + 1e-7
    assert relative_error(total, rows.double().sum(0)) < 1e-5


@pytest.mark.parametrize(
    "size, rows, columns", [(1, 16, 16), (100, 16, 32), (300, 128, 256), (5000, 64, 64), (129, 128, 128)]
)
def test_tiles_cover_the_lower_triangle_once(size, rows, columns):
    tiles = _tiles.lower_tiles(size, rows, columns)
    assert len(set(tiles)) == len(tiles)
    needed = {(i // rows, j // columns) for i in range(0, size) for j in {0, *range(0, i + 1, columns), i}}
    assert needed == set(tiles)


def test_splits_fill_the_chip_only_where_it_pays():
    assert _tiles.token_splits(1000, 8192, 132) == 1
    assert _tiles.token_splits(3, 8192, 132) == 8  # at least 1024 tokens each
    assert _tiles.token_splits(3, 100, 132) == 1
    assert _tiles.token_splits(100, 10**6, 132) == 3
