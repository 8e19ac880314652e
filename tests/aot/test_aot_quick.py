"""The ahead-of-time check, in processes of its own: here kernels may be under the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")


def run(code_or_module):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, *code_or_module]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_one_configuration_per_kernel_compiles_clean():
    done = run(["-m", "benchmarks.aot", "--quick"])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 with problems" in done.stdout


@pytest.mark.slow
def test_the_check_can_fail():
    code = """
from benchmarks.aot import CHIPS, cases, compile_case
base = [case for case in cases() if "128x256" in case["name"]][0]
chips = {chip.name: chip for chip in CHIPS}
def report(chip, warps=None, stages=None, **constexprs):
    case = {**base, "constexprs": {**base["constexprs"], **constexprs}}
    case["warps"], case["stages"] = warps or base["warps"], stages or base["stages"]
    return "; ".join(compile_case(case, chips[chip]).problems)
print("SPILL", report("sm_80", warps=4, TWO_SLICES=False))
print("SHARED", report("sm_80", stages=6))
print("BUILD", report("sm_90", TOKENS=48))
from lora_kernels.ops.covariance import kernel
rows = [each for each in kernel.aot_cases() if each["name"] == "add_rows"][0]
print("MATRIX", "; ".join(compile_case({**rows, "matrix": True}, chips["sm_90"]).problems))
"""
    done = run(["-c", code])
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert "bytes spilled" in lines["SPILL"], done.stderr[-2000:]
    assert "shared memory" in lines["SHARED"]
    assert "does not build" in lines["BUILD"]
    assert "no matrix instruction" in lines["MATRIX"]


def test_assembler_report_is_read():
    code = """
from benchmarks.aot import parse_ptxas
text = "8 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\\nptxas info : Used 77 registers"
assert parse_ptxas(text) == (77, 36, 8), parse_ptxas(text)
try:
    parse_ptxas("nothing")
except ValueError:
    print("refused")
"""
    assert "refused" in run(["-c", code]).stdout
