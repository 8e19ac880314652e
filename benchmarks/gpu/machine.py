"""What the machine is and gives; the extension; the tests that need a GPU, and the memory checker."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.part import LIMIT, ROUNDING, Run, relative_error
from benchmarks.gpu.runner import ROOT
from benchmarks.rates import measure

_INTERRUPTED = 8.0  # seconds that a program has to write what it knows


def _said(*command: str, limit: float = 20.0) -> str | None:
    """What a program prints; `None` if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _machine() -> dict[str, Any]:
    compiler = _said("nvcc", "--version")
    known: dict[str, Any] = {
        "nvcc": compiler.splitlines()[-1] if compiler else None,
        "cuda": torch.version.cuda,
        "processors": os.cpu_count(),
    }
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        known |= {
            "name": about.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": about.multi_processor_count,
            "memory": about.total_memory,
            "cache": getattr(about, "L2_cache_size", None),
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        }
    return known


def rates(run: Run) -> None:
    """Bytes copied and FLOPs multiplied per second; a product into its own result (`addmm_`) against a plain one."""
    run.record["machine"] = _machine()
    print(run.record["machine"], flush=True)
    size, orders = run.pick(2**32, 2**22), run.pick((4096, 8192), (128,))

    def interleaved(calls: Mapping[str, Callable[[], Any]]) -> Mapping[str, Mapping[str, float]]:
        return timing.interleaved(calls, run.pick(11, 2), run.device)

    found, seconds = measure(run.device, interleaved, size, orders, ("bfloat16", "float16", "float32", "tf32"))
    run.record["copy"] = {"bytes": 2 * size, "seconds": seconds.pop("copy")}
    run.record["copy_bytes_per_second"], products = found.copy, found.products
    run.record |= {"orders": orders, "products": seconds, "flop_per_second": products}
    shown = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in products.items())
    run.record["note"] = f"copy {run.record['copy_bytes_per_second'] / 1e12:.3g} TB/s; TFLOP/s: {shown}"
    print(run.record["note"], flush=True)
    run.save()
    shapes = run.pick([(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)], [(64, 32, 32)])
    run.each([{"tokens": t, "n": n, "m": m} for t, n, m in shapes], _into_itself)


def _into_itself(run: Run, tokens: int, n: int, m: int) -> dict[str, Any]:
    x, w = run.normal(tokens, n), run.normal(m, n, scale=n**-0.5)
    start = run.normal(tokens, m)
    out, few = start.clone(), slice(0, 64)
    truth = x[few].double() @ w.mT.double() + start[few].double()
    errors = {"mm": relative_error((x @ w.mT + start)[few], truth)}
    errors["addmm_"] = relative_error(out.addmm_(x, w.mT)[few], truth)
    if not errors["addmm_"] <= LIMIT * errors["mm"] + ROUNDING:
        return {"errors": errors, "error": f"wrong numbers: {errors}"}
    calls = {"mm": lambda: torch.mm(x, w.mT, out=out), "addmm_": lambda: out.addmm_(x, w.mT)}
    seconds = timing.interleaved(calls, run.pick(11, 2), run.device)
    return {
        "errors": errors,
        "seconds": seconds,
        "addmm_ratio": seconds["addmm_"]["p50"] / seconds["mm"]["p50"],
        "flop_per_second": 2.0 * tokens * n * m / seconds["mm"]["p50"],
    }


def build(run: Run) -> None:
    """The extension in place, for this chip alone (a wheel has more), and what `doctor` says then."""
    started = time.monotonic()
    chip = "90"
    if run.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        chip = f"{major}{minor}"
    if run.rehearsal:
        print("not built in a rehearsal")
    else:
        build_extension(chip, ROOT / "build" / f"gpu-{chip}", ROOT / "lora_kernels")
    run.record |= {"chip": f"sm_{chip}", "build_seconds": round(time.monotonic() - started, 1)}
    code = "from lora_kernels.ops import _ext; print(*_ext.load())"
    loaded = _said(sys.executable, "-c", code, limit=90)  # a first import of torch may take long
    run.record["extension"] = loaded
    if loaded is None or loaded.startswith("None"):
        run.failures.append(f"the extension cannot be imported: {loaded}")
        return
    if not run.rehearsal:
        log = run.folder / "doctor.log"
        status = _run([sys.executable, "-m", "lora_kernels.cli", "doctor"], run.left, log)
        run.record["doctor"] = log.read_text(errors="replace")[-8000:]
        print(run.record["doctor"])
        if status != 0:
            run.failures.append(f"lora-kernels doctor: exit status {status}")
    run.record.setdefault("note", f"sm_{chip}, {run.record['build_seconds']:.0f} s")


def build_extension(chip: str, work: Path, folder: Path) -> None:
    """What `setup.py build_ext` does, for one chip.

    Args:
        chip: as in `sm_90`.
        work: for object files.
        folder: for the extension.
    """
    import build_support

    plan = build_support.make_plan((chip,))
    if plan is None or plan.nvcc is None:
        raise RuntimeError(f"no compiler: {plan}")
    output = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build_support.run_ninja(build_support.write_ninja(plan, work.resolve(), output.resolve()))


def _run(command: Sequence[str], limit: float, log: Path) -> int | None:
    """Run a program, its output in a file; the exit status, or `None` if it was interrupted at its limit."""
    # No pipe: children that outlive the program would keep it open. They end with the part's process group.
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(limit - _INTERRUPTED, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(_INTERRUPTED)
        except subprocess.TimeoutExpired:
            process.kill()
    return None


def _counted(file: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Numbers of tests by outcome, and those that failed, from pytest's XML."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(file).iter("testcase"):
        bad = [line for line in case if line.tag in ("failure", "error")]
        skipped = any(line.tag == "skipped" for line in case)
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        if bad:
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"test": name, "message": (bad[0].get("message") or "")[:600]})
    return counts, failures


def tests(run: Run) -> None:
    """`pytest -m gpu` but for small linear algebra, which is most tests."""
    _tests(run, ["--ignore-glob=*small_linalg*"])


def small_tests(run: Run) -> None:
    """`pytest -m gpu` of small linear algebra."""
    _tests(run, [f"tests/ops/{file.name}" for file in sorted((ROOT / "tests" / "ops").glob("test_small_linalg*.py"))])


def _tests(run: Run, selection: Sequence[str]) -> None:
    """Several at a time where xdist is installed; in a rehearsal one small file."""
    file, log = run.folder / f"{run.name}.xml", run.folder / f"{run.name}.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={file}"]
    if not run.rehearsal and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]  # what takes time is compiling
    command += run.pick(["-m", "gpu", *selection], ["tests/ops/test_tiles.py"])
    code = _run(command, run.left, log)
    output = log.read_text(errors="replace")
    summary = output.rstrip().rsplit("\n", 1)[-1].strip("= ")
    if file.exists():
        counts, failures = _counted(file)
    else:  # pytest did not come to its end: what it had said, by itself or through xdist
        said = {
            one or two: kind_one or kind_two
            for one, kind_one, kind_two, two in re.findall(
                r"^(?:(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)|.*?\] (PASSED|FAILED|ERROR|SKIPPED) (\S+::.+))",
                output,
                re.MULTILINE,
            )
        }
        kinds = {"PASSED": "passed", "SKIPPED": "skipped", "FAILED": "failed", "ERROR": "failed"}
        counts = {
            kind: sum(kinds[failure] == kind for failure in said.values()) for kind in ("passed", "failed", "skipped")
        }
        failures = [{"test": name, "message": ""} for name, failure in said.items() if kinds[failure] == "failed"]
    run.record |= {"exit": code, "summary": summary, "counts": counts, "tests_failed": failures}
    print("\n".join([*(f"FAILED {failure['test']}: {failure['message'][:200]}" for failure in failures), summary]))
    run.failures += [failure["test"] for failure in failures]
    if code is None:
        run.failures.append("pytest was interrupted at its limit")
    elif code != 0 and not failures:
        run.failures.append(f"pytest: exit status {code}: {summary}")
    run.record["note"] = ", ".join(f"{value} {kind}" for kind, value in counts.items())


_SELF_TESTS = """
from lora_kernels.doctor import self_tests
for test in self_tests():
    if test.device == "cuda" and (test.error is not None or test.broken):
        print(test.op, test.backend, "FAILED " + test.reason if test.broken else "PASSED", flush=True)
"""
_REFUSED = ("Device not supported", "not supported on this")


def sanitizer(run: Run) -> None:
    """compute-sanitizer (the part's name is its tool) over the self-test of every op, and tests of the CUDA files."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None or run.rehearsal:
        run.record["note"] = "no compute-sanitizer here" if program is None else "not in a rehearsal"
        print(run.record["note"])
        return
    check = [program, "--tool", run.name, "--error-exitcode", "77", sys.executable]
    # In the allocator's large blocks an access beyond a tensor's end stays within the block.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    ops = run.folder / f"{run.name}_ops.log"
    first = _run([*check, "-c", _SELF_TESTS], run.left / 2, ops)
    command = [*check, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["-k", "cuda and not torch and (batches or strides)"]
    command += [f"tests/ops/test_small_linalg{suffix}.py" for suffix in ("", "_solve", "_spectrum")]
    log = run.folder / f"{run.name}.log"
    code = _run(command, run.left, log)
    code = first if first not in (0, None) else code
    text = ops.read_text(errors="replace") + log.read_text(errors="replace")
    print(text[-3000:])
    errors = [int(one) for one in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)]
    passed = len(re.findall(r"PASSED", text))
    run.record |= {"tool": run.name, "exit": code, "errors": sum(errors), "passed": passed, "output": text[-4000:]}
    if any(suffix in text for suffix in _REFUSED):
        run.record["note"] = "compute-sanitizer does not support this device"
        return
    state = "interrupted at its limit" if code is None else f"exit status {code}"
    run.record["note"] = f"{sum(errors)} errors in {passed} tests that passed, {state}"
    # Not to have come to the end is said, but it is no failure: most of these tests take long under a checker.
    if sum(errors) or code not in (0, None) or not passed:
        run.failures.append(run.record["note"])
