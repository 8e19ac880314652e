"""The layer's one-kernel product in the interpreter (CPU), or for real where there is a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import Dropout
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._philox import keep_mask, keep_threshold
from lora_kernels.ops.lora_linear import config, kernel
from lora_kernels.ops.lora_linear.config import GemmConfig
from lora_kernels.ops.skinny.reference import dropped
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = GemmConfig(16, 32, 16, 16, 4, 2)
# More tile rows than a group of the raster has; a wide tile that goes by quarters.
FLAT = GemmConfig(16, 16, 32, 16, 4, 2)
QUARTERED = GemmConfig(16, 256, 16, 16, 4, 2)
# Tokens, inner size, columns, rank.
SHAPES = [(1, 17, 1, 1), (37, 33, 48, 8), (65, 70, 50, 20), (5, 1, 129, 4), (150, 16, 40, 40)]
DROPOUT = Dropout(0.3, 2**63 + 5, 2**32 - 2)
PRECISIONS = [(torch.float32, 3e-7), (torch.float16, 5e-4)]


def mask_of(dropout):
    seed = torch.tensor([dropout.seed - 2**64 if dropout.seed >= 2**63 else dropout.seed])
    return Mask(keep_threshold(dropout.p), seed.to(DEVICE), dropout.stream)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def strided(*shape, dtype=torch.float32):
    """Rows of a wider matrix, which starts where no vector does."""
    return draw(shape[0], shape[1] + 7, dtype=dtype)[:, 3 : 3 + shape[1]]


def test_a_mask_that_is_there_is_read(poisoned_memory):
    out = draw(17, 23)
    mask = mask_of(DROPOUT)._replace(bits=torch.full((17, 3), 0b11, dtype=torch.uint8, device=DEVICE))
    kernel.linear(out, draw(17, 8) * 0, draw(8, 23), draw(17, 3).abs(), draw(3, 23).abs(), None, mask, TINY)
    assert torch.equal((out != 0).cpu(), (torch.arange(23) % 8 < 2).expand(17, 23))


def check(out, truth, bound):
    assert relative_error(out.cpu(), truth.cpu()) <= bound
    assert relative_error(0.5 * out.cpu(), truth.cpu()) > bound


def run(x, right, t, b, bias=None, dropout=None, config=TINY):
    out = torch.empty(x.shape[0], right.shape[1] + 5, dtype=x.dtype, device=DEVICE)[:, 2:-3]
    kernel.linear(out, x, right, t, b, bias, None if dropout is None else mask_of(dropout), config)
    truth = x.double().cpu() @ right.double().cpu() + dropped(t.double().cpu() @ b.double().cpu(), dropout)
    return out, truth if bias is None else truth + bias.double().cpu()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype, bound", PRECISIONS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, inner, columns, rank", SHAPES)
def test_matches_float64(tokens, inner, columns, rank, dtype, bound, dropout, poisoned_memory):
    x, t, bias = strided(tokens, inner, dtype=dtype), draw(tokens, rank, dtype=dtype), draw(columns, dtype=dtype)
    rights = [
        strided(inner, columns, dtype=dtype),
        strided(columns, inner, dtype=dtype).mT,
        draw(inner, 2 * columns, dtype=dtype)[:, ::2],
    ]
    factors = [draw(rank, columns, dtype=dtype), draw(columns, rank, dtype=dtype).mT]
    for right, b in ((rights[0], factors[0]), (rights[1], factors[1]), (rights[2], factors[0])):
        for row in (None, bias):
            check(*run(x, right, t, b, row, dropout), bound)
    # The low-rank term alone, and the product alone.
    check(*run(torch.zeros_like(x), rights[0], t, factors[1], None, dropout), bound)
    check(*run(x, rights[1], torch.zeros_like(t), factors[0], None, dropout), bound)


@pytest.mark.parametrize("each", [FLAT, QUARTERED], ids=["many rows", "quarters"])
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["whole", "dropped"])
def test_any_tile(each, dropout, poisoned_memory):
    for columns in (20, 300):
        x, right = draw(150, 24), draw(24, columns)
        check(*run(x, right, draw(150, 19)[:, :16], draw(16, columns), None, dropout, each), 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", config.CONFIGS)
def test_shipped_configurations(name, dtype, poisoned_memory):
    x, weight = draw(70, 80, dtype=dtype), draw(150, 80, dtype=dtype)
    t, b = draw(70, 16, dtype=dtype), draw(150, 16, dtype=dtype)
    check(*run(x, weight.mT, t, b.mT, draw(150, dtype=dtype), None, config.CONFIGS[name]), 5e-4)
    check(*run(x, weight.mT, t, b.mT.contiguous(), None, DROPOUT, config.CONFIGS[name]), 5e-4)


def test_the_mask_does_not_depend_on_tiles():
    dropout = Dropout(0.4, 123456789012345, 3)
    expected = keep_mask(40, 300, p=0.4, seed=dropout.seed, stream=3)
    ones, zeros = torch.ones(40, 1, device=DEVICE), torch.zeros(40, 8, device=DEVICE)
    for each in (TINY, FLAT, QUARTERED):
        out = torch.empty(40, 300, device=DEVICE)
        kernel.linear(out, zeros, draw(8, 300), ones, torch.ones(1, 300, device=DEVICE), None, mask_of(dropout), each)
        assert torch.equal((out != 0).cpu(), expected)


def test_nothing_is_read_beyond_the_edges():
    """Neighbours in memory hold NaN."""
    x, right = torch.full((20, 40), float("nan"), device=DEVICE), torch.full((40, 60), float("nan"), device=DEVICE)
    x[:17, 4:27], right[4:27, 8:41] = draw(17, 23), draw(23, 33)
    t, b = torch.full((20, 24), float("nan"), device=DEVICE), torch.full((40, 60), float("nan"), device=DEVICE)
    t[:17, 8:13], b[3:8, 8:41] = draw(17, 5), draw(5, 33)
    check(*run(x[:17, 4:27], right[4:27, 8:41], t[:17, 8:13], b[3:8, 8:41]), 3e-7)
    square = torch.full((60, 60), float("nan"), device=DEVICE)
    square[8:41, 4:27] = draw(33, 23)
    check(*run(x[:17, 4:27], square[8:41, 4:27].mT, t[:17, 8:13], b[3:8, 8:41]), 3e-7)
    before = x.clone()
    kernel.linear(x[:17, 4:27], draw(17, 8), draw(8, 23), draw(17, 3), draw(3, 23), config=TINY)
    inside = torch.zeros_like(x, dtype=torch.bool)
    inside[:17, 4:27] = True
    assert bool(x[inside].isfinite().all()) and bool(x[~inside].isnan().all()) and bool(before[~inside].isnan().all())


def test_empty_sizes():
    out = torch.empty(0, 5, device=DEVICE)
    kernel.linear(out, draw(0, 3), draw(3, 5), draw(0, 2), draw(2, 5))
    check(*run(draw(4, 6), draw(6, 9), draw(4, 0), draw(0, 9)), 3e-7)
    check(*run(draw(4, 0), draw(0, 9), draw(4, 2), draw(2, 9)), 3e-7)


def test_same_input_same_bits():
    operands = draw(90, 70), draw(70, 50), draw(90, 8), draw(8, 50)
    first, second = (torch.empty(90, 50, device=DEVICE) for _ in range(2))
    kernel.linear(first, *operands)
    kernel.linear(second, *operands)
    assert torch.equal(first, second)


def test_bfloat16_within_its_precision():
    kind = {"dtype": torch.bfloat16}
    out, truth = run(draw(30, 40, **kind), draw(40, 50, **kind), draw(30, 5, **kind), draw(5, 50, **kind))
    assert relative_error(out.cpu(), truth) < 8e-3


def test_configurations_by_chip():
    big, half = (8192, 4096, 4096), torch.bfloat16
    assert config.config_for(big, half, capability=(9, 0)) == config.WIDE
    assert config.config_for(big, half, capability=(10, 0)) == config.WIDE
    assert config.config_for(big, half, capability=(8, 0)) == config.SQUARE
    assert config.config_for(big, half, capability=(8, 9)) == config.SQUARE_SHALLOW
    assert config.config_for(big, half, capability=(12, 0)) == config.SQUARE_SHALLOW
    assert config.config_for(big, half, capability=None) == config.AMD_SQUARE
    assert config.config_for(big, torch.float32, capability=(9, 0)) == config.SINGLE
    assert config.config_for(big, torch.float32, capability=None) == config.AMD_SMALL
    assert config.config_for(big, half, aligned=False, capability=(9, 0)) == config.RAGGED
    # As many tiles as processors.
    assert config.config_for((128 * 132, 64, 256), half, capability=(9, 0)) == config.WIDE
    assert config.config_for((128 * 131, 64, 256), half, capability=(9, 0)) == config.SQUARE
    assert config.config_for((1024, 64, 1024), half, capability=(9, 0)) == config.SMALL
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), None):
        for dtype in (half, torch.float32):
            for aligned in (True, False):
                found = config.candidates(dtype, aligned=aligned, capability=capability)
                assert set(found) <= set(config.CONFIGS.values())
    assert config.WIDE.quarters(True) and not config.WIDE.quarters(False) and not config.SQUARE.quarters(True)
    # Shared memory of the pipeline: 99 KB on consumer chips, 163 KB on 8.0, 227 KB on 9.0 and 10.0, 64 KB on AMD.
    limits = {(8, 9): 101376, (8, 0): 166912, (9, 0): 232448, (10, 0): 232448, None: 65536}
    for capability, limit in limits.items():
        for dtype in (half, torch.float32):
            for each in config.candidates(dtype, capability=capability):
                assert each.stages * each.step * (each.tokens + each.columns) * dtype.itemsize <= limit


def test_a_measured_configuration_is_for_what_it_was_measured_on():
    out, x, right = torch.zeros(32, 64).half(), torch.zeros(32, 48).half(), torch.zeros(64, 48).half().mT
    assert kernel.fitting(config.SQUARE, out, x, right) == config.SQUARE
    assert kernel.fitting(None, out, x, right) == config.SMALL
    assert kernel.fitting(config.SQUARE, out[:, :40], x, right[:, :40]) == config.RAGGED
    assert kernel.fitting(config.SQUARE, out.float(), x.float(), right.float()) == config.SINGLE


def test_alignment():
    wide = torch.zeros(64, 64)
    assert config.is_aligned(wide, wide.mT)
    for view in (wide[:, :40], wide[:, 1:17], wide[:, :40].mT, torch.zeros(4, 40)):
        assert not config.is_aligned(wide, view)
