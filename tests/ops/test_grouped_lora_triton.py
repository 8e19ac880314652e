"""The Triton kernels of the experts' low-rank part in the interpreter (CPU), or for real where there is a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl

from lora_kernels.ops import Dropout
from lora_kernels.ops._dropout import mask_of
from lora_kernels.ops._philox import keep_threshold
from lora_kernels.ops.grouped_lora import _torch, kernel
from lora_kernels.ops.skinny.config import SkinnyConfig, config_for
from tests.helpers.accuracy import assert_accurate, rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles keep the interpreter quick; the shipped sizes run once each below.
TINY = SkinnyConfig(16, 16, 4, 2)
# Offsets, rows, width, rank.
SHAPES = [([0, 1], 1, 17, 1), ([0, 0, 16, 16, 37], 40, 48, 8), ([0, 33, 65, 65], 65, 70, 20), ([0, 2, 20], 20, 40, 70)]
DROPOUTS = [None, Dropout(0.3, 2**63 + 5, 2**32 - 2)]
DTYPES = [torch.float32, torch.float16]
PARAMETERS = [
    pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"]),
    pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"]),
    pytest.mark.parametrize("offsets, rows, width, rank", SHAPES),
]


def every_case(test):
    for parameter in PARAMETERS:
        test = parameter(test)
    return test


def mask(dropout):
    if dropout is None:
        return None
    return mask_of(keep_threshold(dropout.p), torch.tensor([dropout.seed - 2**64], device=DEVICE), dropout.stream)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def wide(tensor):
    return None if tensor is None else tensor.double().cpu()


def check(out, exact, magnitudes, length):
    """Float32 sums of `length` terms, in the result's dtype; both functions fill what they are given."""
    truth, terms = torch.empty(out.shape, dtype=torch.float64), torch.empty(out.shape, dtype=torch.float64)
    exact(truth)
    magnitudes(terms)
    bar = rounding(torch.float32, length, out.dtype)
    assert_accurate(out.cpu(), truth, bar, terms=terms / max(length, 1) ** 0.5)


def cpu(mask):
    return None if mask is None else mask._replace(seed=mask.seed.cpu())


@every_case
def test_shrink(offsets, rows, width, rank, dtype, dropout, poisoned_memory):
    x, drop = draw(rows, 2 * width, dtype=dtype)[:, width // 2 : width // 2 + width], mask(dropout)
    experts = len(offsets) - 1
    for kind in (torch.int32, torch.int64):
        places = torch.tensor(offsets, dtype=kind, device=DEVICE)
        for a in (draw(experts, rank, width, dtype=dtype), draw(experts, width, rank, dtype=dtype).mT):
            out = torch.empty(rows, rank, dtype=dtype, device=DEVICE)
            kernel.shrink(out, x, places, a, 0.7, drop, TINY)
            check(
                out,
                lambda to, a=a: _torch.shrink(to, wide(x), offsets, wide(a), 0.7, cpu(drop)),
                lambda to, a=a: _torch.shrink(to, wide(x).abs(), offsets, wide(a).abs(), 0.7, cpu(drop)),
                width,
            )


@every_case
def test_reduce(offsets, rows, width, rank, dtype, dropout, poisoned_memory):
    t, z = draw(rows, rank + 3, dtype=dtype)[:, :rank], draw(rows, width + 8, dtype=dtype)[:, 5 : 5 + width]
    experts, drop = len(offsets) - 1, mask(dropout)
    places = torch.tensor(offsets, device=DEVICE)
    for out in (
        torch.empty(experts, rank, width, device=DEVICE),
        torch.empty(experts, width, rank, dtype=dtype, device=DEVICE).mT,
    ):
        kernel.reduce(out, t, z, places, drop, TINY)
        check(
            out,
            lambda to: _torch.reduce(to, wide(t), wide(z), offsets, cpu(drop)),
            lambda to: _torch.reduce(to, wide(t).abs(), wide(z).abs(), offsets, cpu(drop)),
            rows,
        )


@every_case
def test_expand(offsets, rows, width, rank, dtype, dropout, poisoned_memory):
    t, base = draw(rows, rank, dtype=dtype), draw(rows, width + 3, dtype=dtype)[:, 2:-1]
    experts, drop = len(offsets) - 1, mask(dropout)
    places = torch.tensor(offsets, device=DEVICE)
    for b in (draw(experts, rank, width, dtype=dtype), draw(experts, width, rank, dtype=dtype).mT):
        for start in (None, base):
            out = torch.empty(rows, width + 5, dtype=dtype, device=DEVICE)[:, 1 : 1 + width]
            kernel.expand(out, t, places, b, start, drop, TINY)
            absolute = None if start is None else wide(start).abs()
            check(
                out,
                lambda to, b=b, start=start: _torch.expand(to, wide(t), offsets, wide(b), wide(start), cpu(drop)),
                lambda to, b=b, start=absolute: _torch.expand(
                    to, wide(t).abs(), offsets, wide(b).abs(), start, cpu(drop)
                ),
                rank + 1,
            )


@triton.jit
def _tiles_kernel(out_ptr, offsets_ptr, experts, n_rows, TOKENS: tl.constexpr, LANES: tl.constexpr):
    slot = tl.program_id(0)
    expert, first, end = kernel.find_tile(offsets_ptr, slot, experts, n_rows, TOKENS, LANES)
    tl.store(out_ptr + slot * 3, tl.cast(expert, tl.int64))
    tl.store(out_ptr + slot * 3 + 1, first)
    tl.store(out_ptr + slot * 3 + 2, end)


def tiles_of(offsets, rows, lanes):
    experts = len(offsets) - 1
    slots = kernel.slots_for(rows, experts, TINY)
    out = torch.empty(slots, 3, dtype=torch.int64, device=DEVICE)
    _tiles_kernel[(slots,)](out, torch.tensor(offsets, device=DEVICE), experts, rows, TOKENS=16, LANES=lanes)
    return [(expert, first, min(first + 16, end)) for expert, first, end in out.tolist() if first < end]


@pytest.mark.parametrize("lanes", [2, 16])
def test_every_row_is_in_one_tile_of_its_expert(lanes):
    torch.manual_seed(0)
    for experts in (1, 2, 3, 16, 17, 40):
        for most in (0, 3, 16, 50):
            sizes = torch.randint(0, most + 1, (experts + 1,)).tolist()
            offsets = [0, *torch.tensor(sizes[:-1]).cumsum(0).tolist()]
            rows = offsets[-1] + sizes[-1]
            owners = [expert for expert, size in enumerate(sizes) for _ in range(size)]
            found = sorted(
                (row, expert) for expert, low, high in tiles_of(offsets, rows, lanes) for row in range(low, high)
            )
            assert found == list(enumerate(owners))


def test_wrong_offsets_stay_within_the_rows():
    for offsets in ([5, 3, 70], [-9, 400, -1], [40, 30, 20, 10], [0, 2**31 - 1, 2**31 - 1]):
        for expert, low, high in tiles_of(offsets, 37, 16):
            assert 0 <= expert <= len(offsets) - 1 and 0 <= low < high <= 37


@pytest.mark.parametrize("platform, aligned", [("cuda", True), ("hip", True), ("cuda", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_shipped_configurations(dtype, aligned, platform):
    offsets, drop = [0, 30, 30, 66], mask(DROPOUTS[1])
    places = torch.tensor(offsets, device=DEVICE)
    x, a, t = draw(70, 150, dtype=dtype), draw(3, 20, 150, dtype=dtype), draw(70, 20, dtype=dtype)
    names = ("shrink", "reduce", "expand")
    shrink, reduce, expand = (kernel.product_config(name, 20, dtype, aligned, platform) for name in names)
    low, y, total = torch.empty_like(t), torch.empty_like(x), torch.empty(3, 20, 150, device=DEVICE)
    kernel.shrink(low, x, places, a, 1.0, drop, shrink)
    written = kernel.reduce(total, t, x, places, drop, reduce)  # with the bits that `expand` reads
    assert written.bits is not None
    kernel.expand(y, t, places, a, None, written, expand)
    for out, function, operands, length in (
        (low, lambda to, x, a: _torch.shrink(to, x, offsets, a, 1.0, cpu(drop)), (x, a), 150),
        (total, lambda to, t, x: _torch.reduce(to, t, x, offsets, cpu(drop)), (t, x), 70),
        (y, lambda to, t, a: _torch.expand(to, t, offsets, a, None, cpu(drop)), (t, a), 20),
    ):
        exact, magnitudes = ([wide(each).abs() if sign else wide(each) for each in operands] for sign in (0, 1))
        check(
            out,
            lambda to, f=function, each=exact: f(to, *each),
            lambda to, f=function, each=magnitudes: f(to, *each),
            length,
        )


def test_configurations_are_those_of_one_layer_unless_they_spill():
    others = ((8, torch.float16, True, "cuda"), (64, torch.float32, True, "cuda"), (64, torch.float16, False, "cuda"))
    for rank, dtype, aligned, platform in (*others, (64, torch.float16, True, "hip")):
        expected = config_for("reduce", dtype, aligned, platform)
        assert kernel.product_config("reduce", rank, dtype, aligned, platform) == expected
    assert kernel.product_config("reduce", 64, torch.float16, True, "cuda").warps == 8
    assert kernel.product_config("reduce", 64, torch.bfloat16, True, "cuda", single=True) == kernel._SINGLE_REDUCE


def test_too_many_rows_for_a_grid():
    with pytest.raises(ValueError, match="are too many for one launch"):
        kernel.slots_for(65535 * 16, 4, TINY)
