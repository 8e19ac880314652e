"""The build with sanitizers: it finds what is wrong. `make asan` is the whole of it."""

import subprocess
import sys

import pytest
import sanitized

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="flags of GCC on Linux"),
]

# What a binding is told of the sizes is what it believes.
CALL = """
import sanitized, torch
from lora_kernels.ops import _ext
x = torch.zeros(4, 8)
{}
print("survived")
"""
GOOD = "_ext.extension().random_matrix(x.data_ptr(), 4, 8, False, 1, 0, 0, 1)"
TOO_LONG = "_ext.extension().random_matrix(x.data_ptr(), 5, 8, False, 1, 0, 0, 1)"
TOO_EARLY = "_ext.extension().pack_rows(x.data_ptr() - 64, 0, 8, 0, 4, 8, 0, x.data_ptr(), 0, 0, 0, 0, 1)"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    some = ("bindings.cpp", "linalg_bindings.cpp", "cpu.cpp", "random.cpp")  # the others take minutes
    return sanitized.build(tmp_path_factory.mktemp("sanitized"), some)


@pytest.mark.parametrize(("call", "expected"), [(GOOD, ""), (TOO_LONG, "WRITE of size"), (TOO_EARLY, "READ of size")])
def test_an_access_out_of_bounds_ends_the_process(module, call, expected):
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(call)],
        env=sanitized.environment(module), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ("survived" in done.stdout) == (expected == ""), done.stderr[-3000:]
    assert done.returncode == (0 if not expected else 86)
    assert expected in done.stderr and ("heap-buffer-overflow" in done.stderr) == bool(expected)
