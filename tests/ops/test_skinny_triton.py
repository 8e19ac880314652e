"""The Triton kernels in the interpreter (CPU), or for real where there is a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import Dropout
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._philox import keep_mask, keep_threshold
from lora_kernels.ops._tiles import parts_for, rank_for
from lora_kernels.ops.skinny import config, kernel, reference
from tests.helpers.accuracy import assert_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = config.SkinnyConfig(16, 16, 4, 2)
PARTS = 16  # several parts even where the sum is short
SHAPES = [(1, 17, 1), (37, 48, 8), (65, 70, 20), (20, 40, 70)]
DROPOUTS = [None, Dropout(0.3, 2**63 + 5, 2**32 - 2)]
DTYPES = [torch.float32, torch.float16]


def mask_of(dropout):
    if dropout is None:
        return None
    seed = torch.tensor([dropout.seed - 2**64 if dropout.seed >= 2**63 else dropout.seed])
    return Mask(keep_threshold(dropout.p), seed.to(DEVICE), dropout.stream)


def check(out, compute, operands, length):
    """Float32 sums of `length` terms, in the result's dtype."""
    truth = compute(*(each.double().cpu() for each in operands))
    terms = compute(*(each.double().square().cpu() for each in operands)).sqrt()  # but for the scale
    assert_accurate(out.cpu(), truth, rounding(torch.float32, length, out.dtype), terms=terms)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_shrink(tokens, width, rank, dtype, dropout, poisoned_memory):
    x = draw(tokens, 2 * width, dtype=dtype)[:, width // 2 : width // 2 + width]
    for a in (draw(rank, width, dtype=dtype), draw(width, rank, dtype=dtype).mT):
        for least in (10**6, PARTS):
            out = torch.empty(tokens, rank, dtype=dtype, device=DEVICE)
            kernel.shrink(out, x, a, 0.7, mask_of(dropout), TINY, least)
            check(out, lambda x, a: reference.shrink(x, a, 0.7, dropout), (x, a), width)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_tsreduce(tokens, width, rank, dtype, dropout, poisoned_memory):
    t, z = draw(tokens, rank + 3, dtype=dtype)[:, :rank], draw(tokens, width + 8, dtype=dtype)[:, 5 : 5 + width]
    for least in (10**6, PARTS):
        out = torch.empty(rank, width, device=DEVICE)
        kernel.tsreduce(out, t, z, mask_of(dropout), TINY, least)
        check(out, lambda t, z: reference.tsreduce(t, z, dropout), (t, z), tokens)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_both_sums_over_tokens_in_one_launch(tokens, width, rank, dtype, dropout, poisoned_memory):
    u, t = (draw(tokens, rank + 3, dtype=dtype)[:, 1 : 1 + rank] for _ in range(2))
    x, g = draw(tokens, width + 8, dtype=dtype)[:, 5 : 5 + width], draw(tokens, 2 * width + 1, dtype=dtype)
    for least, kind in ((10**6, torch.float32), (PARTS, torch.float32), (10**6, dtype), (PARTS, dtype)):
        da = torch.empty(rank, width, dtype=kind, device=DEVICE)
        db = torch.empty(2 * width + 1, rank, dtype=kind, device=DEVICE)
        kernel.tsreduce_pair((da, db), u, x, mask_of(dropout), t, g, TINY, least)
        check(da, lambda u, x: reference.tsreduce(u, x, dropout), (u, x), tokens)
        check(db, lambda t, g: reference.tsreduce(t, g).mT, (t, g), tokens)


@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_sums_over_tokens_are_written_where_and_as_they_belong(tokens, width, rank, poisoned_memory):
    t, z = draw(tokens, rank, dtype=torch.float16), draw(tokens, width, dtype=torch.float16)
    for least in (10**6, PARTS):
        out = torch.empty(width, rank, dtype=torch.float16, device=DEVICE)
        kernel.tsreduce(out.mT, t, z, None, TINY, least)
        check(out, lambda t, z: reference.tsreduce(t, z).mT, (t, z), tokens)


@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_float32_factors_beside_16_bit_operands(tokens, width, rank, poisoned_memory):
    x, t, out = (draw(tokens, size, dtype=torch.float16) for size in (width, rank, rank))
    wide = torch.empty_like(x)
    # Numbers of 16 bits, as the interpreter does not round what the device rounds where it is loaded.
    for a in (draw(rank, width, dtype=torch.float16).float(), draw(width, rank, dtype=torch.float16).float().mT):
        kernel.shrink(out, x, a, 0.7, None, TINY, 10**6)
        check(out, lambda x, a: reference.shrink(x, a, 0.7), (x, a), width)
        kernel.expand(wide, t, a, None, None, None, TINY)
        check(wide, reference.expand, (t, a), rank + 1)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens, width, rank", SHAPES)
def test_expand(tokens, width, rank, dtype, dropout, poisoned_memory):
    t, bias, base = (
        draw(tokens, rank, dtype=dtype),
        draw(width, dtype=dtype),
        draw(tokens, width + 3, dtype=dtype)[:, 2:-1],
    )
    for b in (draw(rank, width, dtype=dtype), draw(width, rank, dtype=dtype).mT):
        for start in (None, bias, base):
            out = torch.empty(tokens, width + 5, dtype=dtype, device=DEVICE)[:, 1 : 1 + width]
            row, matrix = (start, None) if start is bias else (None, start)
            kernel.expand(out, t, b, matrix, row, mask_of(dropout), TINY)
            operands = (t, b) if start is None else (t, b, start)
            check(out, lambda *each: reference.expand(*each, dropout=dropout), operands, rank + 1)
    mine = base.clone()
    kernel.expand(mine, t, b, mine, None, mask_of(dropout), TINY)
    check(mine, lambda *each: reference.expand(*each, dropout=dropout), (t, b, base), rank + 1)


def test_the_mask_does_not_depend_on_tiles():
    """Products with ones and unit vectors show the mask itself."""
    dropout = Dropout(0.4, 123456789012345, 3)
    mask = mask_of(dropout)
    expected = keep_mask(40, 50, p=0.4, seed=dropout.seed, stream=3)
    ones = torch.ones(40, 1, device=DEVICE)
    for each in (TINY, config.SkinnyConfig(32, 64, 4, 2), config.SkinnyConfig(16, 8 * 4, 4, 2)):
        out = torch.empty(40, 50, device=DEVICE)
        kernel.expand(out, ones, torch.ones(1, 50, device=DEVICE), None, None, mask, each)
        assert torch.equal((out != 0).cpu(), expected)
        kernel.shrink(out, torch.ones(40, 50, device=DEVICE), torch.eye(50, device=DEVICE), 1.0, mask, each)
        assert torch.equal((out != 0).cpu(), expected)
        turned = torch.empty(40, 50, device=DEVICE)
        kernel.tsreduce(turned, torch.eye(40, device=DEVICE), torch.ones(40, 50, device=DEVICE), mask, each)
        assert torch.equal((turned != 0).cpu(), expected)


def unpacked(bits, columns):
    """Bits of a mask, one by one: bit j of byte i is column 8 i + j."""
    return (bits.cpu()[:, :, None] >> torch.arange(8) & 1).flatten(1)[:, :columns].bool()


@pytest.mark.parametrize("rank, least", [(5, 10**6), (5, PARTS), (70, 10**6)], ids=["whole", "parts", "ranks"])
def test_the_sums_over_tokens_write_the_mask_that_the_gradient_of_x_reads(rank, least, poisoned_memory):
    dropout = Dropout(0.4, 123456789012345, 3)
    expected = keep_mask(40, 50, p=0.4, seed=dropout.seed, stream=3)
    u, x, g = draw(40, rank), draw(40, 50), draw(40, 20)
    outs = torch.empty(rank, 50, device=DEVICE), torch.empty(20, rank, device=DEVICE)
    assert kernel.tsreduce_pair(outs, u, x, None, u, g, TINY, least) is None
    mask = kernel.tsreduce_pair(outs, u, x, mask_of(dropout), u, g, TINY, least)
    assert torch.equal(unpacked(mask.bits, 50), expected)
    drawn, factor = kernel.bits_of(mask_of(dropout), x)
    assert factor == mask.factor and torch.equal(unpacked(drawn, 50), expected)
    # What is read is what is there, whatever the seed says.
    y = torch.empty(40, 50, device=DEVICE)
    kernel.expand(y, torch.ones_like(u), draw(rank, 50).abs(), None, None, mask._replace(bits=~mask.bits), TINY)
    assert torch.equal((y != 0).cpu(), ~expected)


@pytest.mark.parametrize("platform, aligned", [("cuda", True), ("hip", True), ("cuda", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_shipped_configurations(dtype, aligned, platform):
    x, a, dropout = draw(70, 150, dtype=dtype), draw(20, 150, dtype=dtype), DROPOUTS[1]
    t, y, mask = draw(70, 20, dtype=dtype), torch.empty_like(x), mask_of(dropout)
    chosen = {name: config.config_for(name, dtype, aligned, platform) for name in ("shrink", "reduce", "expand")}
    out, total = torch.empty_like(t), torch.empty(20, 150, device=DEVICE)
    kernel.shrink(out, x, a, 1.0, mask, chosen["shrink"])
    check(out, lambda x, a: reference.shrink(x, a, 1.0, dropout), (x, a), 150)
    kernel.tsreduce(total, t, x, mask, chosen["reduce"])
    check(total, lambda t, x: reference.tsreduce(t, x, dropout), (t, x), 70)
    kernel.expand(y, t, a, None, None, mask, chosen["expand"])
    check(y, lambda t, a: reference.expand(t, a, dropout=dropout), (t, a), 20)


def test_bfloat16_within_its_precision():
    x, a = draw(30, 40, dtype=torch.bfloat16), draw(5, 40, dtype=torch.bfloat16)
    out = torch.empty(30, 5, dtype=torch.bfloat16, device=DEVICE)
    kernel.shrink(out, x, a, 1.0, None, TINY)
    # The interpreter cuts off what the device rounds to the nearest.
    assert_accurate(out.cpu(), reference.shrink(x.double(), a.double()).cpu(), torch.finfo(torch.bfloat16).eps)


def test_ranks_are_tiled():
    assert rank_for(1) == (16, 1) and rank_for(16) == (16, 1) and rank_for(17) == (32, 1)
    assert rank_for(64) == (64, 1) and rank_for(65) == (64, 2)
    assert config.step_for(40, torch.float32) == 16 and config.step_for(40, torch.float16) == 64


def test_flat_tiles_replace_parts_of_sums(monkeypatch):
    """Between one and two tiles per multiprocessor; fewer tokens are cut into parts, more need neither."""
    monkeypatch.setattr(config, "processors", lambda device: 132)
    config.shrink_config.cache_clear()
    device, sizes = torch.device("cpu"), (2048, 8192, 16896)
    chosen = [config.shrink_config(tokens, torch.bfloat16, True, device) for tokens in sizes]
    config.shrink_config.cache_clear()
    if kernel.build_platform() == "cuda":
        assert [of == config.FLAT for of in chosen] == [False, True, False]


def test_too_many_tokens_for_a_grid():
    assert config.tall_for(65535 * 16, TINY) == 65535
    with pytest.raises(ValueError, match="are too many for one launch"):
        config.tall_for(65535 * 16 + 1, TINY)


def test_sums_are_cut_into_whole_steps():
    device = torch.device("cpu")
    for length in (1, 5, 16, 100, 1000):
        splits, chunk = parts_for(1, length, 16, device, 32)
        assert chunk % 16 == 0 and (splits - 1) * chunk < length <= splits * chunk


def test_alignment():
    wide = torch.zeros(4, 64)
    assert config.is_aligned(8, 8, wide) and not config.is_aligned(5, 8, wide) and not config.is_aligned(8, 12, wide)
    assert not config.is_aligned(8, 8, wide[:, :40]) and not config.is_aligned(8, 8, wide[:, 1:17])
