"""The CUDA kernels of small matrices with a thread of the CPU for each of a block: numbers, races, bank conflicts."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda_on_cpu.build import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="GCC on Linux"),
]


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return build(folder, ["-O1"])


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked")
    program = build(folder, ["-O1", "-g1", "-fsanitize=thread"])
    if "unexpected memory mapping" in run(program, 1, 0, 0).stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel")
    return program


@pytest.mark.parametrize("order", [1, 5, 16])
def test_numbers_are_right(plain, order):
    done = run(plain, order, 0, 0)
    residuals = [float(number) for number in re.findall(r"info 0 residual (\S+)", done.stdout)]
    assert len(residuals) == 3 and max(residuals) < 1e-11, done.stdout


@pytest.mark.parametrize("bad", [0, 1])
def test_no_data_races(checked, bad):
    done = run(checked, 5, bad, 0)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    assert f"singular_values info {bad}" in done.stdout


def test_shared_memory_has_hardly_any_bank_conflicts(plain):
    done = run(plain, 32, 0, 1)
    over_ideal = [float(number) for number in re.findall(r"wavefronts (\S+)", done.stdout)]
    assert len(over_ideal) == 2 and max(over_ideal) < 1.2, done.stdout
