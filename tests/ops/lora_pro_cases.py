"""What the tests of the LoRA-Pro Adam op share."""

import torch

from lora_kernels.ops.lora_pro_adam import reference
from tests.helpers.accuracy import assert_accurate, rounding

SCALING, BETAS, EPS = 0.5, (0.8, 0.95), 1e-8


def make(rows, columns, rank, dtype=torch.float32, state=None):
    """Moments as after some steps, and factors: `(exp_avg, exp_avg_sq), (a, b, grad_a, grad_b)`."""
    state = state or dtype
    moments = torch.randn(rows, columns).to(state), torch.rand(rows, columns).to(state)
    shapes = ((rank, columns), (rows, rank), (rank, columns), (rows, rank))
    return moments, tuple(torch.randn(shape).to(dtype) for shape in shapes)


def batch(layers, rows, columns, rank, dtype=torch.float32, state=None):
    """The same of many layers, with the moments side by side in the rows of one matrix, as experts have them."""
    made = [make(rows, columns, rank, dtype, state) for _ in range(layers)]
    moments, factors = (zip(*group, strict=True) for group in zip(*made, strict=True))
    wide = [torch.cat(part, 1).view(rows, layers, columns).transpose(0, 1) for part in moments]
    return tuple(wide), tuple(map(torch.stack, factors))


def whole_numbers(rows, columns, rank, state=torch.bfloat16):
    """The same, but so that float32 holds every number of a few steps with `EXACT` exactly, in any order of sums."""
    moments = torch.zeros(rows, columns, dtype=state), torch.zeros(rows, columns, dtype=state)
    shapes = ((rank, columns), (rows, rank), (rank, columns), (rows, rank))
    return moments, tuple(torch.randint(-3, 4, shape).float() for shape in shapes)


EXACT = {"scaling": 0.5, "betas": (0.5, 0.75)}


def check(found, truth, rows, columns, rank, plain=None, state=None):
    """Moments and results, of which `found` may be the last ones.

    E is a sum of 2 rank products, the first moment of one more; the square of E errs twice as much, and the direction
    by both roots. The results are sums over rows and columns of directions. A state in bfloat16 is rounded by up to an
    eps of that.
    """
    dtype = found[-1].dtype
    first = rounding(dtype, 2 * rank + 1)
    bounds = [first, 2 * first, 2 * first + rounding(dtype, rows), 2 * first + rounding(dtype, columns)]
    if dtype == torch.float64:  # the truth is rounded, too
        bounds = [2 * bound for bound in bounds]
    if state == torch.bfloat16:
        bounds[:2] = [bound + torch.finfo(state).eps for bound in bounds[:2]]
    names = ["exp_avg", "exp_avg_sq", "bt_h", "h_at"]
    plain = plain or [None] * len(found)
    groups = found, truth, plain, *(each[-len(found) :] for each in (bounds, names))
    for one, exact, own, bound, name in zip(*groups, strict=True):
        assert_accurate(one, exact, bound, plain=own, what=name)


def trajectory(moments, factors, steps, run):
    """Ten steps whose gradients change: the last results of `run(moments, factors, step)`, and the moments."""
    generator = torch.Generator().manual_seed(5)
    for step in range(1, steps + 1):
        noise = [torch.randn(each.shape, generator=generator).to(each.dtype) for each in factors[2:]]
        results = run(moments, (*factors[:2], *noise), step)
        if len(results) == 4:  # the reference gives new moments
            moments, results = results[:2], results[2:]
    return (*moments, *results)


def by_definition(dtype):
    def run(moments, factors, step):
        return reference.lora_pro_adam(
            *moments, *factors, scaling=SCALING, betas=BETAS, eps=EPS, step=step, dtype=dtype
        )

    return run
