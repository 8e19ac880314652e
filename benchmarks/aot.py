"""Compile every shipped kernel configuration for every supported chip, without a GPU, and check what came out.

`python -m benchmarks.aot [--quick] [--out FILE]`. Checked per Triton kernel, configuration and chip: it builds; no
register spills and no local memory; shared memory fits; a tensor-core instruction is there where one must be; it
stores to memory. Each kernel is also built once with its unspecialised integers equal to one, which Triton would turn
into a constant. The CUDA file is compiled for its own chips and checked for spills.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import build_support

KERNEL_MODULES = ("lora_kernels.ops.covariance.kernel",)
RECORD = Path(__file__).parent / "results" / "aot.json"


@dataclass(frozen=True)
class Chip:
    """A compile target.

    Attributes:
        name: as shown.
        target: for Triton.
        shared: bytes of shared memory that one program may use.
        matrix: instructions of its matrix units.
        stores: instructions that write global memory.
    """

    name: str
    target: GPUTarget
    shared: int
    matrix: tuple[str, ...]
    stores: tuple[str, ...]


_PTX_STORES = ("st.global", "red.global", "atom.global", "cp.async.bulk")
CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 166_912, ("mma.sync",), _PTX_STORES),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 232_448, ("wgmma.mma_async", "mma.sync"), _PTX_STORES),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 232_448, ("tcgen05.mma", "mma.sync"), _PTX_STORES),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 65_536, ("v_mfma",), ("global_store", "buffer_store", "flat_store")),
)


@dataclass(frozen=True)
class Result:
    """What one compilation gave."""

    case: str
    chip: str
    registers: int
    spills: int
    local_bytes: int
    shared: int
    matrix: str
    stores: int
    problems: tuple[str, ...]


def cases(quick: bool = False) -> Iterator[dict[str, Any]]:
    """All kernel descriptions; with `quick` the first of each kernel."""
    seen = set()
    for name in KERNEL_MODULES:
        for case in importlib.import_module(name).aot_cases():
            key = case["kernel"].fn.__name__
            if quick and key in seen:
                continue
            seen.add(key)
            yield case


def _source(case: dict[str, Any], chip: Chip, ones: bool) -> ASTSource:
    kernel = case["kernel"]
    constexprs = dict(case["constexprs"])
    if case["precision"]:
        constexprs[case["precision"]] = "ieee" if chip.target.backend == "hip" else "tf32x3"
    signature, attributes = {}, {}
    free = {kernel.arg_names[each] if isinstance(each, int) else each for each in kernel.do_not_specialize or ()}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            signature[name] = "constexpr"
            continue
        # An argument that a flag switches off is passed as some other tensor: any type will do.
        signature[name] = case["signature"][name]
        divisible = signature[name].startswith("*") or name.endswith("stride") or name == "size"
        if ones and not signature[name].startswith("*") and name not in free:
            signature[name] = "constexpr"
            constexprs[name] = 1
        elif divisible and name not in free:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attributes)


def _ptxas_report(ptx: str, arch: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes, by the assembler that ships with Triton."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    program = ptxas / (
        "ptxas-blackwell" if arch.startswith("sm_10") and (ptxas / "ptxas-blackwell").exists() else "ptxas"
    )
    suffix = "a" if arch in ("sm_90", "sm_100") else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(program), "-v", f"-arch={arch}{suffix}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_ptxas(answer.stderr + answer.stdout)


def parse_ptxas(text: str) -> tuple[int, int, int]:
    """Worst registers, spilled bytes and stack bytes in the output of `ptxas -v`.

    Args:
        text: the output.

    Returns:
        Three numbers.

    Raises:
        ValueError: if the output reports no kernel at all.
    """
    registers = [int(each) for each in re.findall(r"Used (\d+) registers", text)]
    if not registers:
        raise ValueError(f"no kernel in the assembler's report: {text[:500]}")
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)]
    stack = [int(each) for each in re.findall(r"(\d+) bytes stack frame", text)]
    return max(registers), max(spills, default=0), max(stack, default=0)


def compile_case(case: dict[str, Any], chip: Chip, *, ones: bool = False) -> Result:
    """Compile one description for one chip and check the result.

    Args:
        case: from a kernel module's `aot_cases`.
        chip: the target.
        ones: with the free integers equal to one.

    Returns:
        The result; `problems` is empty if all is well.
    """
    name = case["name"] + (" ones" if ones else "")
    try:
        options = {"num_warps": case["warps"], "num_stages": case["stages"]}
        if chip.target.backend == "hip":
            options["num_stages"] = min(2, case["stages"])  # deeper pipelines do not fit its 64 KB
        compiled = triton.compile(_source(case, chip, ones), target=chip.target, options=options)
        if chip.target.backend == "cuda":
            text = compiled.asm["ptx"]
            registers, spills, stack = _ptxas_report(text, chip.name)
        else:
            text = compiled.asm["amdgcn"]
            registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
            spills = sum(int(each) for each in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))
            stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    except Exception as error:
        return Result(name, chip.name, 0, 0, 0, 0, "", 0, (f"does not build: {type(error).__name__}: {error}"[:300],))
    found = next((each for each in chip.matrix if each in text), "")
    stores = sum(text.count(each) for each in chip.stores)
    shared = int(compiled.metadata.shared)
    problems = []
    if spills or stack:
        problems.append(f"{spills} bytes spilled, {stack} bytes of stack")
    if shared > chip.shared:
        problems.append(f"{shared} bytes of shared memory, {chip.shared} there")
    if case["matrix"] and not found:
        problems.append(f"no matrix instruction ({', '.join(chip.matrix)})")
    if not stores:
        problems.append("stores nothing")
    return Result(name, chip.name, registers, spills, stack, shared, found, stores, tuple(problems))


def compile_cuda() -> list[Result]:
    """Compile csrc/cuda.cu for its own chips.

    Returns:
        One result per chip; empty where there is no nvcc.
    """
    nvcc = build_support.find_nvcc()
    if nvcc is None:
        return []
    results = []
    for arch in build_support.CUDA_BINARIES:
        flags = ["-std=c++17", "-O3", "-DLK_WITH_CUDA", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *flags, "-c", str(build_support.SOURCES / "cuda.cu"), "-o", str(Path(folder) / "cuda.o")]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            results.append(Result("csrc/cuda.cu", f"sm_{arch}", 0, 0, 0, 0, "", 0, (answer.stderr[-300:],)))
            continue
        registers, spills, stack = parse_ptxas(answer.stderr + answer.stdout)
        problems = (f"{spills} bytes spilled, {stack} bytes of stack",) if spills or stack else ()
        results.append(Result("csrc/cuda.cu", f"sm_{arch}", registers, spills, stack, 0, "", 1, problems))
    return results


def _cache(case: dict[str, Any], chip: Chip, ones: bool) -> Path:
    module = Path(sys.modules[case["kernel"].fn.__module__].__file__ or "")
    shared = module.parents[1] / "_tl.py"
    parts = [triton.__version__, chip.name, str(ones), case["name"], module.read_text(), shared.read_text()]
    parts += [Path(__file__).read_text(), repr(sorted(case["constexprs"].items()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Path(tempfile.gettempdir()) / "lora_kernels_aot" / f"{key}.json"


def check_all(quick: bool = False) -> list[Result]:
    """Compile everything, reading unchanged results from a cache in the temporary folder.

    Args:
        quick: one configuration per kernel, for sm_90 and gfx942 only.

    Returns:
        The results.
    """
    results = []
    chips = [chip for chip in CHIPS if not quick or chip.name in ("sm_90", "gfx942")]
    done = set()
    for case in cases(quick):
        first = case["kernel"].fn.__name__ not in done
        done.add(case["kernel"].fn.__name__)
        for chip in chips:
            for ones in (False, True) if first else (False,):
                file = _cache(case, chip, ones)
                if file.exists():
                    stored = json.loads(file.read_text())
                    results.append(Result(**{**stored, "problems": tuple(stored["problems"])}))
                    continue
                results.append(compile_case(case, chip, ones=ones))
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(asdict(results[-1])))
    return results if quick else results + compile_cuda()


def main(arguments: list[str] | None = None) -> int:
    """Run the check.

    Args:
        arguments: of the command line.

    Returns:
        0 if every compilation is clean, else 1.
    """
    parser = argparse.ArgumentParser(description="compile every shipped kernel for every chip and check the result")
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel, two chips, no record")
    parser.add_argument("--out", type=Path, default=RECORD, help="where the record goes")
    options = parser.parse_args(arguments)
    results = check_all(options.quick)
    table = Table("kernel", "chip", "registers", "spills", "shared", "matrix unit", "verdict")
    for each in results:
        verdict = "; ".join(each.problems) or "ok"
        table.add_row(
            each.case, each.chip, str(each.registers), str(each.spills), str(each.shared), each.matrix, verdict
        )
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    failed = [each for each in results if each.problems]
    console.print(f"{len(results)} compilations, {len(failed)} with problems")
    if not options.quick:
        versions = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"versions": versions, "results": [asdict(each) for each in results]}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
