"""Builds csrc/*.cu for the CPU; see cuda_runtime.h."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
# What a C++ compiler does not know.
_REWRITES = (
    (r"extern __shared__ unsigned char raw\[\];", "unsigned char* const raw = shim::memory;"),
    (r"__shared__ ", "static "),
    (r"T\* const (\w+) = reinterpret_cast<T\*>\(raw\);", r"const shim::Shared<T> \1{reinterpret_cast<T*>(raw)};"),
    (r"double\* const (\w+) = reinterpret_cast<double\*>\(raw\);",
     r"const shim::Shared<double> \1{reinterpret_cast<double*>(raw)};"),
    (r"T\* const (\w+) = (\w) \+ n \*", r"const shim::Shared<T> \1 = \2 + n *"),
    (r"kernel<<<(.*?), (\w+), (\w+), .*?>>>\((.*?)\);", r"shim::launch(kernel, \1, \2, \3, \4);"),
)  # fmt: skip


def build(folder: Path, flags: Sequence[str]) -> Path:
    """The program of main.cpp, built in a folder with a compiler's flags."""
    for file in SOURCES.iterdir():
        if file.suffix in (".h", ".cu"):
            text = file.read_text()
            for pattern, replacement in _REWRITES:
                text = re.sub(pattern, replacement, text)
            (folder / file.with_suffix(".cpp" if file.suffix == ".cu" else ".h").name).write_text(text)
    for name in ("cuda_runtime.h", "main.cpp"):
        shutil.copy(HERE / name, folder / name)
    program = folder / "main"
    sources = [folder / name for name in ("cuda.cpp", "linalg_cuda.cpp", "main.cpp")]
    command = ["g++", "-std=c++20", "-pthread", "-DLK_WITH_CUDA", f"-I{folder}", *flags, *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program
