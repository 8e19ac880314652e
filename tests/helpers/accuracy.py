"""Bars on rounding errors that hold on every processor.

The processor decides how a sum is cut into lanes, blocks and threads, and so how it is rounded. A bar is therefore a
multiple of what torch errs in the same run, or of what theory says of the worst order of a sum; never a number that one
machine happened to keep.
"""

import torch

# Tensor cores add the products of a block of 16 (sm_80: 8) exactly and truncate the sum (Fasi et al. 2021; Khattak and
# Mikaitis, arXiv 2512.07004), where other units round: their errors have one sign and grow with the number of blocks.
TRUNCATES = torch.cuda.is_available()
_BLOCK = 8


def rounding(dtype, length=1, result=None):
    """Relative error allowed to sums of `length` terms in `dtype`, in whatever order: eps (1 + 0.3 sqrt(length)).

    Sums that a narrower dtype `result` keeps may be off by half an eps of that, too.

    The worst order adds one term after another. Rounding a number moves it by 0.21 eps in the mean square. These errors
    add up like a random walk along the partial sums, to 0.15 eps sqrt(length) of the result where the terms have random
    signs, to 0.12 eps sqrt(length) where they have one sign. The bar is twice that, and one eps for the roundings of
    terms and result. tests/test_accuracy_bars.py shows that it is needed.

    On a GPU, float32 sums may be those of tensor cores: each block truncates 0.36 eps of the partial sum in the mean.
    """
    truncated = 0.36 * -(-length // _BLOCK) if TRUNCATES and dtype == torch.float32 else 0.0
    narrow = torch.finfo(result).eps / 2 if result in (torch.float16, torch.bfloat16) else 0.0
    return torch.finfo(dtype).eps * (1 + 0.3 * length**0.5 + truncated) + narrow


def assert_accurate(found, truth, bound, plain=None, terms=None, what=""):
    """The relative Frobenius error is within a bar, which a result scaled by half would not pass.

    Args:
        found: the result, in any dtype.
        truth: float64.
        bound: the bar.
        plain: torch's own result in the dtypes of the test: twice the error of that is allowed where it is more.
        terms: roots of the sums of squares of the terms of each sum, where sums may cancel: errors are then relative to
            the larger norm of this and the truth.
        what: begins the message.
    """
    truth = truth.double()
    scale = max(float(each.double().norm()) for each in (truth, terms) if each is not None)

    def error(of):
        return float((of.double() - truth).norm()) / max(scale, 1e-300)

    bound = bound if plain is None else max(bound, 2 * error(plain))
    assert error(found) <= bound, f"{what} relative error {error(found):.2e}, but must be at most {bound:.2e}".lstrip()
    if float(truth.norm()) > 0:
        assert error(0.5 * found.double()) > bound, f"{what} the bar would pass a half-scaled result".lstrip()
