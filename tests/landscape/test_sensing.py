"""The experiment of `benchmarks.landscape` in small: every verdict right, the certificate closed where it should."""

import json
from pathlib import Path

import pytest

from benchmarks import landscape
from lora_kernels.landscape import Thresholds
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, STILL_TRAINING

RECORD = Path(landscape.__file__).parent / "results" / "landscape.json"


def test_one_run_of_each_kind_against_the_proximal_solution():
    problem = landscape.Sensing.make(1)
    solution = problem.solve()
    assert solution[1] == landscape.PLANTED
    kinds = {}
    for start, seed, iterations in (("zero", 10, 400), ("large", 11, 400), ("zero", 10, 12)):
        run = landscape.Run(problem, start, seed)
        run.train(iterations)
        here = run.state()
        spectrum, certificate = run.diagnose()
        if iterations == 12:
            run.train(400)
        kinds[start, iterations] = landscape.truth(here, run.state(), solution)
        assert landscape.judge(spectrum, certificate).kind == kinds[start, iterations]
        if kinds[start, iterations] == LOW_RANK_MINIMUM:
            assert certificate.ratio == pytest.approx(1, abs=0.01) and here[0] == pytest.approx(solution[0], rel=1e-6)
            assert spectrum.numerical_rank == solution[1] and spectrum.balance < 1e-3
        if kinds[start, iterations] == LOUD_FAILURE:
            assert spectrum.numerical_rank == landscape.RANK and here[0] > 2 * solution[0]
    assert kinds == {("zero", 400): LOW_RANK_MINIMUM, ("large", 400): LOUD_FAILURE, ("zero", 12): STILL_TRAINING}


@pytest.mark.skipif(not RECORD.is_file(), reason="no record in this checkout")
def test_record_bears_out_the_thresholds():
    parts = json.loads(RECORD.read_text())["parts"]
    sensing, limits = parts["sensing"], Thresholds()
    assert sensing["all_right"] and len(sensing["runs"]) == 40
    assert sensing["thresholds"] == vars(limits)
    assert sensing["largest_ratio_error_at_minima"] < 0.01
    for name, (low, high) in sensing["thresholds_may_lie_in"].items():
        assert low <= getattr(limits, name) <= high
    sane, hostile = parts["demo"]["runs"]
    assert sane["verdict"] == "not_judged" and hostile["verdict"] == LOUD_FAILURE
    low, high = parts["demo"]["the_runs_leave"]
    assert low < limits.loud_share < high
    assert parts["monitor"]["share_of_training"] < 0.01
