"""Rows that count."""

import torch

from lora_kernels.ops._rows import selection, shared_selections


def test_selections_are_shared_as_long_as_weights_are_the_same():
    weight, kept = torch.tensor([[1.0, 0.0], [2.0, 3.0]]), {}
    with shared_selections(kept):
        index, factors = selection(weight)
        again = selection(weight.view(2, 2))
        assert again[0] is index and again[1] is factors
        assert selection(weight[0])[0].tolist() == [0]
        assert selection(weight.mT)[0].tolist() == [0, 1, 3]
        weight[0, 0] = 0.0  # in place
        assert selection(weight)[0].tolist() == [2, 3]
    with shared_selections(kept):
        assert len(kept) == 4 and selection(weight)[0].tolist() == [2, 3]
    assert selection(weight)[0] is not selection(weight)[0]  # outside, nothing is kept


def test_memory_that_is_used_again_is_not_taken_for_the_same_weights():
    with shared_selections({}) as _:
        for place in range(20):
            weight = torch.zeros(20)
            weight[place] = 1.0
            assert selection(weight)[0].tolist() == [place]
            del weight
