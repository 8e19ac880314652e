"""Times on a GPU."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.rates import Rates

# Written before each timed call: empties the second-level cache, and keeps the GPU busy (about 3 ms) while the host
# queues the call's kernels, as it would be in a training step. What the host needs for that is timed too.
_AHEAD_BYTES, _AHEAD = 2**30, 12


def read_rates(folder: Path) -> Rates | None:
    """Those that the part `rates` measured in this folder on this device; `None` if it did not."""
    try:
        record = json.loads((folder / "gpu_rates.json").read_text())
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        if record["environment"]["gpu"] != here:
            return None
        return Rates(record["copy_bytes_per_second"], record["flop_per_second"])
    except (OSError, ValueError, KeyError):
        return None


def _on_gpu(call: Callable[[], Any], ahead: torch.Tensor) -> tuple[float, float]:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for _ in range(_AHEAD):
        ahead.zero_()
    first.record()
    started = time.perf_counter()
    call()
    host = time.perf_counter() - started
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, host


def _by_clock(call: Callable[[], Any]) -> tuple[float, float]:
    elapsed = records.seconds(call)
    return elapsed, elapsed


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, *, wall: bool = False, most: float = 15.0
) -> dict[str, dict[str, float]]:
    """Time several calls in turn, so that drift of the machine meets all alike; the order turns.

    Args:
        calls: by name.
        rounds: how often each is timed; two rounds before are not counted (one on a CPU).
        device: whose events measure; the clock on a CPU.
        wall: by the clock all the same, from an idle GPU to an idle GPU.
        most: seconds after which no further round begins, if three were timed.

    Returns:
        Per name p20, p50 and p80 in seconds, and `host`: the median of what the host took to start the call's work.
    """
    events = device.type == "cuda" and not wall
    ahead = torch.empty(_AHEAD_BYTES, dtype=torch.uint8, device=device) if events else None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names, warm, end = list(calls), 2 if device.type == "cuda" else 1, time.monotonic() + most
    for number in range(rounds + warm):
        if number >= warm + 3 and time.monotonic() > end:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            samples = _by_clock(calls[name]) if ahead is None else _on_gpu(calls[name], ahead)
            if number >= warm:
                times[name].append(samples)
    return {
        name: {**records.quantiles([one for one, _ in samples]), "host": statistics.median(host for _, host in samples)}
        for name, samples in times.items()
    }


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of the GPU's memory that a call takes at most beyond what is there before; `None` on a CPU.

    Args:
        call: run once before, so that what stays is there.
        device: where.

    Returns:
        Bytes.
    """
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
