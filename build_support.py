"""How the compiled part is built: compilers, flags, the ninja file. Used by setup.py and by the compile check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
# One binary per generation that needs its own, and PTX from which the driver compiles for later chips.
CUDA_BINARIES = ("80", "90a", "100")
CUDA_PTX = "90"


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, then CUDA_HOME, then PATH; `None` if absent or `LORA_KERNELS_CUDA=0`."""
    if os.environ.get("LORA_KERNELS_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    for candidate in (os.environ.get("CUDACXX"), home and str(Path(home) / "bin" / "nvcc"), "nvcc"):
        found = candidate and shutil.which(candidate)
        if found:
            return found
    return None


def nvcc_arch_flags() -> list[str]:
    """The `-gencode` flags of the fat binary."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_BINARIES]
    return [*flags, f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}"]


def nvcc_compile_flags() -> list[str]:
    """All flags for compiling a `.cu` file of csrc."""
    return ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DLK_WITH_CUDA", *nvcc_arch_flags()]


def find_cxx() -> str | None:
    """The C++ compiler: CXX, then the usual names; `None` if there is none."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = candidate and shutil.which(candidate.split()[0])
        if found:
            return found
    return None


def _accepts(cxx: str, flag: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [cxx, flag, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Plan:
    """What will be compiled and with what.

    Attributes:
        cxx: the C++ compiler.
        nvcc: the CUDA compiler, or `None`.
        openmp: whether the C++ compiler and linker know `-fopenmp`.
    """

    cxx: str
    nvcc: str | None
    openmp: bool


def make_plan() -> Plan | None:
    """Look for compilers.

    Returns:
        The plan; `None` where there is no C++ compiler.
    """
    cxx = find_cxx()
    return None if cxx is None else Plan(cxx, find_nvcc(), _accepts(cxx, "-fopenmp"))


def _compiler_name(cxx: str) -> str:
    answer = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return "".join(each for each in (answer.splitlines() or [cxx])[0] if each not in "\"'\\$")


def _escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _quoted(flags: list[str]) -> str:
    return " ".join("'" + flag.replace("$", "$$") + "'" for flag in flags)


def write_ninja(
    plan: Plan, folder: Path, output: Path, extra: Sequence[str] = (), sources: Sequence[str] | None = None
) -> Path:
    """Write the ninja file.

    Args:
        plan: the compilers.
        folder: where objects go.
        output: the extension module to make.
        extra: further flags of the C++ compiler and linker, such as a sanitizer's; they come last.
        sources: names of the C++ files; by default all.

    Returns:
        The file.
    """
    import pybind11  # a build requirement only

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", f"-I{SOURCES}"]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    flags += [f'-DLK_COMPILER="{_compiler_name(plan.cxx)}"']
    link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
    if plan.openmp:
        flags.append("-fopenmp")
        link.append("-fopenmp")
    linker = plan.cxx
    if plan.nvcc:
        flags += ["-DLK_WITH_CUDA", f'-DLK_CUDA_ARCHS="{" ".join(f"sm_{each}" for each in CUDA_BINARIES)}"']
        # nvcc links: it knows where its static runtime lives. The module then loads without a CUDA driver.
        linker = plan.nvcc
        link = ["-shared", "-cudart=static", *(["-Xcompiler=-fopenmp"] if plan.openmp else [])]
    units = [("cxx", each) for each in sorted(SOURCES.glob("*.cpp")) if sources is None or each.name in sources]
    units += [("nvcc", source) for source in sorted(SOURCES.glob("*.cu"))] if plan.nvcc else []
    flags += extra
    link += extra
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {plan.cxx} -MMD -MF $out.d {_quoted(flags + includes)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} {_quoted(link)} $in -o $out",
    ]
    if plan.nvcc:
        lines += [
            "rule nvcc",
            f"  command = {plan.nvcc} -MD -MF $out.d {_quoted(nvcc_compile_flags())} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    objects = []
    for rule, source in units:
        objects.append(folder / (source.name + ".o"))
        lines.append(f"build {_escape(objects[-1])}: {rule} {_escape(source)}")
    lines.append(f"build {_escape(output)}: link {' '.join(map(_escape, objects))}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    return file


def run_ninja(file: Path) -> None:
    """Build, in parallel, what is out of date.

    Args:
        file: from `write_ninja`.

    Raises:
        RuntimeError: if a command fails: broken code is never skipped.
    """
    try:
        import ninja  # the PyPI package

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or "ninja"
    done = subprocess.run([program, "-C", str(file.parent), "-f", file.name], check=False)
    if done.returncode != 0:
        raise RuntimeError(f"building lora_kernels._C failed (ninja exit status {done.returncode}); see above")
