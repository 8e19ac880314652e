"""The ahead-of-time check knows every form that the ops launch."""

import random

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.aot_cases import CHIPS, cases, recorded
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._rows import Selection
from lora_kernels.ops.covariance import kernel as covariance
from lora_kernels.ops.gradient_statistics import kernel as gradients
from lora_kernels.ops.grouped_lora import kernel as grouped
from lora_kernels.ops.lora_linear import kernel as linear
from lora_kernels.ops.lora_pro_adam import kernel as adam
from lora_kernels.ops.lora_pro_adam.config import Adam
from lora_kernels.ops.random_matrix.reference import Omega
from lora_kernels.ops.sketch import kernel as sketch
from lora_kernels.ops.skinny import kernel as skinny


def form(case):
    """What a compile depends on; pointers that flags switch off stand for others, and have any dtype."""
    switched = {"index_ptr", "weight_ptr", "seed_ptr", "scale_ptr", "bias_ptr", "partial_ptr"}
    types = tuple((name, kind) for name, kind in case["signature"].items() if name not in switched)
    return case["kernel"].__name__, types, tuple(sorted(case["constexprs"].items())), case["warps"], case["stages"]


def launch_some(draw, aligned):
    """One call of every op at any sizes."""

    def new(*sizes, dtype=torch.float32):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    def size(most):
        return 16 * draw.randint(1, most // 16) + (0 if aligned else draw.randint(1, 15))

    dtype = draw.choice((torch.bfloat16, torch.float16, torch.float32))
    tokens, m, n, rank = draw.choice((1, 100, 3000, 20000)), size(9000), size(9000), draw.choice((8, 16, 24, 64, 128))
    g, x, t = new(tokens, m, dtype=dtype), new(tokens, n, dtype=dtype), new(tokens, rank, dtype=dtype)
    index = draw.choice((None, new(tokens, dtype=torch.int64)))
    rows, seed = Selection(index, draw.choice((None, new(tokens)))), new(1, dtype=torch.int64)
    mask = draw.choice((None, Mask(1000, seed, 1)))
    covariance.covariance(new(n, n), x, rows, draw.choice((None, new(n))))
    gradients.gradient_statistics(new(m, n), g, x, *rows)
    omega = Omega(draw.choice(("rademacher", "gaussian")), 1, 2)
    sketch.sketch(new(n, rank), x, draw.choice((x, g)), rows, None, omega)
    skinny.shrink(t, x, new(rank, n, dtype=dtype), 1.0, mask)
    skinny.tsreduce(new(rank, n), t, x, mask)
    skinny.expand(x, t, new(rank, n, dtype=dtype), draw.choice((None, x)), None, mask)
    offsets, factor = new(9, dtype=torch.int32 if aligned else torch.int64), new(8, rank, n, dtype=dtype)
    grouped.shrink(t, x, offsets, factor, 1.0, mask)
    grouped.reduce(factor, t, x, offsets, mask)
    linear.linear(g, x, new(n, m, dtype=dtype), t, new(rank, m, dtype=dtype), None, mask)
    numbers = Adam(scaling=0.5, beta1=0.9, beta2=0.99, eps=1e-8, step=1, row_offset=0, row_step=64)
    left, right = new(1, m, rank), new(1, rank, n)
    moment = new(1, m, n, dtype=draw.choice((torch.float32, torch.bfloat16)))
    adam.lora_pro_adam((moment, moment), (right, left, right, left), numbers, seed, new(1, rank, n), new(1, m, rank))


@pytest.mark.slow
def test_every_form_that_is_launched_is_compiled():
    draw = random.Random(0)
    for chip in CHIPS:
        for aligned in (True, False):
            known = {form(case) for case in cases() if chip.name in case["chips"] and case["aligned"] == aligned}
            for _ in range(25):
                with recorded(chip) as launches:
                    launch_some(draw, aligned)
                for case in launches.values():
                    assert form(case) in known, (chip.name, aligned, form(case))
