"""Claims of the papers in small: their quick forms, and the numbers behind them on matrices whose answer is known."""

import json
import math

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from benchmarks import compare, pages, rates, records
from benchmarks.claims import directions, equivalent, report
from benchmarks.subjects import SUBJECTS


@pytest.fixture(scope="module")
def entries():
    """The quick form of every case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "here", lambda device="cpu": rates.Rates(1e10, {"float32": 1e11}))
        found = compare.run(SUBJECTS["claims"], compare.parse(SUBJECTS["claims"], ["--quick"]))
    json.dumps(found, allow_nan=False)
    return found


def test_lora_pro_reaches_what_the_factors_allow_and_lora_does_not(entries):
    entry = entries["equivalent"]
    for arm, one in entry["arms"].items():
        for distance, closest in zip(one["distance"], one["closest"], strict=True):
            assert distance == pytest.approx(closest, rel=1e-2) if "Pro" in arm else distance > 1.02 * closest
        assert all(scaled <= distance + 1e-6 for scaled, distance in zip(one["scaled"], one["distance"], strict=True))
        assert all(closest <= scaled + 1e-6 for closest, scaled in zip(one["closest"], one["scaled"], strict=True))
    # All arms start from the same factors, B = 0, with the same batch.
    assert len({round(one["closest"][0], 5) for one in entry["arms"].values()}) == 1


def test_the_bound_is_that_of_a_least_squares_problem():
    torch.manual_seed(0)
    gradient, a, b = torch.randn(7, 6).double(), torch.randn(2, 6).double(), torch.randn(7, 2).double()
    # vec(B X + Y A) = (B (x) I) vec(X) + (I (x) A^T) vec(Y)
    span = torch.cat((torch.kron(b, torch.eye(6).double()), torch.kron(torch.eye(7).double(), a.mT.contiguous())), 1)
    left, s, _ = torch.linalg.svd(span, full_matrices=False)
    left = left[:, s > 1e-9 * s[0]]
    rest = gradient.reshape(-1) - left @ (left.mT @ gradient.reshape(-1))
    assert equivalent.bound(gradient, a, b) == pytest.approx(float(rest.norm() / gradient.norm()))
    assert equivalent.bound(gradient, a, 0 * b) > equivalent.bound(gradient, a, b)


def test_a_sine_does_not_depend_on_the_scale():
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 3.0]])
    assert equivalent.sine(one, two) == pytest.approx(math.sqrt(0.5)) == equivalent.sine(one, -0.1 * two)
    assert equivalent.sine(one, 0 * two) == 1.0


def test_hits_are_counted_on_a_known_change():
    sigma = torch.linspace(20.0, 1.0, 20)
    basis = torch.eye(20), sigma, torch.eye(20)
    along = torch.zeros(20, dtype=torch.float64)
    along[:8], along[12:] = 30.0, 20.0  # larger changes of large directions, larger rates of small ones
    chosen = directions.selected(basis, along)
    assert chosen == {"rate": set(range(12, 20)), "size": set(range(8))}
    half = {"rate": set(range(4, 12)), "size": set(range(8))}
    assert directions.hits([chosen, half], [half, half]) == {"rate": 0.5, "size": 1.0}


def test_directions_have_their_chance_and_their_random_factors(entries):
    entry = entries["directions"]
    # Eight of 64 directions: all matrices of the small model have a side of 64.
    assert entry["chance"] == pytest.approx(8 / 64) and len(entry["layers"]) == 7
    assert set(entry["hits_of_full"]) == {"1", "2"} and set(entry["hits_of_own_end"]) == {"1"}
    # The division by small singular values selects like directions whatever the update is.
    assert entry["random_factors"]["rate"] > 2 * entry["chance"]
    assert abs(entry["random_factors"]["size"] - entry["chance"]) < 0.06


def test_ends_have_a_certificate_each(entries):
    runs = entries["ends"]["runs"]
    assert [run["start"] for run in runs] == [0.0, 1.0] and min(run["over_best"] for run in runs) == 1.0
    for run in runs:
        assert len(run["layers"]) == 2 and run["objective"] > run["loss"]
        assert all(layer["ratio"] > 0 and layer["stationarity"] > 0 for layer in run["layers"])


def test_costs_are_those_of_the_runs():
    def run(arm, **times):
        return {"arm": arm, **times}

    recipes = {"random": None, "eva": {"rho": 1.0}, "dora": None}
    record = {
        "protocol": {"evaluate_at": [10, 20]},
        "arms": {arm: {"recipe": {"method": method}} for arm, method in recipes.items()},
        "runs": [
            run("random", init_seconds=0.0, train_seconds=10.0),
            *(run("eva", init_seconds=value, train_seconds=10.0) for value in (1.0, 2.0, 6.0)),
            run("eva", turn=1.0),
            run("dora", init_seconds=1.0, train_seconds=10.0),
        ],
    }
    assert report.costs(record) == {"random": (0.0, 0.0, 1), "eva": (2.0, pytest.approx(0.04), 3)}
    assert report.cost_rows(record)[2][1:] == ["3", "2", "20.0%", "4.0%", "400"]
    assert "does not show for all methods: it is none of 1" in report.cost_verdict(record)


def test_all_of_it_is_drawn_and_told(entries):
    record = pages.record_of("rates_gsm8k")
    assert len(report.draw(entries, record).axes) == 4
    for rows in (report.equivalent_rows, report.direction_rows, report.end_rows):
        name = {"equivalent_rows": "equivalent", "direction_rows": "directions", "end_rows": "ends"}[rows.__name__]
        table = rows(entries[name])
        assert len(table) > 2 and {len(row) for row in table} == {len(table[0])}


def test_the_committed_record_is_on_the_page():
    text, kept = pages.page(), records.cases("claims")
    assert set(kept) == set(SUBJECTS["claims"].full)
    for arm, one in kept["equivalent"]["arms"].items():
        assert f"| {arm} | {one['distance'][0]:.4f} |" in text
