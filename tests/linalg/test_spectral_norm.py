"""The bracket of a spectral norm."""

import sys

import pytest
import torch

from lora_kernels.linalg.spectral_norm import spectral_norm


def graded(m, n, decades, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n))
    return ((u * torch.logspace(0, -decades, k, dtype=torch.float64)) @ v.mT).to(dtype)


@pytest.mark.parametrize(("decades", "scale"), [(0.0, 1.0), (0.5, 1e-25), (3.0, 1e25)])
def test_bracket(decades, scale):
    a = graded(560, 520, decades) * scale
    truth = float(torch.linalg.matrix_norm(a.double(), 2))
    value, upper = spectral_norm(a)
    assert 0.97 * truth <= value <= truth * (1 + 1e-5)
    assert truth * (1 - 1e-5) <= upper <= 1.45 * truth
    if decades == 3.0:
        assert value >= 0.9995 * truth and upper <= 1.06 * truth


def test_bracket_is_tight_where_a_gap_is_behind_the_leading_values():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 520, generator=generator)).Q for n in (560, 520))
    s = torch.linspace(1.5, 1.0, 520)
    s[:3] = torch.tensor([2.0, 2.0, 1.9])  # as at a minimum: a few equal values above the rest
    value, upper = spectral_norm((u * s) @ v.mT)
    assert value == pytest.approx(2, rel=1e-4) and 2 * (1 - 1e-5) <= upper <= 2.002


def test_upper_bound_holds_for_many_draws_where_the_estimate_is_poor(monkeypatch):
    monkeypatch.setattr(sys.modules[spectral_norm.__module__], "_ROUNDS", 0)
    monkeypatch.setattr(sys.modules[spectral_norm.__module__], "_POWER", 1)
    a = graded(560, 520, 0.2)
    truth = float(torch.linalg.matrix_norm(a.double(), 2))
    found = [spectral_norm(a, seed=seed) for seed in range(12)]
    assert min(value for value, _ in found) < 0.95 * truth
    assert all(value <= truth * (1 + 1e-5) <= upper * (1 + 2e-5) for value, upper in found)


def test_small_matrices_are_exact_and_draws_repeat():
    a = graded(60, 40, 1.0)
    value, upper = spectral_norm(a)
    assert value == upper == pytest.approx(float(torch.linalg.matrix_norm(a.double(), 2)), rel=1e-7)
    big = graded(560, 520, 2.0)
    assert spectral_norm(big) == spectral_norm(big) != spectral_norm(big, seed=1)
    assert spectral_norm(torch.zeros(600, 550)) == (0, 0)
    assert spectral_norm(torch.zeros(0, 5)) == (0, 0)
