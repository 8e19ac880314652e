"""One part in its process: `python -m benchmarks.gpu.part module:function NAME FOLDER END [--rehearsal]`.

END is a time of `time.monotonic`, so that imports count.

The record is written after every case, so that what was measured stays when a part is stopped.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import records
from benchmarks.gpu import timing
from benchmarks.gpu.runner import GRACE
from benchmarks.rates import Floor

T = TypeVar("T")
# Error of ours over that of plain torch, and what float32 sums in another order may differ by.
LIMIT, ROUNDING = 2.0, 1e-6


@dataclass
class Run:
    """What a part is given, and where it puts what it finds.

    Attributes:
        name: of the part.
        folder: for its record, and what else it writes.
        end: when it should be over, by `time.monotonic`.
        rehearsal: tiny sizes on the CPU, to test the script.
        record: what is saved; parts add to it.
        failures: why the part will have failed at its end.
    """

    name: str
    folder: Path
    end: float
    rehearsal: bool
    record: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Look at the device."""
        self.device = torch.device("cpu" if self.rehearsal else "cuda")
        self.rates = timing.read_rates(self.folder)

    @property
    def left(self) -> float:
        """Seconds until it should be over."""
        return self.end - time.monotonic()

    def pick(self, full: T, tiny: T) -> T:
        """The sizes for this run."""
        return tiny if self.rehearsal else full

    def save(self) -> None:
        """Write the record as it is."""
        records.save(f"gpu_{self.name}", self.record, self.folder)

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Random numbers on the device."""
        return (torch.randn(*size, device=self.device) * scale).to(dtype)

    def each(self, cases: Iterable[Mapping[str, Any]], measure: Callable[..., dict[str, Any]]) -> None:
        """Measure case by case while there is time; a case that fails does not stop the others.

        Args:
            cases: arguments of `measure`, for the record too.
            measure: called with this run and a case; returns what the record gets beside the case.
        """
        entries: list[Any] = self.record.setdefault("entries", [])
        left_out: list[Any] = self.record.setdefault("left_out", [])
        longest = 0.0
        for case in cases:
            if self.left < 1.2 * longest or self.left <= 0:
                left_out.append(dict(case))
                continue
            started = time.monotonic()
            named = " ".join(f"{key} {value}" for key, value in case.items())
            try:
                entry = measure(self, **case)
            except Exception as error:  # whatever a compiler or a driver raises, the others are measured
                traceback.print_exc()
                entry = {"error": f"{type(error).__name__}: {error}"[:500]}
            if "error" in entry:
                self.failures.append(f"{named}: {entry['error']}")
            entries.append({**case, **entry})
            print(f"{named}: {_line(entry)}", flush=True)
            self.save()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(longest, time.monotonic() - started)
        self.save()

    def compare(
        self,
        calls: Mapping[str, Callable[[], Any]],
        errors: Mapping[str, float],
        *,
        own: str = "ours",
        judge: str = "torch",
        floor: Floor | None = None,
        rounds: int = 11,
        wall: bool = False,
        limit: float = LIMIT,
        rounding: float = ROUNDING,
    ) -> dict[str, Any]:
        """Times of all sides, and their ratios if the numbers of ours are right.

        Args:
            calls: by side.
            errors: against a reference in a higher precision, by side.
            own: sides whose name begins so are ours.
            judge: the side whose error is allowed, times `limit`.
            floor: the least that the problem costs.
            rounds: timed calls of each side.
            wall: wall time of calls from an idle GPU to an idle GPU, instead of time on the GPU.
            limit: see `judge`.
            rounding: allowed beside that.

        Returns:
            An entry of the record.
        """
        bound = limit * errors[judge] + rounding
        wrong = {name: error for name, error in errors.items() if name.startswith(own) and not error <= bound}
        shown = {
            name: error if error == error and error != float("inf") else repr(error) for name, error in errors.items()
        }
        seconds = timing.interleaved(calls, self.pick(rounds, 2), self.device, wall=wall)
        if wrong:  # times of wrong numbers are kept to look for the cause, but compared with nothing
            return {"errors": shown, "seconds": seconds, "error": f"wrong numbers: {wrong}, allowed {bound:.1e}"}
        best = seconds[own]["p50"]
        entry: dict[str, Any] = {
            "errors": shown,
            "seconds": seconds,
            "over_ours": {name: times["p50"] / best for name, times in seconds.items() if name != own},
        }
        if floor is not None:
            entry["floor"] = floor.record()
            if floor.seconds is not None:
                entry["ours_over_floor"] = best / floor.seconds
        return entry


def _line(entry: Mapping[str, Any]) -> str:
    if "error" in entry:
        return f"FAILED, {entry['error']}"
    parts = [f"{name} {1e3 * times['p50']:.3f} ms" for name, times in entry.get("seconds", {}).items()]
    parts += [f"{name} / ours {value:.2f}" for name, value in entry.get("over_ours", {}).items()]
    if "ours_over_floor" in entry:
        parts.append(f"ours / floor {entry['ours_over_floor']:.2f}")
    parts += [f"{key} {value:.3g}" for key, value in entry.items() if isinstance(value, float) and "_over_" not in key]
    return ", ".join(parts) or "done"


def _note(entries: Iterable[Mapping[str, Any]]) -> str:
    """The range of the ratios, by side."""
    ratios: dict[str, list[float]] = {}
    for entry in entries:
        for side, value in entry.get("over_ours", {}).items():
            ratios.setdefault(side, []).append(value)
    shown = [f"{side} {min(values):.2f} to {max(values):.2f}" for side, values in ratios.items()]
    return "over ours: " + ", ".join(shown) if shown else ""


def relative_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius error relative to the truth; NaN where a number is none."""
    truth = truth.to(torch.float64)
    return float(torch.linalg.norm(values.to(torch.float64) - truth) / torch.linalg.norm(truth).clamp_min(1e-300))


def main(arguments: list[str]) -> int:
    """Run one part.

    Args:
        arguments: as above.

    Returns:
        0, or 1 if something in it failed.
    """
    target, name, folder, end, *rest = arguments
    run = Run(name, Path(folder), float(end) - GRACE, "--rehearsal" in rest)
    torch.manual_seed(0)
    if run.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # torch's default, but an image may have another
    module, function = target.split(":")
    getattr(importlib.import_module(module), function)(run)
    run.record.setdefault("note", _note(run.record.get("entries", ())))
    if run.failures:
        run.record["failures"] = run.failures
        run.record["note"] = f"{len(run.failures)} failed: {run.failures[0]}"[:300]
    run.save()
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
