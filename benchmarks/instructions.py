"""Whether kernels that memory should bound can issue their instructions in time: `python -m benchmarks.instructions`.

Counts, in the machine code for an H100, the instructions of a warp per step of the main loop (or per program, where a
tile has no loop). A multiprocessor issues at most four per clock; the share of these slots that the loop needs where
memory is read and written at the speed of a copy is the least part of the time that issuing takes. Real kernels fill
two thirds of the slots at best, so above that the instructions are the bound. Needs no GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from rich.table import Table

from benchmarks import aot
from benchmarks.records import CONSOLE, save

CHIP = "sm_90"
# Bytes per clock and multiprocessor of a copy, read and written counted.
COPY = {"H100": 13.4, "H200": 18.8}
SLOTS = 4


class Bound(NamedTuple):
    """A kernel that memory should bound."""

    kernel: str  # module and name of an aligned case of `aot.cases`
    moved: int  # bytes read and written per step of the main loop, or per program
    most: int  # instructions of a warp that it may have: what it had when it was last worked on
    loop: bool = True


BOUNDS = (
    Bound("skinny shrink bf16 64x64x16 4w4s", 64 * 64 * 2, 100),
    Bound("skinny shrink bf16 i64 64x64x16 4w4s dropout", 64 * 64 * 2, 370),
    Bound("skinny pair bf16 64x128x16 4w4s", 64 * 128 * 2, 190),
    Bound("skinny pair bf16 u8 bf16 i64 64x128x16 8w4s dropout", 64 * 128 * 2 + 64 * 16, 980),
    Bound("skinny expand bf16 64x128x16 4w2s", 64 * 128 * 2, 420, loop=False),
    Bound("skinny expand bf16 u8 64x128x16 4w2s dropout", 64 * 128 * 2 + 64 * 16, 720, loop=False),
    Bound("lora_pro_adam adam i64 fp32 i64 64x32x16x16 4w2s tf32x3", 64 * 32 * 16, 940),
    Bound("lora_pro_adam adam i64 fp32 i64 64x32x16x16 4w2s tf32x3 stochastic", 64 * 32 * 8, 1240),
)


def parse_sass(text: str) -> tuple[int, list[tuple[int, int]]]:
    """How many instructions machine code has, but `NOP`, and the first and last of each innermost loop."""
    count, labels, loops = 0, {}, []
    for line in text.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line)
        if not instruction or re.search(r"\bNOP\b", instruction[1]):
            continue
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
        if target and target[1] in labels:
            loops.append((labels[target[1]], count))
        count += 1
    inner = [loop for loop in loops if not any(loop[0] <= a and b <= loop[1] and (a, b) != loop for a, b in loops)]
    return count, inner


def instructions(bound: Bound) -> int:
    """Of a warp, per step of the longest innermost loop or per program."""
    chip = next(chip for chip in aot.CHIPS if chip.name == CHIP)
    module, _, name = bound.kernel.partition(" ")
    case = next(
        case
        for case in aot.cases()
        if case["platform"] == "cuda" and case["aligned"] and case["name"] == name
        and case["kernel"].__module__.split(".")[-2] == module and CHIP in case["chips"]
    )  # fmt: skip
    options = {"num_warps": case["warps"], "num_stages": case["stages"]}
    compiled = triton.compile(aot.source(case, "aligned"), target=chip.target, options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        answer = subprocess.run([str(tool), "-c", str(file)], capture_output=True, text=True, check=True)
    count, loops = parse_sass(answer.stdout)
    per_warp = max(last - first + 1 for first, last in loops) if bound.loop else count
    return per_warp * int(case["warps"]) // 4  # as if there were four warps


def share(bound: Bound, count: int, gpu: str) -> float:
    """The share of issue slots that a kernel needs at the speed of a copy."""
    return round(4 * count * COPY[gpu] / (SLOTS * bound.moved), 2)


def main() -> None:
    """Print and record the shares."""
    table, rows = Table("kernel", "instructions", *(f"slots at {gpu}'s copy" for gpu in COPY)), []
    for bound in BOUNDS:
        count = instructions(bound)
        shares = {gpu: share(bound, count, gpu) for gpu in COPY}
        rows.append({"kernel": bound.kernel, "instructions": count, "bytes": bound.moved, "slots": shares})
        table.add_row(bound.kernel, str(count), *(f"{value:.0%}" for value in shares.values()))
    CONSOLE.print(table)
    CONSOLE.print(str(save("instructions", {"chip": CHIP, "kernels": rows})))


if __name__ == "__main__":
    main()
