"""For which GPUs the CUDA part is compiled, by what the nvcc at hand knows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import build_support

# What `nvcc --list-gpu-arch` of some releases prints.
KNOWN = {
    "11.8": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.4": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.9": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 103 120 121",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}
# Compiles where it was asked for architectures that it knows, as nvcc does.
NVCC = """#!/usr/bin/env python3
import re, sys
known = "{known}".split()
if sys.argv[1:] == ["--list-gpu-arch"]:
    print(*(f"compute_{{arch}}" for arch in known), sep="\\n")
for arch in re.findall(r"compute_(\\w+)", " ".join(sys.argv[1:])):
    if arch not in known:
        sys.exit(f"nvcc fatal   : Unsupported gpu architecture 'compute_{{arch}}'")
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    def write(text):
        file = tmp_path / "nvcc"
        file.write_text(text)
        file.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(file))
        monkeypatch.delenv("LORA_KERNELS_CUDA", raising=False)
        return str(file)

    return write


@pytest.mark.skipif(build_support.find_cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize("release", KNOWN)
def test_every_release_of_nvcc_is_asked_for_what_it_knows(nvcc, tmp_path, release, capsys):
    program = nvcc(NVCC.format(known=KNOWN[release]))
    plan = build_support.make_plan()
    assert plan.nvcc == program and {"75", "80", "90"} <= set(plan.archs) and capsys.readouterr().err == ""
    assert ("100" in plan.archs) == (release in ("12.9", "13.0"))
    text = build_support.write_ninja(plan, tmp_path / "work", tmp_path / "_C.so").read_text()
    assert set(re.findall(r"compute_(\w+)", text)) == set(plan.archs)
    assert f"code=compute_{plan.archs[-1]}" in text  # PTX for chips that come later


@pytest.mark.skipif(build_support.find_cxx() is None, reason="no C++ compiler")
@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", '#!/bin/sh\necho compute_80\n[ "$1" = "--list-gpu-arch" ]\n'])
def test_an_nvcc_that_builds_nothing_is_one_warning(nvcc, text, capsys):
    program = nvcc(text)
    plan = build_support.make_plan()
    assert plan.nvcc is None and plan.archs == ()
    assert capsys.readouterr().err.count(f"warning: lora_kernels: {program} is left out") == 1


def test_cuda_can_be_switched_off(nvcc, monkeypatch):
    nvcc(NVCC.format(known="80"))
    monkeypatch.setenv("LORA_KERNELS_CUDA", "0")
    assert build_support.find_nvcc() is None


@pytest.mark.skipif(build_support.find_nvcc() is None, reason="no nvcc")
def test_the_nvcc_at_hand_takes_the_flags(tmp_path):
    (tmp_path / "empty.cu").write_text("\n")
    program = build_support.find_nvcc()
    flags = build_support.nvcc_compile_flags(build_support.supported_archs(program))
    command = [program, "--dryrun", *flags, "-c", str(tmp_path / "empty.cu"), "-o", str(tmp_path / "empty.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
