"""The sdist and the wheel, as a user gets them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import build_support

pytestmark = pytest.mark.slow
# What an installed script does, in the process that has imported torch already.
SMOKE = """
import runpy, sys
import torch, lora_kernels as lk
from lora_kernels.ops import _ext
out = torch.zeros(4, 4)
lk.ops.covariance_(out, torch.eye(4))
assert torch.equal(out, torch.eye(4))
from lora_kernels.ops.lora_linear import table
table.read(table.PACKAGED)
print(lk.__file__, lk.__version__, _ext.load()[0] is not None, flush=True)
script = sys.argv[1]
sys.argv = [script, "doctor"]
runpy.run_path(script, run_name="__main__")
"""


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy: building in place would disturb the installed package."""
    where = tmp_path_factory.mktemp("source") / "lora_kernels"
    skip = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", "demo-out")
    return Path(shutil.copytree(ROOT, where, ignore=skip))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """The C++ compiler, in a hurry: how the code is optimised has no part in how it is packed."""
    hasty = tmp_path_factory.mktemp("compiler") / "hasty"
    hasty.write_text(f'#!/bin/sh\nexec {build_support.find_cxx()} "$@" -O0\n')
    hasty.chmod(0o755)
    return {"LORA_KERNELS_CUDA": "0", "CXX": str(hasty)}


def smoke(tmp_path, wheel):
    """Install into an empty environment that sees this one's packages, but not its copy of ours."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = tmp_path / "venv" / "bin" / "python"
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    script = python.with_name("lora-kernels")
    first, doctor = run(str(python), "-c", SMOKE, str(script), cwd=tmp_path).stdout.split("\n", 1)
    file, version, compiled = first.split()
    assert Path(file).is_relative_to(tmp_path) and version in doctor
    return version, compiled == "True"


@pytest.mark.skipif(build_support.find_cxx() is None, reason="no C++ compiler")
def test_sdist_builds_a_wheel_that_works(source, compiler, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), cwd=source, **compiler)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "csrc/cuda.cu",
        "benchmarks/demo/__main__.py",
        "csrc/small_linalg.h",
        "build_support.py",
        "LICENSE",
        "tests/conftest.py",
    } <= names
    packed = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("lora_kernels/_C") for name in packed) and "lora_kernels/py.typed" in packed
    assert {
        "lora_kernels/ops/covariance/kernel.py",
        "lora_kernels/statistics/collector.py",
        "lora_kernels/landscape/page.html.j2",
    } <= set(packed)
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) or "demo" in name for name in packed)
    version, compiled = smoke(tmp_path, wheel)
    assert version == "0.1.0.dev0" and compiled


def test_extension_can_be_switched_off(source, tmp_path):
    options = ("--no-isolation", "--wheel", "--outdir", str(tmp_path))
    run(sys.executable, "-m", "build", *options, cwd=source, LORA_KERNELS_BUILD_EXT="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    assert smoke(tmp_path, wheel)[1] is False


def test_missing_compiler_is_one_clear_warning(source, monkeypatch):
    done = run(sys.executable, "setup.py", "--version", cwd=source, CXX="", PATH=str(source))
    assert done.stderr.count("no C++ compiler found") == 1


def some_sources(source, where, *names):
    """A copy with some of the C++ files, which link without the others."""
    copy = Path(shutil.copytree(source, where))
    for file in (copy / "csrc").glob("*.cpp"):
        if file.name not in names:
            file.unlink()
    return copy


def test_broken_code_is_an_error(source, tmp_path):
    broken = some_sources(source, tmp_path / "broken", "random.cpp", "cpu.cpp")
    (broken / "csrc" / "cpu.cpp").write_text("this is not C++\n")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out")]
    environment = {**os.environ, "LORA_KERNELS_CUDA": "0"}
    done = subprocess.run(command, cwd=broken, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "building lora_kernels._C failed" in done.stderr


@pytest.mark.skipif(build_support.find_cxx() is None, reason="no C++ compiler")
def test_build_is_incremental(source, compiler, tmp_path):
    pytest.importorskip("ninja")
    copy = some_sources(source, tmp_path / "copy", "random.cpp", "cpu.cpp")
    command = (sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "out"))

    def compiled():
        out = run(*command, cwd=copy, **compiler).stdout
        assert ("no work to do" in out) == ("csrc/" not in out), out
        return {name for name in ("cpu.cpp", "random.cpp") if f"csrc/{name} -o" in out}

    assert compiled() == {"cpu.cpp", "random.cpp"} and compiled() == set()
    for name, dependent in (("cpu.cpp", {"cpu.cpp"}), ("drivers.h", {"cpu.cpp", "random.cpp"})):
        with (copy / "csrc" / name).open("a") as file:
            file.write("\n")
        assert compiled() == dependent


def test_a_folder_of_the_same_name_hides_nothing(tmp_path):
    """Scripts are often started from where the clone lies."""
    (tmp_path / "lora_kernels").mkdir()
    command = [sys.executable, "-c", "import lora_kernels; lora_kernels.initialize"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
