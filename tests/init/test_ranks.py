import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_kernels.init import Redistribution, redistribute


def test_the_best_components_win():
    scores = {"a": [0.5, 0.2, 0.1], "b": [0.3, 0.3, 0.0], "c": [0.05, 0.01, 0.0]}
    assert redistribute(scores, 4) == {"a": 2, "b": 2, "c": 0}
    assert redistribute(scores, 4, min_rank=1) == {"a": 1, "b": 2, "c": 1}
    assert redistribute(scores, 100) == {"a": 3, "b": 3, "c": 3}


def test_ties_go_to_the_earlier_layer():
    assert redistribute({"q": [0.4, 0.2], "k": [0.4, 0.2], "v": [0.4, 0.2]}, 4) == {"q": 2, "k": 1, "v": 1}


def test_blocks():
    scores = {"a": [0.4, 0.0, 0.0, 0.0, 0.0], "b": [0.25, 0.25, 0.1, 0.1]}
    assert redistribute(scores, 4, multiple_of=2) == {"a": 2, "b": 2}
    assert redistribute(scores, 5, multiple_of=2) == {"a": 2, "b": 2}
    assert redistribute(scores, 2, multiple_of=2) == {"a": 0, "b": 2}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # times depend on what else the machine does
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=12), min_size=1, max_size=8),
    st.integers(0, 60),
    st.integers(1, 4),
)
def test_sums_and_limits(rows, budget, multiple):
    scores = {str(i): sorted(row, reverse=True) for i, row in enumerate(rows)}
    ranks = redistribute(scores, budget, multiple_of=multiple)
    assert sum(ranks.values()) == multiple * min(
        budget // multiple, sum(len(row) // multiple for row in scores.values())
    )
    assert all(rank <= len(scores[name]) and rank % multiple == 0 for name, rank in ranks.items())
    if multiple == 1:
        kept = [score for name, rank in ranks.items() for score in scores[name][:rank]]
        lost = [score for name, rank in ranks.items() for score in scores[name][rank:]]
        assert not kept or not lost or min(kept) >= max(lost)


def test_offers_and_errors():
    assert Redistribution(rho=2.0).offers({"a": 4, "b": 4}, {"a": 100, "b": 6}) == {"a": 8, "b": 6}
    assert Redistribution(rho=3.0, max_rank=10).offers({"a": 4}, {"a": 100}) == {"a": 10}
    with pytest.raises(ValueError, match="layer a has rank 9, but must be between 1 and min"):
        Redistribution(rho=1.0).offers({"a": 9}, {"a": 8})
    with pytest.raises(ValueError, match="rho is 0.5"):
        Redistribution(rho=0.5)
    with pytest.raises(ValueError, match="cannot give 2 layers a rank of 3 each"):
        redistribute({"a": [1.0] * 4, "b": [1.0] * 4}, 5, min_rank=3)
    with pytest.raises(ValueError, match="layer b offers 1 components, too few for min_rank=2"):
        redistribute({"a": [1.0] * 4, "b": [1.0]}, 5, min_rank=2)
