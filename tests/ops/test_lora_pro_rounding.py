"""Stochastic rounding of the moments to bfloat16."""

import pytest
import torch

from lora_kernels.ops import _ext, _philox, lora_pro_adam_
from lora_kernels.ops.lora_pro_adam import op
from lora_kernels.ops.lora_pro_adam.reference import stochastic_round
from tests.ops.lora_pro_cases import EXACT, whole_numbers
from tests.ops.test_philox import _words_by_hand

HAS_CPP = _ext.load()[0] is not None
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not HAS_CPP, reason="extension not built"))]


def test_bits_are_what_they_are_said_to_be():
    seed, stream, step, rows, columns = 0x9E3779B97F4A7C15, 1, 2**32 - 3, 5, 21
    found = _philox.halves(rows, columns, seed=seed, stream=stream, step=step, first_row=2**32 - 4)
    for row in range(rows):
        for column in range(columns):
            word = _words_by_hand(seed, (column // 8, (2**32 - 4 + row) % 2**32, stream, step), 7)[column % 8 // 2]
            assert int(found[row, column]) == (word >> 16 * (column % 2)) & 0xFFFF


def test_rounding_is_up_or_down_with_the_right_probability():
    low, high = 1.0, 1.0 + 2**-7
    for share in (0.0, 0.25, 0.9):
        for sign in (1, -1):
            x = torch.full((200, 500), sign * (low + share * (high - low)))
            found = sign * stochastic_round(x, seed=3, stream=0, step=1).float()
            assert bool(((found == low) | (found == high)).all())
            up = float((found == high).double().mean())
            assert abs(up - share) <= 5 * (share * (1 - share) / x.numel()) ** 0.5
    special = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5, 1e-45]] * 50)
    special[0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that bits would carry over
    found = stochastic_round(special, seed=1, stream=1, step=1)
    assert bool(found[:, 0].isnan().all()) and torch.equal(found[:, 1:6].float(), special[:, 1:6])


@pytest.mark.skipif(not HAS_CPP, reason="extension not built")
@pytest.mark.parametrize("seed", [0, -1, 2**63 + 12345])
@pytest.mark.parametrize("rows, columns", [(1, 1), (37, 50), (20, 500)])
def test_same_bits_in_torch_and_cpp(rows, columns, seed, monkeypatch):
    """All numbers but the random ones are exact: what differs is a wrong bit."""
    monkeypatch.setattr(op, "_LEAST", 1)  # torch then takes a few rows, or one, at a time
    moments, factors = whole_numbers(rows, columns, 4)
    other = [each.clone() for each in moments]
    for step in (1, 2, 2**32 - 1):
        call = {**EXACT, "step": step, "row_offset": 2**32 - 50}
        lora_pro_adam_(*moments, *factors, **call, seed=seed, backend="cpp")
        key = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
        lora_pro_adam_(*other, *factors, **call, seed=key.squeeze(0), backend="torch")
        assert torch.equal(moments[0], other[0]) and torch.equal(moments[1], other[1])
    assert float(moments[0].float().abs().max()) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_depend_on_seed_step_moment_and_place_alone(backend):
    def after(rows, columns, seed=5, step=1, **more):
        """Moments made of one gradient that bfloat16 cannot hold: all differences are the random bits."""
        moments = torch.zeros(2, rows, columns, dtype=torch.bfloat16)
        factors = torch.ones(1, columns), torch.full((rows, 1), 1.001), torch.ones(1, columns), torch.zeros(rows, 1)
        call = {"scaling": 1.0, "betas": (0.0, 0.0), "seed": seed, "step": step, "backend": backend}
        lora_pro_adam_(*moments, *factors, **call, **more)
        return moments

    whole = after(70, 210)
    assert set(whole.flatten().tolist()) == {1.0, 1.0078125}
    assert torch.equal(after(33, 101), whole[:, :33, :101])
    assert torch.equal(after(20, 210, row_offset=41), whole[:, 41:61])
    random = _philox.halves(70, 210, seed=5, stream=0, step=1)
    cut = int(torch.tensor(1.001).view(torch.int32)) & 0xFFFF
    assert torch.equal(whole[0] > 1, random + cut >= 2**16)
    for other in (after(70, 210, seed=6), after(70, 210, step=2), whole.flip(0), whole.roll(1, 2), whole.roll(1, 1)):
        assert 0.5 < float((other == whole).double().mean()) < 0.9


def test_the_second_moment_decays_as_in_float32():
    """A step changes it by less than half its last digit: to the nearest, it would stay where it is."""
    steps, columns = 1500, 512
    gradients = torch.randn(steps, 4, 1)
    a, zero = torch.ones(1, columns), torch.zeros(1, columns)
    b = torch.zeros(4, 1)
    narrow = [torch.zeros(4, columns, dtype=torch.bfloat16) for _ in range(2)]
    wide = [torch.zeros(4, columns) for _ in range(2)]
    nearest = torch.zeros(4, 1, dtype=torch.bfloat16)
    for step, gradient in enumerate(gradients, 1):
        for states in (narrow, wide):
            lora_pro_adam_(*states, a, b, zero, gradient, scaling=1.0, step=step, seed=7)
        nearest = (0.999 * nearest.float() + 0.001 * gradient**2).bfloat16()
    for one, other in zip(narrow, wide, strict=True):
        spread = one.float().std(1) / columns**0.5
        assert bool(((one.float().mean(1) - other[:, 0]).abs() < 5 * spread).all())
    assert float((nearest.float() / wide[1][:, :1] - 1).abs().max()) > 0.05
    assert float((narrow[1].float().mean(1) / wide[1][:, 0] - 1).abs().max()) < 0.01
