"""How the compiled part is built: compilers, flags, the ninja file. Used by setup.py and by the compile check."""

from __future__ import annotations

import os
import re
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
# One binary per generation, ascending, and PTX of the last, from which the driver compiles for later chips.
CUDA_ARCHS = ("75", "80", "90", "100")


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


def supported_archs(nvcc: str, wanted: Sequence[str] = CUDA_ARCHS) -> tuple[str, ...]:
    """Those of the wanted architectures for which an nvcc compiles: one of CUDA 12.0-12.6 does not know 100."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = re.findall(r"compute_(\w+)", listed)
    return tuple(arch for arch in wanted if arch in known)


def nvcc_arch_flags(archs: Sequence[str]) -> list[str]:
    """The `-gencode` flags of the fat binary for architectures in ascending order."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def nvcc_compile_flags(archs: Sequence[str]) -> list[str]:
    """All flags for compiling a `.cu` file of csrc."""
    return ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DLK_WITH_CUDA", *nvcc_arch_flags(archs)]


def find_cxx() -> str | None:
    """The C++ compiler: CXX, then the usual names; `None` if there is none."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = candidate and shutil.which(candidate.split()[0])
        if found:
            return found
    return None


def _refuses(compiler: str, flags: Sequence[str], suffix: str) -> str | None:
    """What a compiler says against flags for a trivial program, `None` if it builds."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"probe{suffix}"
        source.write_text("#include <cmath>\nint main() { return 0; }\n")
        command = [compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else (done.stderr + done.stdout).strip()[-500:]


@dataclass(frozen=True)
class Plan:
    """What will be compiled and with what.

    Attributes:
        cxx: the C++ compiler.
        nvcc: the CUDA compiler, or `None`.
        openmp: whether the C++ compiler and linker know `-fopenmp`.
        archs: for which architectures nvcc compiles.
    """

    cxx: str
    nvcc: str | None
    openmp: bool
    archs: tuple[str, ...] = ()


def make_plan(wanted: Sequence[str] = CUDA_ARCHS) -> Plan | None:
    """Look for compilers.

    Args:
        wanted: the architectures of the CUDA part, where there is an nvcc that compiles for one of them.

    Returns:
        The plan; `None` where there is no C++ compiler.
    """
    cxx, nvcc = find_cxx(), find_nvcc()
    if cxx is None:
        return None
    archs = supported_archs(nvcc, wanted) if nvcc else ()
    if nvcc is not None:
        # An nvcc that cannot build anything, for want of a C++ compiler of its age for one, must not fail the install.
        reason = _refuses(nvcc, nvcc_compile_flags(archs), ".cu") if archs else f"it knows none of {', '.join(wanted)}"
        if reason is not None:
            print(f"warning: lora_kernels: {nvcc} is left out, and with it the CUDA part: {reason}", file=sys.stderr)
            nvcc, archs = None, ()
    return Plan(cxx, nvcc, _refuses(cxx, ["-fopenmp"], ".cpp") is None, archs)


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
        flags += ["-DLK_WITH_CUDA", f'-DLK_CUDA_ARCHS="{" ".join(f"sm_{arch}" for arch in plan.archs)}"']
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
            f"  command = {plan.nvcc} -MD -MF $out.d {_quoted(nvcc_compile_flags(plan.archs))} -c $in -o $out",
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
