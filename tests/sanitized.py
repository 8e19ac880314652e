"""The C++ part under AddressSanitizer and UndefinedBehaviorSanitizer: `python tests/sanitized.py [pytest's arguments]`.

Builds `lora_kernels._C` anew in a temporary folder, with the sanitizers, and runs tests with that in place of the
installed one. An error ends the process at once, with a report of where. As a pytest plugin (`-p sanitized`) this
module is what puts the module of `$LORA_KERNELS_SANITIZED` in place.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The checks at a moderate optimisation, or lines in the report mean nothing; recovery would hide errors in a long log.
FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,pointer-overflow,vptr",  # AddressSanitizer sees what these lead to; they triple the time
    "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1", "-Wl,-z,lazy",
)  # fmt: skip
TESTS = (
    "tests/ops", "tests/fuzz", "tests/training/test_dora.py", "-m", "not slow",
    "--deselect", "tests/ops/test_small_linalg_choice.py",
    "-k", "not triton and not compile and not opcheck and not interpreter and not nothing_of_the_size",
)  # fmt: skip


def build(folder: Path, sources: Sequence[str] | None = None) -> Path:
    """The module, built in a folder; of some sources alone where time counts, what is missing must not be called."""
    sys.path.insert(0, str(ROOT))
    import build_support

    cxx = build_support.find_cxx()
    assert cxx is not None, "no C++ compiler"
    output = folder / "_C.so"
    plan = build_support.Plan(cxx, None, True)  # the sanitizers know no CUDA
    build_support.run_ninja(build_support.write_ninja(plan, folder, output, FLAGS, sources))
    return output


def environment(module: Path) -> dict[str, str]:
    """In which a Python process can load it, and reports errors."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    runtime = [  # the C++ library, too: what catches a throw is looked up when the process starts
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        **os.environ,
        "LORA_KERNELS_SANITIZED": str(module),
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=86",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }


def use(module: str) -> None:
    """Put a module in place of the installed one."""
    spec = importlib.util.spec_from_file_location("lora_kernels._C", module)
    assert spec is not None and spec.loader is not None
    sys.setdlopenflags(os.RTLD_LAZY)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    sys.modules["lora_kernels._C"] = made


def main(arguments: list[str]) -> int:
    """Build and run."""
    with tempfile.TemporaryDirectory() as folder:
        module = build(Path(folder))
        # -s: what a sanitizer says as it ends the process must not be lost with pytest's capture.
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "sanitized", "-p", "no:cacheprovider"]
        return subprocess.run([*command, *(arguments or TESTS)], cwd=ROOT, env=environment(module)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif os.environ.get("LORA_KERNELS_SANITIZED"):
    use(os.environ["LORA_KERNELS_SANITIZED"])
