"""The instruction sets that a processor can pretend to have: `make isa` runs the accuracy tests under all of them."""

import os
import subprocess
import sys

import instruction_sets
import pytest
from instruction_sets import LEVELS, SETTINGS, Setting

from lora_kernels.ops import _ext

NARROW = Setting("default", "default", "default", 1)
# A few tests of each kind of arithmetic: products and sums of torch and ours, decompositions, draws.
SENSITIVE = (
    "tests/ops/test_gradient_statistics.py", "tests/ops/test_covariance.py", "tests/ops/test_sketch.py",
    "tests/ops/test_lora_pro_adam.py", "tests/ops/test_orthonormalize.py", "tests/ops/test_random_matrix.py",
    "tests/linalg/test_eigen.py", "-k",
    "dtypes_may_differ or more_than_float32 or float64_sums or deficient or full_decomposition or 40-210-130"
    " or (matches_float64 and 2049 and float32 and cpp) or (same_numbers and 40-129 and cpp)",
)  # fmt: skip


def test_settings_cover_every_set_and_both_extremes():
    for name in ("torch", "libraries", "ours"):
        assert {getattr(each, name) for each in SETTINGS} == set(LEVELS)
    for threads in (1, 2):
        assert {each.torch for each in SETTINGS if each.threads == threads} == set(LEVELS)
    wider = {LEVELS.index(each.ours) - LEVELS.index(each.torch) for each in SETTINGS}
    assert {-2, 0, 2} <= wider


def test_a_set_that_the_processor_lacks_is_named():
    assert NARROW.missing("default") is None
    assert Setting("default", "avx2", "default", 1).missing("default") == "avx2"
    assert Setting("avx2", "avx2", "avx512", 1).missing("avx2") == "avx512"
    assert Setting("avx512", "avx512", "avx512", 1).missing("avx512") is None


@pytest.mark.skipif(_ext.load()[0] is None, reason="extension not built")
@pytest.mark.parametrize(
    "value, outcome", [("16", "16"), ("17", "LORA_KERNELS_LANE_BYTES is '17', but must be 16, 32 or 64")]
)
def test_vectors_of_the_extension_can_be_limited(value, outcome):
    code = "from lora_kernels.doctor import _versions; print(dict(_versions())['cpu vectors'])"
    environment = {**os.environ, "LORA_KERNELS_LANE_BYTES": value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=instruction_sets.ROOT, capture_output=True, text=True
    )
    assert outcome in done.stdout, done.stderr[-2000:]
    draw = "import torch; from lora_kernels.ops import random_matrix; random_matrix(2, 2, seed=0, backend='cpp')"
    done = subprocess.run(
        [sys.executable, "-c", draw], env=environment, cwd=instruction_sets.ROOT, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (value == "16")
    assert done.returncode == 0 or f"ValueError: {outcome}" in done.stderr


@pytest.mark.skipif(not instruction_sets.X86, reason="other processors have one set")
def test_a_setting_that_is_not_in_force_is_an_error(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "999")
    with pytest.raises(pytest.UsageError, match=r"OMP_NUM_THREADS is 999, but \d+ is in force"):
        instruction_sets.pytest_configure()


def test_the_most_sensitive_tests_pass_with_the_narrowest_vectors():
    done = instruction_sets.run(NARROW, SENSITIVE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
