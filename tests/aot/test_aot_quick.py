"""The ahead-of-time check, in processes of its own: here kernels may be under the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "aot.json"
pytest.importorskip("triton")


def run(arguments, cache):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_one_configuration_per_kernel_compiles_clean(tmp_path):
    record = tmp_path / "record.json"
    done = run(["-m", "benchmarks.aot", "--quick", "--jobs", "1", "--out", str(record)], tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "0 with problems" in done.stdout
    cases = json.loads(record.read_text())["cases"]
    assert {each["chip"] for each in cases} == {"sm_90", "sm_120", "gfx942"}
    assert {each["variant"] for each in cases} == {"aligned", "huge", "ragged", "ones"}
    by_kernel = {(each["kernel"], each["chip"]): each for each in cases if each["variant"] == "aligned"}
    names = {each["kernel"] for each in cases}
    assert names >= {"product", "column_sum", "add_rows", "add_tiles"}
    assert len(by_kernel) == 3 * len(names)
    assert by_kernel["product", "sm_90"]["matrix"] == "wgmma.mma_async"
    assert by_kernel["product", "gfx942"]["matrix"] == "v_mfma"
    for each in cases:
        assert each["ok"] and each["stores"] > 0 and each["registers"] > 0
        # Where addresses are not aligned, ptxas may spill by choice, which `ok` knows from spilling for want.
        assert each["spills"] == each["local"] == 0 or each["variant"] in ("ragged", "ones")
    # A second run reads the results, and finds the same.
    again = run(["-m", "benchmarks.aot", "--quick", "--jobs", "1", "--out", str(record)], tmp_path)
    assert again.returncode == 0 and json.loads(record.read_text())["cases"] == cases


_BROKEN = """
import torch
from benchmarks import aot
from benchmarks.aot import CHIPS, cases, compile_case
chips = {chip.name: chip for chip in CHIPS}
lower = [case for case in cases() if case["constexprs"].get("LOWER") and case["platform"] == "cuda"]
wide = next(case for case in lower if "128x256" in case["name"])
rows = next(case for case in cases() if case["kernel"].__name__ == "add_rows_kernel")
def report(label, case, chip, variant="aligned", **constexprs):
    result = compile_case({**case, "constexprs": {**case["constexprs"], **constexprs}}, chips[chip], variant)
    numbers = (result.registers, result.spills) if label in ("CHOSEN", "FEW") else (result.registers,)
    print(label, *numbers, "|", "; ".join(result.problems))
report("CLEAN", wide, "sm_80")
report("SPILL", {**wide, "warps": 4}, "sm_80", TWO_SLICES=False)
report("RAGGED", {**wide, "aligned": False}, "sm_90", "ragged")
report("SHARED", {**wide, "stages": 6}, "sm_80")
report("AMD", {**wide, "platform": "hip"}, "gfx942")
report("BUILD", wide, "sm_90", TOKENS=48)
report("MATRIX", {**rows, "matrix": True}, "sm_90")
ragged = [case for case in cases() if not case["aligned"]]
chosen = "grouped_shrink bf16 i64 bf16 64x32x32x128 8w2s"
report("CHOSEN", next(case for case in ragged if case["name"] == chosen), "sm_86", "ragged")
few = next(case for case in cases() if case["aligned"] and case["name"] == "reduce bf16 64x128x32 4w4s")
report("FEW", few, "sm_100")
aot._CHOSEN_SPILLS = 16
report("MANY", few, "sm_100")
from tests.aot.empty import kernel
report("EMPTY", {**wide, "kernel": kernel, "constexprs": {"ROWS": 64}, "matrix": False}, "sm_90")
"""


@pytest.mark.slow
def test_the_check_can_fail(tmp_path):
    done = run(["-c", _BROKEN], tmp_path)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.get("CLEAN", "").endswith("| "), done.stdout + done.stderr[-2000:]
    assert "spilled" in lines["SPILL"] and "spilled" in lines["RAGGED"]
    assert lines["CHOSEN"] == "80 12 | "  # ptxas spills by choice: 80 registers fit a third program
    assert lines["FEW"] == "72 24 | " and "24 spilled" in lines["MANY"]
    assert "bytes of shared memory, 166912 there" in lines["SHARED"]
    assert "bytes of shared memory, 65536 there" in lines["AMD"]
    assert "does not build" in lines["BUILD"]
    assert "no matrix instruction" in lines["MATRIX"]
    assert "stores nothing" in lines["EMPTY"]


def test_assembler_reports_are_read(tmp_path):
    code = """
from benchmarks.aot import parse_amdgcn, parse_ptxas
text = "8 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads\\nptxas info : Used 77 registers"
assert parse_ptxas(text) == (77, 36, 8), parse_ptxas(text)
text = ".vgpr_count: 99\\n.vgpr_spill_count: 3\\n.sgpr_spill_count: 4\\n.private_segment_fixed_size: 12\\n"
assert parse_amdgcn(text) == (99, 7, 12), parse_amdgcn(text)
for parse in (parse_ptxas, parse_amdgcn):
    try:
        parse("nothing")
    except ValueError:
        print("refused")
"""
    done = run(["-c", code], tmp_path)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_the_committed_record_is_clean_and_complete():
    record = json.loads(RECORD.read_text())
    assert all(each["ok"] and not each["problems"] for each in record["cases"])
    assert {each["chip"] for each in record["cases"]} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert record["versions"]["triton"] and record["versions"]["ptxas"]
