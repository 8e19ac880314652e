"""The build with sanitizers: it finds what is wrong. `make asan` is the whole of it."""

import os
import sys

import pytest
import sanitized

from tests.helpers.warm import Warm

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
def processes(tmp_path_factory):
    """Processes in which a part of the extension is checked: of the others, the bindings alone are there, unchecked."""
    folder = tmp_path_factory.mktemp("sanitized")
    hasty = folder / "hasty"
    plain = 'case "$*" in *bindings.cpp.o) set -- "$@" -fno-sanitize=all -O0;; esac'
    hasty.write_text(f'#!/bin/sh\n{plain}\nexec {os.environ.get("CXX", "g++")} "$@"\n')
    hasty.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(hasty))
        module = sanitized.build(folder, ("bindings.cpp", "linalg_bindings.cpp", "cpu.cpp", "random.cpp"))
    with Warm(("torch",), sanitized.environment(module)) as made:
        yield made


@pytest.mark.parametrize(("call", "expected"), [(GOOD, ""), (TOO_LONG, "WRITE of size"), (TOO_EARLY, "READ of size")])
def test_an_access_out_of_bounds_ends_the_process(processes, tmp_path, call, expected):
    (tmp_path / "call.py").write_text(CALL.format(call))
    done = processes.run(str(tmp_path / "call.py"))
    assert ("survived" in done.stdout) == (expected == ""), done.stderr[-3000:]
    assert done.returncode == (0 if not expected else 86)
    assert expected in done.stderr and ("heap-buffer-overflow" in done.stderr) == bool(expected)
