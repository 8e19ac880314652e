"""The micro-benchmarks: every op has one, each runs, and none is collected with the tests."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("pytest_benchmark")
from benchmarks.micro import bench_ops
from benchmarks.records import ROOT
from lora_kernels import ops

# What is exported beside the ops: settings, and arguments of ops.
BESIDE = {"BACKENDS", "Dropout", "use_backend", "use_form"}


def test_every_op_has_one():
    assert set(bench_ops.OPS) == set(ops.__all__) - BESIDE


def test_each_runs_once():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/micro",
        "--benchmark-disable",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_what_is_compared_may_be_a_part_of_the_result():
    bench = bench_ops.Bench(lambda: (torch.ones(2), torch.zeros(3)), shown=lambda found: [found[0]])
    assert torch.equal(*bench.answer("torch"), torch.ones(2, dtype=torch.float64))


def test_wrong_numbers_are_not_timed(monkeypatch):
    class Never:
        group = None

        def __call__(self, call):
            raise AssertionError("timed")

    answers = iter([[torch.ones(3)], [1.01 * torch.ones(3)]])  # torch's, the backend's
    monkeypatch.setattr(bench_ops.Bench, "answer", lambda self, backend: next(answers))
    with pytest.raises(AssertionError, match="shrink"):
        bench_ops.test_op(Never(), "shrink", "cpp")
