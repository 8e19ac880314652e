"""Tests, tuning and comparisons on a GPU, in four calls of nine minutes or less:

    python -m benchmarks.gpu --call 1 --out DIR --pack FILE.tar.gz      (then 2, 3 and 4, on the same machine)

1 rates, the extension, tests; 2 training and layers, with tuning; 3 statistics and kernels, with a sweep of tile
sizes; 4 starts from data, solvers, tests of small linear algebra, compute-sanitizer. FILE holds all that DIR does,
results of earlier calls included. With a new DIR, a call measures rates and builds the extension anew. `--parts` runs
parts by name, `--minutes` limits a call.

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

# What each needs at least and may take at most, in seconds, on a machine with 16 cores and one data-centre GPU, and the
# call that it belongs to.
PARTS = (
    Part("rates", "benchmarks.gpu.machine:rates", 15, 60, 0),
    Part("build", "benchmarks.gpu.machine:build", 30, 140, 0),
    Part("tests", "benchmarks.gpu.machine:tests", 30, 330, 1),
    Part("training", "benchmarks.gpu.training:training", 20, 110, 2),
    Part("tune", "benchmarks.gpu.layers:tune", 20, 110, 2),
    Part("layers", "benchmarks.gpu.layers:layers", 20, 130, 2),
    Part("experts", "benchmarks.gpu.experts:experts", 20, 70, 2),
    Part("statistics", "benchmarks.gpu.statistics:statistics", 15, 80, 3),
    Part("lora_pro", "benchmarks.gpu.solvers:lora_pro", 15, 60, 3),
    Part("skinny", "benchmarks.gpu.statistics:skinny", 15, 60, 3),
    Part("sweep", "benchmarks.gpu.sweep:sweep", 30, 260, 3),
    Part("starts", "benchmarks.gpu.starts:starts", 30, 140, 4),
    Part("solvers", "benchmarks.gpu.solvers:solvers", 15, 80, 4),
    Part("small_tests", "benchmarks.gpu.machine:small_tests", 30, 100, 4),
    Part("memcheck", "benchmarks.gpu.machine:sanitizer", 20, 80, 4),
    Part("racecheck", "benchmarks.gpu.machine:sanitizer", 20, 80, 4),
)
CALLS = max(part.call for part in PARTS)


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
    parser.add_argument("--call", type=int, choices=range(1, CALLS + 1), help="only the parts of this call")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny sizes on the CPU: tests this script alone")
    parser.add_argument("--pack", type=Path, help="after each part, write the folder into this .tar.gz file too")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes:g}, but must be above 0")
    if not options.cpu_rehearsal and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA GPU here (--cpu-rehearsal tests the script itself)", file=sys.stderr)
        return 2
    runner = Runner(options.out.resolve(), started + 60 * options.minutes, options.cpu_rehearsal, options.pack)
    for part in parts:
        if options.parts is not None:
            chosen = part.name in options.parts
        elif options.call is None:
            chosen = True
        else:
            chosen = part.call == options.call or (part.call == 0 and not runner.has(part))
        if chosen:
            runner.run(part)
    CONSOLE.print(runner.summary())
    return 1 if runner.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    sys.exit(main())
