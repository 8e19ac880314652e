"""Parts in processes of their own, with time limits; what became of each."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import records

ROOT = Path(__file__).parents[2]
CONSOLE = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
# Kept back of the whole time for the summary, and of a part's for its last lines.
RESERVE, GRACE = 4.0, 4.0
_TAIL = 2000  # characters of a failed part's output that its record keeps


@dataclass(frozen=True)
class Part:
    """A piece of work.

    Attributes:
        name: of its record, `gpu_<name>.json`.
        target: `module:function`, called with a `benchmarks.gpu.part.Run`.
        least: seconds that must be left to begin it.
        most: seconds that it may take.
        call: of which call it is, from 1; 0 if every call needs it and one has to run it.
    """

    name: str
    target: str
    least: float
    most: float
    call: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        name: of the part.
        status: `ok`, `failed`, `stopped` (at its limit) or `skipped`.
        seconds: that it took.
        note: why, or what is in the record.
    """

    name: str
    status: str
    seconds: float
    note: str


@dataclass
class Runner:
    """Runs parts one after the other.

    Attributes:
        folder: for records and the log.
        end: when everything must be over, by `time.monotonic`.
        rehearsal: tiny sizes, on the CPU.
        pack: a `.tar.gz` file that gets the folder after each part, or `None`.
        outcomes: so far.
    """

    folder: Path
    end: float
    rehearsal: bool
    pack: Path | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a part failed or was stopped."""
        return any(outcome.status in ("failed", "stopped") for outcome in self.outcomes)

    def has(self, part: Part) -> bool:
        """Whether an earlier call left the part's record, without an error."""
        return _read(self.folder / f"gpu_{part.name}.json").get("status") == "ok"

    def run(self, part: Part) -> None:
        """Run a part, or skip it if the time left is too short; never raises because of what it does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / f"gpu_{part.name}.json"
        record.unlink(missing_ok=True)  # that of an earlier run is not this run's
        left = self.end - time.monotonic() - RESERVE
        least = min(part.least, 5.0) if self.rehearsal else part.least
        if left < least:
            outcome = Outcome(part.name, "skipped", 0.0, f"{max(left, 0):.0f} s left, needs {least:.0f}")
        else:
            outcome = self._run(part, record, min(part.most, left))
        self.outcomes.append(outcome)
        print(f"== {part.name}: {outcome.status}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
        if self.pack is not None:
            self._pack(self.pack)

    def _run(self, part: Part, record: Path, limit: float) -> Outcome:
        print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu.part", part.target, part.name, str(self.folder)]
        started = time.monotonic()
        command += [f"{started + limit:.2f}", *(["--rehearsal"] if self.rehearsal else [])]
        with (self.folder / "log.txt").open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"== {part.name}\n")
            log.flush()
            begin = log.tell()
            # A process group of its own, so that what it started ends with it; not a session of its own, which would
            # outlive a caller that ends this one.
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp,
            )  # fmt: skip
            code = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                with contextlib.suppress(ProcessLookupError):  # also after a crash, which may leave children
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            seconds = time.monotonic() - started
            log.seek(begin)
            output = log.read()
        print(output.rstrip(), flush=True)
        outcome = self._judged(part, record, code, seconds, output)
        self._complete(record, outcome, output)
        return outcome

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **({"TRITON_INTERPRET": "1"} if self.rehearsal else {}),
            # What is tuned here is what the later parts measure.
            "LORA_KERNELS_CACHE": str(self.folder / "tuned.json"),
        }

    def _judged(self, part: Part, record: Path, code: int | None, seconds: float, output: str) -> Outcome:
        entry = _read(record)
        notes = [note for note in (entry.get("note"),) if note]
        if entry.get("left_out"):
            notes.append(f"{len(entry['left_out'])} cases no longer fitted")
        if code is None:
            return Outcome(part.name, "stopped", seconds, "; ".join(["at its limit", *notes]))
        if code == 0 and not entry:
            return Outcome(part.name, "failed", seconds, "wrote no record")
        if code != 0:
            last = output.rstrip().rsplit("\n", 1)[-1][:120]
            notes = [*(notes or [last]), f"exit status {code}"]
        return Outcome(part.name, "ok" if code == 0 else "failed", seconds, "; ".join(notes))

    def _complete(self, record: Path, outcome: Outcome, output: str) -> None:
        """Say in the record how the part ended; make one if it left none."""
        entry = _read(record) or {"environment": records.environment()}
        entry["status"], entry["part_seconds"] = outcome.status, round(outcome.seconds, 1)
        if outcome.status != "ok":
            entry["error"], entry["output"] = outcome.note, output[-_TAIL:]
        record.write_text(json.dumps(entry, indent=1, allow_nan=False) + "\n")

    def _pack(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w:gz") as archive:
            for path in sorted(self.folder.iterdir()):
                if path.is_file() and path.resolve() != file.resolve():
                    archive.add(path, arcname=path.name)

    def summary(self) -> Table:
        """A line per part."""
        table = Table("part", "status", "seconds", "note", title=f"records in {self.folder}")
        for outcome in self.outcomes:
            table.add_row(outcome.name, outcome.status, f"{outcome.seconds:.0f}", outcome.note.replace("[", r"\["))
        return table


def _read(record: Path) -> dict[str, Any]:
    """A record; nothing if there is none, or half of one from a part that was stopped while it wrote."""
    try:
        content: dict[str, Any] = json.loads(record.read_text())
    except (OSError, ValueError):
        return {}
    return content
