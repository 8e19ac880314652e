"""The skinny products of a LoRA layer in C++, by their raw bindings."""

import os
import subprocess
import sys

import pytest
import torch

from lora_kernels.ops import _ext, _philox
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(_ext.load()[0] is None, reason="extension not built")

SEED, STREAM = 2**64 - 12345678901234567, 2**32 - 7
TOKENS = [0, 1, 7, 65]
COLUMNS = [1, 7, 8, 129, 1000]
RANKS = [1, 4, 5, 16, 24, 64, 100]
THRESHOLDS = [0, 1, 3277, 65535]
GAP = 3  # columns of other people's data to the right of every matrix
FILL = -77.0


def dropout_mask(rows, columns, threshold, seed=SEED, stream=STREAM):
    """Keep times 65536 / (65536 - threshold), float64, from the definition."""
    groups = -(-columns // 8)
    column = torch.arange(groups).expand(rows, groups)
    row = torch.arange(rows).unsqueeze(1).expand(rows, groups)
    zero = torch.zeros_like(column)
    words = torch.stack(_philox.philox4x32(seed, (column, row, zero + stream, zero), rounds=7), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :columns]
    return (halves >= threshold).double() * (65536 / (65536 - threshold))


def strided(rows, columns, make=torch.randn, dtype=torch.float32):
    """A matrix with a gap after every row, which the kernel must leave alone."""
    whole = torch.full((rows, columns + GAP), FILL, dtype=dtype)
    whole[:, :columns] = make(rows, columns)
    return whole[:, :columns]


def gap_is_intact(matrix):
    rows, columns = matrix.shape
    whole = matrix.as_strided((rows, columns + GAP), (columns + GAP, 1))
    return bool((whole[:, columns:] == FILL).all())


def place(matrix):
    return matrix.data_ptr(), matrix.stride(0)


def binding(name, big):
    return getattr(_ext.extension(), name + {torch.float32: "", torch.bfloat16: "_bfloat16"}[big.dtype])


def shrink(x, a, scale=1.0, threshold=0, threads=2, seed=SEED, stream=STREAM):
    t = strided(x.shape[0], a.shape[0], lambda *shape: torch.full(shape, float("nan")))
    binding("lora_shrink", x)(
        *place(x), *place(a), *place(t), *x.shape, a.shape[0], scale, threshold, seed, stream, threads
    )
    assert gap_is_intact(t)
    return t


def tsreduce(t, z, threshold=0, threads=2, seed=SEED, stream=STREAM):
    out = strided(t.shape[1], z.shape[1], lambda *shape: torch.full(shape, float("nan")))
    binding("lora_tsreduce", z)(
        *place(t), *place(z), *place(out), *z.shape, t.shape[1], threshold, seed, stream, threads
    )
    assert gap_is_intact(out)
    return out


def expand(t, b, y=None, bias=None, threshold=0, threads=2, seed=SEED, stream=STREAM, dtype=torch.float32):
    start = torch.full((t.shape[0], b.shape[1]), float("nan")) if y is None else y
    out = strided(t.shape[0], b.shape[1], lambda *_: start, dtype)
    binding("lora_expand", out)(
        *place(t),
        *place(b),
        *place(out),
        t.shape[0],
        b.shape[1],
        t.shape[1],
        y is not None,
        0 if bias is None else bias.data_ptr(),
        threshold,
        seed,
        stream,
        threads,
    )
    assert gap_is_intact(out)
    return out


def close(found, truth, terms):
    """Within float32's rounding of a sum of `terms`, of which `truth` is the value and the magnitude."""
    value, magnitude = truth
    return found.shape == value.shape and bool(
        ((found.double() - value).abs() <= 2e-7 * (terms**0.5 + 3) * magnitude + 1e-30).all()
    )


def product(left, right):
    return left @ right, left.abs() @ right.abs()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_products(tokens, columns):
    for rank in RANKS:
        x, a, t, y = (
            strided(tokens, columns),
            strided(rank, columns),
            strided(tokens, rank),
            torch.randn(tokens, columns),
        )
        bias = torch.randn(columns)
        for threshold in THRESHOLDS:
            mask = dropout_mask(tokens, columns, threshold)
            dropped = x.double() * mask
            value, magnitude = product(dropped, a.double().T)
            found = shrink(x, a, 0.25, threshold)
            assert close(found, (0.25 * value, 0.25 * magnitude), columns)
            if threshold == 0 and tokens and columns > 1:
                assert not close(found / 2, (0.25 * value, 0.25 * magnitude), columns)

            truth = product(t.double().T, dropped)
            found = tsreduce(t, x, threshold)
            assert close(found, truth, tokens)
            if threshold == 0 and tokens:
                assert not close(found / 2, truth, tokens)

            value, magnitude = (mask * each for each in product(t.double(), a.double()))
            assert close(expand(t, a, threshold=threshold), (value, magnitude), rank)
            with_bias = expand(t, a, bias=bias, threshold=threshold)
            assert close(with_bias, (bias + value, bias.abs() + magnitude), rank)
            found = expand(t, a, y=y, threshold=threshold)
            assert close(found, (y + value, y.abs() + magnitude), rank)
            if threshold == 0 and tokens:
                half = y + (found - y) / 2
                assert not close(half, (y + value, y.abs() + magnitude), rank)


@pytest.mark.parametrize("threshold", [0, 3277])
@pytest.mark.parametrize("tokens, columns, rank", [(0, 5, 3), (1, 7, 1), (65, 129, 5), (65, 129, 24), (37, 1000, 100)])
def test_a_bfloat16_operand_is_widened_exactly_and_rounded_once(tokens, columns, rank, threshold):
    x = strided(tokens, columns, dtype=torch.bfloat16)
    a, t, bias = strided(rank, columns), strided(tokens, rank), torch.randn(columns)
    y = torch.randn(tokens, columns).bfloat16()
    assert torch.equal(shrink(x, a, 0.5, threshold), shrink(x.float(), a, 0.5, threshold))
    assert torch.equal(tsreduce(t, x, threshold), tsreduce(t, x.float(), threshold))
    for base in ({"y": y.float()}, {"bias": bias}, {}):
        wanted = expand(t, a, **base, threshold=threshold).bfloat16()
        found = expand(t, a, **base, threshold=threshold, dtype=torch.bfloat16)
        assert torch.equal(found, wanted)


def test_bfloat16_rounds_as_torch_does():
    bits = torch.arange(2**16, dtype=torch.int32).reshape(256, 256) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (bits | low).view(torch.float32).reshape(-1, 1)
        found = expand(values, torch.ones(1, 1), dtype=torch.bfloat16)
        wanted = (values + 0.0).bfloat16()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("threshold", THRESHOLDS[1:])
@pytest.mark.parametrize("seed, stream", [(0, 0), (5, 3), (2**64 - 1, 2**32 - 1), (1 << 63, 1 << 31)])
def test_the_mask_is_the_definition_bit_for_bit(seed, stream, threshold):
    tokens, columns = 37, 1030
    truth = dropout_mask(tokens, columns, threshold, seed, stream)
    ones = torch.ones(tokens, 1)
    found = expand(ones, torch.ones(1, columns), threshold=threshold, seed=seed, stream=stream)
    assert torch.equal(found, truth.float())
    eye = torch.eye(tokens)
    assert torch.equal(tsreduce(eye, torch.ones(tokens, columns), threshold, seed=seed, stream=stream), found)
    columns_seen = shrink(torch.ones(tokens, columns), torch.eye(columns), 1.0, threshold, seed=seed, stream=stream)
    assert torch.equal(columns_seen, found)


@pytest.mark.parametrize("threshold", [0, 3277])
@pytest.mark.parametrize("tokens, columns, rank", [(700, 1100, 24), (65, 4099, 5), (300, 513, 100), (1, 2048, 64)])
def test_bits_depend_on_nothing_but_the_call(tokens, columns, rank, threshold):
    x, a, t, y = (
        strided(tokens, columns),
        strided(rank, columns),
        strided(tokens, rank),
        torch.randn(tokens, columns),
    )

    def run(threads):
        return (
            shrink(x, a, 0.5, threshold, threads),
            tsreduce(t, x, threshold, threads),
            expand(t, a, y, None, threshold, threads),
        )

    once = run(1)
    for threads in (1, 2, 3, 7):
        for one, other in zip(once, run(threads), strict=True):
            assert torch.equal(one, other)
    # Rows of the result are the same in any company.
    assert torch.equal(shrink(x[: tokens // 2 + 1], a, 0.5, threshold), once[0][: tokens // 2 + 1])
    assert torch.equal(
        expand(t[: tokens // 2 + 1], a, y[: tokens // 2 + 1], None, threshold), once[2][: tokens // 2 + 1]
    )


@pytest.mark.parametrize("threshold", [0, 3277])
def test_error_is_no_more_than_that_of_torch(threshold):
    tokens, columns, rank = 2048, 512, 16
    x, a, t = torch.randn(tokens, columns), torch.randn(rank, columns), torch.randn(tokens, rank)
    mask = dropout_mask(tokens, columns, threshold)
    dropped = x.double() * mask
    for found, product_of_torch, truth in (
        (shrink(x, a, 1.0, threshold), torch.mm(dropped.float(), a.T), dropped @ a.double().T),
        (tsreduce(t, x, threshold), torch.mm(t.T, dropped.float()), t.double().T @ dropped),
        (expand(t, a, threshold=threshold), torch.mm(t, a) * mask.float(), t.double() @ a.double() * mask),
    ):
        assert relative_error(found, truth) <= 2 * relative_error(product_of_torch, truth)


def test_a_dropped_nan_is_gone():
    tokens, columns, threshold = 40, 70, 30000
    mask = dropout_mask(tokens, columns, threshold)
    x, a, t = torch.randn(tokens, columns), torch.randn(5, columns), torch.randn(tokens, 5)
    poisoned = torch.where(mask == 0, torch.nan, x)
    assert torch.equal(shrink(poisoned, a, 1.0, threshold), shrink(x, a, 1.0, threshold))
    assert torch.equal(tsreduce(t, poisoned, threshold), tsreduce(t, x, threshold))
    assert torch.equal(expand(t, a, poisoned, None, threshold).isnan(), mask == 0)  # the base is not dropped
    b = a.clone()
    b[:, 3] = torch.nan
    expected = torch.zeros(tokens, columns, dtype=torch.bool)
    expected[:, 3] = mask[:, 3] != 0
    assert torch.equal(expand(t, b, threshold=threshold).isnan(), expected)
    # Kept ones stay.
    poisoned = torch.where(mask == 0, x, torch.nan)
    assert bool(shrink(poisoned, a, 1.0, threshold).isnan().all())


def test_empty_sums_are_zero_and_empty_results_are_untouched():
    assert torch.equal(tsreduce(torch.randn(0, 3), torch.randn(0, 9)), torch.zeros(3, 9))
    assert torch.equal(shrink(torch.randn(4, 0), torch.randn(3, 0), threshold=5), torch.zeros(4, 3))
    y, bias = torch.randn(4, 9), torch.randn(9)
    assert torch.equal(expand(torch.randn(4, 0), torch.randn(0, 9), y, threshold=9), y)
    assert torch.equal(expand(torch.randn(4, 0), torch.randn(0, 9), bias=bias), bias.expand(4, 9))
    for shape in ((0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)):
        tokens, columns, rank = shape
        assert shrink(torch.randn(tokens, columns), torch.randn(rank, columns)).shape == (tokens, rank)
        assert tsreduce(torch.randn(tokens, rank), torch.randn(tokens, columns)).shape == (rank, columns)
        assert expand(torch.randn(tokens, rank), torch.randn(rank, columns)).shape == (tokens, columns)


def test_bad_arguments():
    module = _ext.extension()
    with pytest.raises(ValueError, match="threshold"):
        module.lora_shrink(0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0, 65536, 0, 0, 1)
    with pytest.raises(ValueError, match="sizes"):
        module.lora_tsreduce(0, 0, 0, 0, 0, 0, -1, 1, 1, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="threads"):
        module.lora_expand(0, 0, 0, 0, 0, 0, 1, 1, 1, False, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="bias"):
        expand(torch.randn(2, 3), torch.randn(3, 4), torch.randn(2, 4), torch.randn(4))


@pytest.mark.parametrize("lane_bytes", [16, 32])
def test_narrower_machines(lane_bytes):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "bfloat16 or the_mask or (the_products and 65-129) or bits or nan"]
    environment = {**os.environ, "LORA_KERNELS_LANE_BYTES": str(lane_bytes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
