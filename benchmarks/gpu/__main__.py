"""Tests, tuning and comparisons on a GPU in one call: `python -m benchmarks.gpu --out DIR [--minutes 9] [--parts ...]`.

No network and no environment of its own is needed: torch, Triton, PEFT and transformers as they are on the machine,
and a copy of this repository. Every part is a process with a time limit, so that a crash or a hang of one takes none of
the others; what no longer fits into the minutes is skipped, and said so. The most valuable parts come first.

`DIR` then holds `gpu_<part>.json` of each part (to be copied to `benchmarks/results/`), `tuned.json` (to become
`lora_kernels/ops/lora_linear/tuned.json`) and `log.txt`. Exit status: 0 if every part that ran succeeded, 1 if one
failed, 2 without a GPU.

`--cpu-rehearsal` runs what a CPU can run with tiny sizes: a test of this script, its times mean nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.runner import CONSOLE, Part, Runner

# What each needs at least and may take at most, in seconds, on a machine with 16 cores and one data-centre GPU.
PARTS = (
    Part("rates", "benchmarks.gpu.machine:rates", 15, 60),
    Part("build", "benchmarks.gpu.machine:build", 30, 140),
    Part("tests", "benchmarks.gpu.machine:tests", 30, 170),
    Part("tune", "benchmarks.gpu.layers:tune", 20, 90),
    Part("layers", "benchmarks.gpu.layers:layers", 20, 100),
    Part("experts", "benchmarks.gpu.experts:experts", 20, 60),
    Part("statistics", "benchmarks.gpu.statistics:statistics", 15, 60),
    Part("lora_pro", "benchmarks.gpu.solvers:lora_pro", 15, 45),
    Part("training", "benchmarks.gpu.training:training", 20, 60),
    Part("solvers", "benchmarks.gpu.solvers:solvers", 15, 45),
    Part("skinny", "benchmarks.gpu.statistics:skinny", 15, 45),
    Part("memcheck", "benchmarks.gpu.machine:sanitizer", 20, 75),
    Part("racecheck", "benchmarks.gpu.machine:sanitizer", 20, 75),
)


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts, most valuable first.

    Args:
        arguments: of the command line.
        parts: what there is to run.

    Returns:
        The exit status.
    """
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for records, table and log")
    parser.add_argument("--minutes", type=float, default=9.0, help="of everything together")
    parser.add_argument(
        "--parts", nargs="+", choices=[selected.name for selected in parts], metavar="PART", help="only these"
    )
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny sizes on the CPU: tests this script alone")
    parser.add_argument("--pack", type=Path, help="after each part, write the folder into this .tar.gz file too")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}, but must be above 0")
    if not options.cpu_rehearsal and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA GPU here (--cpu-rehearsal tests the script itself)", file=sys.stderr)
        return 2
    chosen = [selected for selected in parts if options.parts is None or selected.name in options.parts]
    runner = Runner(options.out.resolve(), started + 60 * options.minutes, options.cpu_rehearsal, options.pack)
    for part in chosen:
        runner.run(part)
    CONSOLE.print(runner.summary())
    return 1 if runner.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    sys.exit(main())
