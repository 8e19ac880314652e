"""Bars on rounding errors that hold on every processor.

The processor decides how a sum is cut into lanes, blocks and threads, and so how it is rounded. A bar is therefore a
multiple of what torch errs in the same run, or of what theory says of the worst order of a sum; never a number that one
machine happened to keep.
"""

import torch

from tests.conftest import relative_error


def rounding(dtype, length=1):
    """Relative error allowed to sums of `length` terms in `dtype`, in whatever order: eps (1 + 0.3 sqrt(length)).

    The worst order adds one term after another. Rounding a number moves it by 0.21 eps in the mean square. These errors
    add up like a random walk along the partial sums, to 0.15 eps sqrt(length) of the result where the terms have random
    signs, to 0.12 eps sqrt(length) where they have one sign. The bar is twice that, and one eps for the roundings of
    terms and result. tests/test_accuracy_bars.py shows that it is needed.
    """
    return torch.finfo(dtype).eps * (1 + 0.3 * length**0.5)


def assert_accurate(found, truth, bound, what=""):
    """The relative Frobenius error is at most `bound`, which a result scaled by half would not pass."""
    error = relative_error(found, truth)
    assert error <= bound, f"{what} relative error {error:.2e}, but must be at most {bound:.2e}".lstrip()
    if found.numel() and float(truth.norm()) > 0:
        assert relative_error(0.5 * found, truth) > bound, f"{what} the bar would pass a half-scaled result".lstrip()
