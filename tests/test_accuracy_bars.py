"""`rounding` is wide enough for the worst order of a sum, and no wider than it needs to be."""

import pytest
import torch

from tests.conftest import relative_error
from tests.helpers import accuracy
from tests.helpers.accuracy import assert_accurate, rounding


@pytest.mark.parametrize("signs", ["random", "same"])
@pytest.mark.parametrize("length", [1, 2, 7, 64, 300, 2049, 5000])
def test_the_worst_order_of_a_sum_passes_and_needs_it(length, signs):
    left, right = torch.randn(2, length, 300)
    if signs == "same":
        left, right = left.abs(), right.abs()
    truth, bound = (left.double() * right.double()).sum(0), rounding(torch.float32, length)
    found = torch.zeros(300)
    for one, other in zip(left, right, strict=True):
        found += one * other
    assert_accurate(found, truth, bound)
    if length >= 64:
        assert relative_error(found, truth) > bound / 4, "a bar this wide is not needed"


def truncated_sum(left, right, block):
    """Sums of products as tensor cores form them: blocks added exactly, each partial sum rounded toward zero."""
    total = torch.zeros(left.shape[1])
    for first in range(0, len(left), block):
        part = slice(first, first + block)
        exact = total.double() + (left[part].double() * right[part].double()).sum(0)
        total = exact.float()
        away = total.double().abs() > exact.abs()
        total = torch.where(away, torch.nextafter(total, torch.zeros(())), total)
    return total


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("signs", ["random", "same"])
@pytest.mark.parametrize("length", [7, 64, 300, 3001])
def test_sums_of_tensor_cores_pass_on_a_gpu(length, signs, block, monkeypatch):
    left, right = torch.randn(2, length, 300)
    if signs == "same":
        left, right = left.abs(), right.abs()
    truth, found = (left.double() * right.double()).sum(0), truncated_sum(left, right, block)
    monkeypatch.setattr(accuracy, "TRUNCATES", False)
    if length == 3001 and block == 8:
        assert relative_error(found, truth) > rounding(torch.float32, length), "the wider bar is not needed"
    monkeypatch.setattr(accuracy, "TRUNCATES", True)
    assert_accurate(found, truth, rounding(torch.float32, length))


@pytest.mark.parametrize("length", [7, 64, 300, 2049])
def test_what_is_wrong_fails(length):
    left, right = torch.randn(2, length, 300, dtype=torch.float64)
    truth, bound = (left * right).sum(0), rounding(torch.float32, length)
    rounded = (left.half().double() * right.half().double()).sum(0)  # as in tf32: ten bits
    narrow = torch.zeros(300, dtype=torch.bfloat16)
    for term in left * right:
        narrow += term.bfloat16()
    for wrong in (rounded, narrow, (left[1:] * right[1:]).sum(0), 0.9999 * truth):
        with pytest.raises(AssertionError, match="but must be at most"):
            assert_accurate(wrong, truth, bound)
    with pytest.raises(AssertionError, match="would pass a half-scaled result"):
        assert_accurate(truth, truth, 0.6)
