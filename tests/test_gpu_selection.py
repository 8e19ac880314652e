"""`pytest -m gpu` where there is a GPU: the tests that need it, and those that run there what others interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Collects as if there were a GPU; nothing runs.
PLUGIN = """
import torch

torch.cuda.is_available = lambda: True
"""


@pytest.mark.slow
def test_every_file_that_chooses_the_device_runs_on_a_gpu(tmp_path):
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if '\nDEVICE = "cuda" if' in file.read_text()]
    assert len(files) >= 8
    (tmp_path / "gpu_plugin.py").write_text(PLUGIN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_plugin", "--collect-only", "-q", "-m", "gpu", "--no-header"]
    command += ["-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for file in files:
        assert file.name in done.stdout, f"no test of {file.name} is selected"
    assert "deselected" not in done.stdout
