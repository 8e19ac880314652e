"""Prepared launches: they are those of Triton's front end, a layer has few, and interpreted kernels have none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from lora_kernels.ops import _launching
from lora_kernels.ops.skinny import kernel as skinny

ROOT = Path(__file__).parents[2]


def test_on_a_fake_gpu():
    """Every part of `fake_gpu_parts`, in one process that does not interpret kernels."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.fake_gpu_parts"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_interpreted_kernels_are_never_prepared():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    assert _launching.INTERPRETED and not _launching.prepares()
    x, a, out = torch.randn(5, 32), torch.randn(4, 32), torch.empty(5, 4)
    for _ in range(2):
        skinny.shrink(out, x, a, 1.0, None)
    assert torch.allclose(out, x @ a.T, atol=1e-4)
    constants = _launching.constants_of(PART=4, PAIR=False)
    sums = out.new_empty(20), out.new_empty(20), out.new_ones(3, 20)
    for _ in range(2):
        _launching.launch(skinny.sum_parts_kernel, (5, 1, 1), sums, (20, 0, 3), constants)
    assert sums[0].eq(3).all() and not constants.compiled


def test_this_version_of_triton_is_known():
    """A new minor version must be looked at before its launches are prepared."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    assert version in _launching.KNOWN_TRITON
