"""Every launch at sizes beyond any model's stays within the grid that CUDA allows: (2^31 - 1, 65535, 65535)."""

import importlib

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime import KernelInterface

from lora_kernels.ops import _reduce
from lora_kernels.ops._dropout import Mask
from lora_kernels.ops._op import OPS
from lora_kernels.ops._rows import Selection
from lora_kernels.ops.covariance import kernel as covariance
from lora_kernels.ops.gradient_statistics import kernel as gradients
from lora_kernels.ops.grouped_lora import kernel as grouped
from lora_kernels.ops.lora_linear import kernel as linear
from lora_kernels.ops.lora_pro_adam import kernel as pro
from lora_kernels.ops.lora_pro_adam.config import Adam
from lora_kernels.ops.random_matrix import kernel as draws
from lora_kernels.ops.random_matrix.reference import Omega
from lora_kernels.ops.sketch import kernel as sketch
from lora_kernels.ops.skinny import kernel as skinny

LIMITS = (2**31 - 1, 65535, 65535)
MODULES = {_reduce, *(importlib.import_module(op.kernel_module) for op in OPS.values() if op.kernel_module)}
TOKENS = 4_000_000
LARGEST = 2**31 - 1  # what random matrices promise of rows and of columns
HALF, FLOAT = torch.bfloat16, torch.float32


def matrix(rows, columns, dtype=HALF):
    """A matrix of any size, without memory."""
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def vector(size):
    return torch.empty(size, device="meta")


def adam(rows, columns, rank, layers=1):
    def matrices(height, width):
        return torch.empty(layers, height, width, device="meta")

    left, right = matrices(rows, rank), matrices(rank, columns)
    numbers = Adam(scaling=1.0, beta1=0.9, beta2=0.99, eps=1e-8, step=1, row_offset=0, row_step=rows)
    moments = matrices(rows, columns), matrices(rows, columns)
    pro.lora_pro_adam(moments, (right, left, right, left), numbers, None, right.clone(), left.clone())


def skinny_products(tokens, size, rank):
    x, t, a = matrix(tokens, size), matrix(tokens, rank), matrix(rank, size)
    skinny.shrink(t, x, a, 1.0, None)
    skinny.tsreduce(matrix(rank, size, FLOAT), t, x, None)
    skinny.tsreduce_pair((a, matrix(size, rank)), t, x, None, t, x)
    skinny.expand(x, t, a, None, None, Mask(1, torch.empty(1, dtype=torch.int64, device="meta"), 0))


def grouped_products(rows, size, experts, rank=16):
    offsets = torch.empty(experts, dtype=torch.int64, device="meta")
    factor = torch.empty(experts, rank, size, dtype=HALF, device="meta")
    grouped.shrink(matrix(rows, rank), matrix(rows, size), offsets, factor, 1.0, None)
    grouped.reduce(factor, matrix(rows, rank), matrix(rows, size), offsets, None)
    grouped.expand(matrix(rows, size), matrix(rows, rank), offsets, factor, None, None)


def sketches(tokens, features, same):
    left, out = matrix(tokens, features), matrix(features, 16, FLOAT)
    right = left if same else matrix(tokens, features)
    sketch.sketch(out, left, right, Selection(None, vector(tokens)), None, Omega("rademacher", 0, 0))
    sketch.project(matrix(tokens, 16, FLOAT), left, Omega("gaussian", 0, 0))


CALLS = {
    "covariance of many tokens": lambda: covariance.covariance(matrix(64, 64, FLOAT), matrix(TOKENS, 64)),
    "covariance of many features": lambda: covariance.covariance(matrix(32768, 32768, FLOAT), matrix(8, 32768)),
    "column sums of many rows": lambda: _reduce.column_sums(vector(64), matrix(LARGEST, 64)),
    "column sums of many columns": lambda: _reduce.column_sums(vector(LARGEST), matrix(8, LARGEST)),
    "gradient of many tokens": lambda: gradients.gradient_statistics(
        matrix(64, 64, FLOAT), matrix(TOKENS, 64), matrix(TOKENS, 64), None, None
    ),
    "gradient of a vocabulary": lambda: gradients.gradient_statistics(
        matrix(2**18, 4096, FLOAT), matrix(8, 2**18), matrix(8, 4096), None, None
    ),
    "experts, many rows": lambda: grouped_products(TOKENS, 64, 256),
    "experts, many features": lambda: grouped_products(64, TOKENS, 256),
    "linear": lambda: linear.linear(
        matrix(TOKENS, 2**18), matrix(TOKENS, 64), matrix(64, 2**18), matrix(TOKENS, 16), matrix(16, 2**18)
    ),
    "LoRA-Pro, many rows": lambda: adam(2**20, 64, 16),
    "LoRA-Pro, many columns": lambda: adam(64, 2**20, 16),
    "LoRA-Pro, many experts": lambda: adam(64, 64, 16, 10**5),
    "skinny products of many tokens": lambda: skinny_products(TOKENS, 64, 16),
    "skinny products of many features": lambda: skinny_products(64, TOKENS, 16),
    "signs, many columns": lambda: draws.random_matrix(matrix(1, LARGEST), "rademacher", 0, 0, 0),
    "signs, many rows": lambda: draws.random_matrix(matrix(LARGEST, 1), "rademacher", 0, 0, 0),
    "normal draws, many columns": lambda: draws.random_matrix(matrix(1, LARGEST), "gaussian", 0, 0, 0),
    "normal draws, many rows": lambda: draws.random_matrix(matrix(LARGEST, 1), "gaussian", 0, 0, 0),
    "sketch of many tokens": lambda: sketches(TOKENS, 12, True),
    "sketch of many tokens, two matrices": lambda: sketches(TOKENS, 12, False),
    "sketch of many features": lambda: sketches(64, TOKENS, True),
    "sketch of many features, two matrices": lambda: sketches(64, TOKENS, False),
}


def kernels(module):
    """The names of a module's own Triton kernels."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
    ]


KERNELS = {f"{module.__name__}.{name}" for module in MODULES for name in kernels(module)}


class Recorder:
    """Stands for a kernel: a launch only leaves its grid."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        self.launched.append((self.name, grid))
        return lambda *args, **kwargs: None


@pytest.fixture
def grids(monkeypatch):
    """The grids of launches, which then do nothing, on a chip of 160 multiprocessors."""
    launched = []
    for module in MODULES:
        for name in kernels(module):
            monkeypatch.setattr(module, name, Recorder(f"{module.__name__}.{name}", launched))
        if hasattr(module, "processors"):
            monkeypatch.setattr(module, "processors", lambda device: 160)
    return launched


@pytest.mark.parametrize("name", CALLS)
def test_grids_are_within_the_limits(grids, name):
    CALLS[name]()
    assert grids
    for kernel, grid in grids:
        assert all(0 < size <= limit for size, limit in zip(grid, LIMITS, strict=False)), (kernel, grid)


def test_every_kernel_is_launched_here(grids):
    for call in CALLS.values():
        call()
    assert KERNELS and {kernel for kernel, _ in grids} == KERNELS
