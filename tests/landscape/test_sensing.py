"""The experiment of `benchmarks.sensing` in small: every verdict right, the certificate closed where it should."""

import json

import pytest

from benchmarks import records, sensing
from lora_kernels.landscape import Thresholds
from lora_kernels.landscape.verdict import LOUD_FAILURE, LOW_RANK_MINIMUM, STILL_TRAINING

RECORD = records.RESULTS / "landscape.json"


def test_one_run_of_each_kind_against_the_proximal_solution():
    problem = sensing.Sensing.make(1)
    solution = problem.solve()
    assert solution[1] == sensing.PLANTED
    kinds = {}
    for start, seed, iterations in (("zero", 10, 400), ("large", 11, 400), ("zero", 10, 12)):
        run = sensing.Run(problem, start, seed)
        run.train(iterations)
        here = run.state()
        spectrum, certificate = run.diagnose()
        if iterations == 12:
            run.train(400)
        kinds[start, iterations] = sensing.truth(here, run.state(), solution)
        assert sensing.judge(spectrum, certificate).kind == kinds[start, iterations]
        if kinds[start, iterations] == LOW_RANK_MINIMUM:
            assert certificate.ratio == pytest.approx(1, abs=0.01) and here[0] == pytest.approx(solution[0], rel=1e-6)
            assert spectrum.numerical_rank == solution[1] and spectrum.balance < 1e-3
        if kinds[start, iterations] == LOUD_FAILURE:
            assert spectrum.numerical_rank == sensing.RANK and here[0] > 2 * solution[0]
    assert kinds == {("zero", 400): LOW_RANK_MINIMUM, ("large", 400): LOUD_FAILURE, ("zero", 12): STILL_TRAINING}


@pytest.mark.skipif(not RECORD.is_file(), reason="no record in this checkout")
def test_record_bears_out_the_thresholds():
    parts = json.loads(RECORD.read_text())["cases"]
    found, limits = parts["sensing"], Thresholds()
    assert found["all_right"] and len(found["runs"]) == 40
    assert found["thresholds"] == vars(limits)
    assert found["largest_ratio_error_at_minima"] < 0.01
    for name, (low, high) in found["thresholds_may_lie_in"].items():
        assert low <= getattr(limits, name) <= high
    sane, hostile = parts["demo"]["runs"]
    assert sane["verdict"] == "not_judged" and hostile["verdict"] == LOUD_FAILURE
    low, high = parts["demo"]["the_runs_leave"]
    assert low < limits.loud_share < high
    assert parts["monitor"]["share_of_training"] < 0.01
