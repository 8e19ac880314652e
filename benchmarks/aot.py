"""Compile every shipped kernel configuration for every supported chip, without a GPU, and check what came out.

`python -m benchmarks.aot [--quick] [--chips CHIP ...] [--match PATTERN] [--triton VERSION ...] [--out FILE]`. Checked
per Triton kernel, configuration and chip, each compiled as the launcher would: it builds; no register spills and no
local memory (but two; and what ptxas chooses: 64 bytes, and any where nothing is aligned); shared memory fits; the
chip's own tensor-core instruction is there, and not serialised, where one must be; it stores to memory. What Triton
learns from the arguments changes the code, so a kernel is compiled for multiples of 16, for other sizes, and, once per
set of flags, for ones (which become constants). float16 is compiled on one chip; elsewhere bfloat16 stands for it. The
CUDA files are compiled for their own chips and checked for spills. Other versions of Triton, which compile differently,
are installed beside the environment, into build/aot.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.compiler import ASTSource

import build_support
from benchmarks.aot_cases import CHIPS, Chip, cases

RECORD = Path(__file__).parent / "results" / "aot.json"
QUICK_CHIPS = ("sm_90", "sm_120", "gfx942")
FLOAT16_CHIP = "sm_80"  # elsewhere bfloat16 stands for both: the code differs in a type
# Bytes per thread, stored and loaded, that a kernel may spill on NVIDIA chips: two registers, or under an older Triton
# more, in tiles that are best under a newer one, as narrower ones cost more.
_FEW_SPILLS = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 128
# And those that ptxas may choose to spill in an aligned kernel, with registers left, so that one more program fits.
_CHOSEN_SPILLS = 64
_VIEWS = ("x_ptr", "g_ptr", "right_ptr", "avg_ptr", "square_ptr")


@dataclass(frozen=True)
class Result:
    """What one compilation gave. Registers are per thread, the rest in bytes, but `stores` counts instructions."""

    op: str
    kernel: str
    config: str
    variant: str
    chip: str
    problems: tuple[str, ...]
    registers: int = 0
    spills: int = 0
    local: int = 0
    shared: int = 0
    matrix: str = ""
    stores: int = 0


def variants(case: dict[str, Any]) -> tuple[str, ...]:
    """What Triton may know about the arguments of a case at launch.

    Args:
        case: a description.

    Returns:
        `aligned`, and on AMD also `huge` (more than 2 GB: no buffer instructions); or `ragged` and `ones`.
    """
    if not case["aligned"]:
        return ("ragged", "ones")
    return ("aligned", "huge") if case["platform"] == "hip" else ("aligned",)


def source(case: dict[str, Any], variant: str) -> ASTSource:
    """What Triton compiles for a description.

    Args:
        case: of `cases`.
        variant: one of `variants`.

    Returns:
        The source, with what is known of its arguments.
    """
    kernel, constexprs = case["kernel"], dict(case["constexprs"])
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    unspecialised = {
        kernel.arg_names[argument] if isinstance(argument, int) else argument
        for argument in kernel.do_not_specialize or ()
    }
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constexprs else case["signature"][name]
        if name in constexprs or name in unspecialised:
            continue
        known = []
        if signature[name].startswith("*"):
            # Fresh tensors are always aligned; others may be views that start anywhere.
            known += [["tt.divisibility", 16]] if case["aligned"] or name not in _VIEWS else []
            known += [["tt.pointer_range", 32]] if case["platform"] == "hip" and variant != "huge" else []
        elif variant == "ones":
            signature[name], constexprs[name] = "constexpr", 1
        elif case["aligned"]:
            known += [["tt.divisibility", 16]]
        if known:
            attributes[(position,)] = known
    return ASTSource(kernel, signature, constexprs, attributes)


def assemble(ptx: str) -> str:
    """What the assembler that ships with Triton says about PTX.

    Args:
        ptx: the text.

    Returns:
        The output of `ptxas -v`.

    Raises:
        RuntimeError: if it fails.
    """
    arch = re.search(r"\.target\s+(\w+)", ptx)
    if arch is None:
        raise RuntimeError("the PTX names no target")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    blackwell = tools / "ptxas-blackwell"  # a separate one in some versions
    late = int(re.sub(r"\D", "", arch[1])) >= 100
    program = blackwell if late and blackwell.exists() else tools / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(program), "-v", f"-arch={arch[1]}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"ptxas: {answer.stderr[-300:]}")
    return answer.stderr + answer.stdout


def parse_ptxas(text: str) -> tuple[int, int, int]:
    """Worst registers, spilled bytes and stack bytes in the output of `ptxas -v`.

    Args:
        text: the output.

    Returns:
        Three numbers.

    Raises:
        ValueError: if the output reports no kernel at all.
    """
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", text)]
    if not registers:
        raise ValueError(f"no kernel in the assembler's report: {text[:500]}")
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)]
    stack = [int(number) for number in re.findall(r"(\d+) bytes stack frame", text)]
    return max(registers), max(spills, default=0), max(stack, default=0)


def without_limit(ptx: str) -> str:
    """PTX whose kernel may have all registers of a thread.

    By itself ptxas spills two or three registers where one more program then fits a multiprocessor: on sm_80 to sm_89
    and sm_120 in kernels of skinny, grouped and gradient products, of `linear` and of LoRA-Pro whose arguments are not
    aligned. That is its choice, not a want of registers.

    Args:
        ptx: as Triton makes it.

    Returns:
        The text with a directive.
    """
    return re.sub(r"(\.(?:req|max)ntid [^\n]*)", r"\1\n.maxnreg 255", ptx)


def _spills(case: dict[str, Any], text: str, spills: int, local: int) -> bool:
    """Whether registers spill for want of them, or more than a few by choice in an aligned kernel; `text`: assembly."""
    if case["platform"] == "hip":
        return local > 0 or (case["aligned"] and spills > 0)  # else they are kept in lanes of other registers
    if spills <= _FEW_SPILLS and (spills or not local):
        return False
    _, wanted, stack = parse_ptxas(assemble(without_limit(text)))
    return bool(wanted or stack) or (case["aligned"] and spills > _CHOSEN_SPILLS)


def parse_amdgcn(text: str) -> tuple[int, int, int]:
    """Vector registers, spilled registers (vector and scalar) and stack bytes in AMD assembly.

    Args:
        text: the assembly, with its metadata.

    Returns:
        Three numbers.

    Raises:
        ValueError: if a field is missing.
    """
    fields = []
    for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise ValueError(f"no .{name} in the assembly")
        fields.append(int(match[1]))
    return fields[0], fields[1] + fields[2], fields[3]


def compile_case(case: dict[str, Any], chip: Chip, variant: str) -> Result:
    """Compile one description for one chip and check the result.

    Args:
        case: of `cases`.
        chip: the target.
        variant: one of `variants`.

    Returns:
        The result; `problems` is empty if all is well.
    """
    op = case["kernel"].fn.__module__.removesuffix(".kernel").split(".")[-1].strip("_")
    kernel, _, config = case["name"].partition(" ")
    report = ""
    try:
        options = {"num_warps": case["warps"], "num_stages": case["stages"]}
        compiled = triton.compile(source(case, variant), target=chip.target, options=options)
        if chip.target.backend == "cuda":
            text = compiled.asm["ptx"]
            report = assemble(text)
            registers, spills, local = parse_ptxas(report)
        else:
            text = compiled.asm["amdgcn"]
            registers, spills, local = parse_amdgcn(text)
    except Exception as error:  # the compiler raises anything; whatever it is, this configuration does not build
        problem = " ".join(f"does not build: {type(error).__name__}: {error}".split())[:300]
        return Result(op, kernel, config, variant, chip.name, (problem,))
    matrix = chip.matrix if chip.matrix in text else ""
    stores, shared = sum(text.count(store) for store in chip.stores), int(compiled.metadata.shared)
    serialised = sorted(set(re.findall(r"C75\d\d", report)))
    checks = {
        f"{spills} spilled, {local} bytes of stack": _spills(case, text, spills, local),
        f"{shared} bytes of shared memory, {chip.shared} there": shared > chip.shared,
        f"no matrix instruction ({chip.matrix})": case["matrix"] and not matrix,
        # A product over one token or one column is too small for its speed to matter.
        f"matrix instructions serialised ({', '.join(serialised)})": (
            case["matrix"] and serialised and variant != "ones"
        ),
        "stores nothing": not stores,
    }
    problems = tuple(problem for problem, wrong in checks.items() if wrong)
    return Result(
        op, kernel, config, variant, chip.name, problems, registers, spills, local, shared, matrix, stores
    )  # fmt: skip


def compile_cuda() -> Iterator[Result]:
    """Compile the CUDA files of csrc for their own chips.

    Yields:
        One result per file and chip; none where there is no nvcc.
    """
    nvcc = build_support.find_nvcc()
    archs = build_support.supported_archs(nvcc) if nvcc else ()
    general = [flag for flag in build_support.nvcc_compile_flags(archs or ("",)) if not flag.startswith("-gencode")]
    # The PTX for later chips is left out: nothing is assembled yet.
    chips = {f"sm_{arch}": f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs}
    for source in sorted(build_support.SOURCES.glob("*.cu")) if nvcc else ():
        for chip, flag in chips.items():
            with tempfile.TemporaryDirectory() as folder:
                output = str(Path(folder) / "cuda.o")
                command = [str(nvcc), *general, flag, "-Xptxas=-v", "-c", str(source), "-o", output]
                answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode:
                yield Result("csrc", source.name, "", "", chip, (f"does not build: {answer.stderr[-300:]}",))
                continue
            registers, spills, local = parse_ptxas(answer.stderr + answer.stdout)
            problems = (f"{spills} spilled, {local} bytes of stack",) if spills or local else ()
            yield Result("csrc", source.name, "", "", chip, problems, registers, spills, local)


def _cache_file(case: dict[str, Any], chip: Chip, variant: str) -> Path:
    # The key of the kernel covers its own source and that of everything it calls.
    checks = (source, assemble, parse_ptxas, without_limit, _spills, parse_amdgcn, compile_case)
    code = "".join(map(inspect.getsource, checks))
    bounds = repr((_FEW_SPILLS, _CHOSEN_SPILLS, _VIEWS))
    parts = [triton.__version__, repr(chip), variant, case["kernel"].cache_key, code, bounds]
    parts += [repr(sorted((key, value) for key, value in case.items() if key != "kernel"))]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "lora_kernels" / "aot" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"


def _job(job: tuple[int, int, str]) -> Result:
    case, chip, variant = cases()[job[0]], CHIPS[job[1]], job[2]
    file = _cache_file(case, chip, variant)
    if file.exists():
        stored = json.loads(file.read_text())
        return Result(**{**stored, "problems": tuple(stored["problems"])})
    result = compile_case(case, chip, variant)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(result)))
    partial.replace(file)  # several processes may write
    return result


def _jobs(quick: bool, chips: Sequence[str], match: str) -> Iterator[tuple[int, int, str]]:
    seen, built = set(), set()
    names = {(case["name"], case["aligned"]) for case in cases()}
    for number, case in enumerate(cases()):
        for place, chip in enumerate(CHIPS):
            key = (chip.name, case["kernel"].__name__, case["aligned"])
            if chip.name not in case["chips"] or (chips and chip.name not in chips):
                continue
            twin = (case["name"].replace("fp16", "bf16"), case["aligned"])
            if "fp16" in case["name"] and twin in names and chip.name != FLOAT16_CHIP:
                continue
            if not re.search(match, case["name"]) or (quick and (chip.name not in QUICK_CHIPS or key in seen)):
                continue
            seen.add(key)
            # Ones are to build: what they make of the code depends on its flags, not on tiles and dtypes.
            flags = tuple(item for item in sorted(case["constexprs"].items()) if isinstance(item[1], bool))
            branches = (chip.name, case["kernel"].cache_key, flags)
            for variant in variants(case):
                if variant == "ones":
                    if branches in built:
                        continue
                    built.add(branches)
                yield number, place, variant


def check_all(quick: bool = False, processes: int = 1, chips: Sequence[str] = (), match: str = "") -> list[Result]:
    """Compile everything, reading unchanged results from the user's cache folder.

    Args:
        quick: one configuration per kernel and kind of arguments, for `QUICK_CHIPS` only, without the CUDA files.
        processes: how many compile at a time.
        chips: only these, without the CUDA files.
        match: only configurations in whose name this pattern occurs, without the CUDA files.

    Returns:
        The results, in a fixed order.
    """
    jobs = list(_jobs(quick, chips, match))
    cuda = [] if quick or chips or match else list(compile_cuda())
    if processes == 1:
        return [_job(job) for job in jobs] + cuda
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_job, jobs, chunksize=4)) + cuda


def _version(command: str | Path | None) -> str | None:
    if command is None or not Path(command).exists():  # a version of Triton may lack a tool
        return None
    answer = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"V(\d[\d.]*)", answer)
    return match[1] if match else None


def write_record(results: Iterable[Result], file: Path) -> None:
    """Write the record.

    Args:
        results: of `check_all`.
        file: where to.
    """
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    versions = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ptxas": _version(tools / "ptxas"),
        "ptxas-blackwell": _version(tools / "ptxas-blackwell"),
        "nvcc": _version(build_support.find_nvcc()),
    }
    rows = [json.dumps({**asdict(result), "ok": not result.problems}) for result in results]
    text = '{\n"versions": ' + json.dumps(versions) + ',\n"cases": [\n' + ",\n".join(rows) + "\n]\n}\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def under_triton(version: str, arguments: Sequence[str]) -> int:
    """Run the check in a process with another version of Triton, installed into build/aot.

    Args:
        version: as on the package index.
        arguments: of the command line there.

    Returns:
        The exit status.
    """
    folder = build_support.ROOT / "build" / "aot" / f"triton-{version}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    path = os.pathsep.join((str(folder), str(build_support.ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the check.

    Args:
        arguments: of the command line.

    Returns:
        0 if every compilation is clean, else 1.
    """
    parser = argparse.ArgumentParser(description="compile every shipped kernel for every chip and check the result")
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel, three chips, no CUDA files")
    parser.add_argument("--out", type=Path, help="where the record goes (default: the committed one; none of a part)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--chips", nargs="+", default=[], choices=[chip.name for chip in CHIPS], help="only these")
    parser.add_argument("--match", default="", help="only configurations in whose name this pattern occurs")
    parser.add_argument(
        "--triton", nargs="+", default=[], metavar="VERSION", help="under these versions, without record"
    )
    options = parser.parse_args(arguments)
    if options.triton:
        chosen = ["--quick"] * options.quick + (["--chips", *options.chips] if options.chips else [])
        chosen += ["--match", options.match, "--jobs", str(options.jobs), "--out", os.devnull]
        return max(under_triton(version, chosen) for version in options.triton)
    results = check_all(options.quick, max(options.jobs, 1), options.chips, options.match)
    failed = [result for result in results if result.problems]
    table = Table("kernel", "configuration", "arguments", "chip", "registers", "problems")
    for result in failed:
        place = result.kernel, result.config, result.variant, result.chip
        table.add_row(*place, str(result.registers), "; ".join(result.problems))
    console = Console(width=None if sys.stdout.isatty() else 160)
    if failed:
        console.print(table)
    console.print(f"{len(results)} compilations under Triton {triton.__version__}, {len(failed)} with problems")
    record = options.out or (None if options.quick or options.chips or options.match else RECORD)
    if record is not None:
        write_record(results, record)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
