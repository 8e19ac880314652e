"""The bracket of a spectral norm."""

import sys

import pytest
import torch

from lora_kernels.linalg import LinearOperator, spectral_norm


def graded(m, n, decades, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n))
    return ((u * torch.logspace(0, -decades, k, dtype=torch.float64)) @ v.mT).to(dtype)


@pytest.mark.parametrize(("decades", "scale"), [(0.0, 1.0), (0.5, 1e-25), (3.0, 1e25)])
def test_bracket(decades, scale):
    a = graded(560, 520, decades) * scale
    truth = float(torch.linalg.matrix_norm(a.double(), 2))
    found = spectral_norm(a)
    assert 0.97 * truth <= found.value <= truth * (1 + 1e-5)
    assert truth * (1 - 1e-5) <= found.upper <= 1.45 * truth
    if decades == 3.0:
        assert found.value >= 0.9995 * truth and found.upper <= 1.06 * truth


def test_bracket_is_tight_where_a_gap_is_behind_the_leading_values():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 520, generator=generator)).Q for n in (560, 520))
    s = torch.linspace(1.5, 1.0, 520)
    s[:3] = torch.tensor([2.0, 2.0, 1.9])  # as at a minimum: a few equal values above the rest
    found = spectral_norm((u * s) @ v.mT)
    assert found.value == pytest.approx(2, rel=1e-4) and 2 * (1 - 1e-5) <= found.upper <= 2.002


def test_upper_bound_holds_for_many_draws_where_the_estimate_is_poor(monkeypatch):
    monkeypatch.setattr(sys.modules[spectral_norm.__module__], "_ROUNDS", 0)
    monkeypatch.setattr(sys.modules[spectral_norm.__module__], "_POWER", 1)
    a = graded(560, 520, 0.2)
    truth = float(torch.linalg.matrix_norm(a.double(), 2))
    found = [spectral_norm(a, seed=seed) for seed in range(12)]
    assert min(each.value for each in found) < 0.95 * truth
    assert all(each.value <= truth * (1 + 1e-5) <= each.upper * (1 + 2e-5) for each in found)


def test_small_matrices_are_exact_and_operators_agree():
    a = graded(60, 40, 1.0)
    found = spectral_norm(a)
    assert found.value == found.upper == pytest.approx(float(torch.linalg.matrix_norm(a.double(), 2)), rel=1e-7)
    big = graded(200, 150, 2.0)
    operator = LinearOperator((200, 150), lambda x: big @ x, lambda y: big.mT @ y)
    found = spectral_norm(operator)
    assert found.value == pytest.approx(1.0, rel=1e-3) and 1 - 1e-5 <= found.upper < 1.1
    assert spectral_norm(operator) == found  # same seed, same bits
    assert spectral_norm(operator, seed=1) != found


def test_trivial_and_bad_input():
    assert spectral_norm(torch.zeros(600, 550)).upper == 0
    assert spectral_norm(torch.zeros(0, 5)).value == 0
    for size in (20, 600):
        bad = torch.ones(size, size)
        bad[3, 4] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinite"):
            spectral_norm(bad)
    with pytest.raises(ValueError, match=r"must be \(m, n\)"):
        spectral_norm(torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="int64"):
        spectral_norm(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="seed"):
        spectral_norm(torch.ones(3, 3), seed=-(2**70))
