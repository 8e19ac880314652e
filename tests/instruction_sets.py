"""The accuracy tests under several instruction sets: `python tests/instruction_sets.py [pytest's arguments]`.

Rounding depends on the processor: torch, MKL, oneDNN, OpenBLAS (under the Triton interpreter's NumPy) and our own C++
each choose kernels for the widest vectors that they find. All of them can be told to use narrower ones. This runs the
tests once per setting and prints a line for each; settings that this processor lacks are skipped and named. As a pytest
plugin (`-p instruction_sets`) this module checks that a setting is in force.
"""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
X86 = platform.machine() in ("x86_64", "AMD64")
# Names of the sets in torch, from narrow to wide, and those of the same vectors elsewhere.
MKL = {"default": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512"}
ONEDNN = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
OPENBLAS = {"default": "Nehalem", "avx2": "Haswell", "avx512": "SkylakeX"}
LANE_BYTES = {"default": 16, "avx2": 32, "avx512": 64}
LEVELS = list(MKL)
TESTS = (
    "tests/test_accuracy_bars.py", "tests/ops", "tests/linalg", "tests/init", "tests/landscape",
    *(f"tests/statistics/test_{name}.py" for name in ("moments", "gradients", "sketches")),
    *(f"tests/training/test_{name}.py" for name in ("lora_pro_golden", "lora_pro_maths", "dash", "dora")),
    "-m", "not slow",
    # The interpreter takes minutes, and depends on NumPy alone: `python tests/instruction_sets.py tests/ops -k triton`.
    # Others are not about rounding, or choose the lanes themselves.
    "-k", "not triton and not gemm and not registration and not errors and not explained and not narrower"
    " and not compile and not inductor and not nothing_of_the_size",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Instruction sets of torch, of the libraries below it and of our C++, and the number of threads."""

    torch: str
    libraries: str
    ours: str
    threads: int

    def __str__(self) -> str:
        return f"torch {self.torch}, MKL {MKL[self.libraries]}, lanes {LANE_BYTES[self.ours]}, threads {self.threads}"

    def missing(self, widest: str) -> str | None:
        """The set that a processor lacks, or `None`."""
        needed = max(self.torch, self.libraries, self.ours, key=LEVELS.index)
        return needed if LEVELS.index(needed) > LEVELS.index(widest) else None

    def environment(self) -> dict[str, str]:
        libraries = {
            "MKL_ENABLE_INSTRUCTIONS": MKL[self.libraries],
            "ONEDNN_MAX_CPU_ISA": ONEDNN[self.libraries],
            "OPENBLAS_CORETYPE": OPENBLAS[self.libraries],
        }
        return {
            **os.environ,
            **(libraries if X86 else {}),
            "ATEN_CPU_CAPABILITY": self.torch,
            "LORA_KERNELS_LANE_BYTES": str(LANE_BYTES[self.ours]),
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))),
        }


# Every set as a whole with one and two threads, and the extremes side by side.
SETTINGS = (
    *(Setting(level, level, level, threads) for level in LEVELS for threads in (1, 2)),
    Setting("default", "avx512", "avx512", 1),
    Setting("avx512", "default", "default", 2),
)


def widest() -> str:
    """The widest set of this processor, by torch's name."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    name = found.stdout.strip().lower()
    return name if name in LEVELS else "default"


def run(setting: Setting, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Pytest in a process of this setting."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "instruction_sets", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=setting.environment(), capture_output=True, text=True, errors="replace", check=False
    )


def pytest_configure() -> None:
    """Raise where the environment asks for something that is not in force, or the tests would show nothing."""
    import torch  # noqa: PLC0415

    from lora_kernels.ops import _ext  # noqa: PLC0415

    module, _ = _ext.load()
    for name, found in (
        ("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability().lower()),
        ("LORA_KERNELS_LANE_BYTES", None if module is None else module.lane_bytes()),
        ("OMP_NUM_THREADS", torch.get_num_threads()),
    ):
        wanted = os.environ.get(name)
        if X86 and wanted is not None and found is not None and str(found) != wanted:
            raise pytest.UsageError(f"{name} is {wanted}, but {found} is in force")


def main(arguments: list[str]) -> int:
    """Run all settings."""
    machine, failures = widest(), []
    parallel = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
    for setting in SETTINGS:
        lacking = setting.missing(machine)
        if lacking:
            print(f"{setting!s:60} skipped: this processor has no {lacking}", flush=True)
            continue
        done = run(setting, (*parallel, *(arguments or TESTS)))
        summary = re.findall(r"^\d+ .* in .*s.*$", done.stdout, re.MULTILINE)
        print(f"{setting!s:60} {summary[-1] if summary else 'did not run'}", flush=True)
        if done.returncode:
            failures.append(setting)
            named = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print("\n".join(f"    {line}" for line in named or (done.stdout + done.stderr).splitlines()[-20:]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
