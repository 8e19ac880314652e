"""What every benchmark record says about the machine, and how times are taken."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

CONSOLE = Console(width=None if sys.stdout.isatty() else 120)
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git, or no repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _commit() -> str:
    """The commit; of a copy without git what `LORA_KERNELS_COMMIT` says."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return os.environ.get("LORA_KERNELS_COMMIT", "")
    return commit + ("+changes" if _git("status", "--porcelain", "lora_kernels", "csrc") else "")


def environment() -> dict[str, Any]:
    """Machine, versions and commit of a record."""
    versions = {}
    for name in ("torch", "triton", "peft", "transformers", "lora_kernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def seconds(call: Callable[[], Any], prepare: Callable[[], Any] | None = None) -> float:
    """Wall time of one call; `prepare` runs before it and is not counted."""
    if prepare is not None:
        prepare()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _resident(most: bool = False) -> int:
    """Bytes of this process in memory, now or at most since the peak was forgotten."""
    name = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _give_back() -> None:
    """Hand memory that is free back to the system: what a call takes of it would not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def extra_peak(call: Callable[[], Any]) -> int:
    """Bytes that a call takes at most beyond what is there before it, on the GPU if there is one; Linux else."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    _give_back()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return max(_resident(most=True) - before, 0)


def peaks(programs: dict[str, str]) -> dict[str, int]:
    """What programs print as their last word, each in a process of its own; nothing where there is no Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    found = {}
    for name, program in programs.items():
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found[name] = int(done.stdout.split()[-1])
    return found


def interleaved(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    prepare: dict[str, Callable[[], Any]] | None = None,
    repeat: int = 1,
) -> dict[str, dict[str, float]]:
    """Time several calls in turn, so that drift of the machine meets all alike.

    Args:
        calls: by name.
        rounds: how often each is timed; one more round before is not counted.
        prepare: by name, what runs before each call and is not counted.
        repeat: calls per timed sample, whose mean counts: for calls that take little more than the clock.

    Returns:
        Per name, the quantiles in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            elapsed = seconds(call if repeat == 1 else _repeated(call, repeat), (prepare or {}).get(name))
            if number > 0:
                times[name].append(elapsed / repeat)
    return {name: quantiles(values) for name, values in times.items()}


def _repeated(call: Callable[[], Any], repeat: int) -> Callable[[], Any]:
    def run() -> None:
        for _ in range(repeat):
            call()

    return run


def quantiles(values: list[float]) -> dict[str, float]:
    """Minimum, p20, p50 and p80 of a list of times."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "p20": ordered[round(0.2 * last)],
        "p50": statistics.median(ordered),
        "p80": ordered[round(0.8 * last)],
    }


def save(name: str, record: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a record.

    Args:
        name: file name without suffix.
        record: what was measured.
        folder: where; `results/` by default.

    Returns:
        The file.
    """
    file = (folder or RESULTS) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"environment": environment(), **record}, indent=1, allow_nan=False) + "\n")
    return file


def cases(name: str, folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The cases of a subject's record.

    Args:
        name: the subject.
        folder: of the records; `results/` by default.

    Returns:
        Their entries; nothing if there is no record.
    """
    file = (folder or RESULTS) / f"{name}.json"
    if not file.is_file():
        return {}
    entries: dict[str, dict[str, Any]] = json.loads(file.read_text())["cases"]
    return entries


def put(name: str, case: str, entry: dict[str, Any], folder: Path | None = None) -> Path:
    """Replace a case's entry in the record of a subject.

    Args:
        name: the subject.
        case: of it.
        entry: what was measured.
        folder: of the records; `results/` by default.

    Returns:
        The file.
    """
    file = (folder or RESULTS) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"cases": {**cases(name, folder), case: entry}}
    file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return file
