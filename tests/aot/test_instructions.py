"""Instructions of kernels that memory should bound."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

_CODE = """
from benchmarks.instructions import BOUNDS, instructions, parse_sass, share
text = '''
.L_x_0:
 /*0000*/ IADD3 R1, R1, 1, RZ ;
.L_x_1:
 /*0010*/ FADD R1, R1, R2 ;
 /*0020*/ NOP ;
 /*0030*/ @P0 BRA `(.L_x_1) ;
 /*0040*/ @P1 BRA `(.L_x_0) ;
 /*0050*/ @P1 BRA `(.L_x_2) ;
.L_x_2:
 /*0060*/ EXIT ;
'''
assert parse_sass(text) == (6, [(1, 2)]), parse_sass(text)
# 4 warps of 100 instructions for 1600 bytes: at 16 bytes per clock, all of four slots in each of 100 clocks.
assert share(BOUNDS[0]._replace(moved=1340), 100, "H100") == 1.0
"""
_COUNT = """
from benchmarks.instructions import BOUNDS, instructions
for bound in BOUNDS:
    count = instructions(bound)
    print(bound.kernel, count, bound.most)
    assert bound.most * 0.9 <= count <= bound.most, (bound, count)
"""


def run(code):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_machine_code_is_read():
    done = run(_CODE)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_kernel_has_more_instructions_than_before():
    """And not many fewer: then the bound is to be lowered."""
    import triton

    if not triton.__version__.startswith("3.7."):
        pytest.skip("the counts are those of Triton 3.7")
    done = run(_COUNT)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
