"""The optimality certificate on problems whose minima are known, and the verdicts on the numbers."""

import math
from dataclasses import replace

import pytest
import torch

from lora_kernels.landscape import Adapter, Thresholds, certify, judge, measure, overall
from lora_kernels.landscape.verdict import (
    KINDS,
    LOUD_FAILURE,
    LOW_RANK_MINIMUM,
    NOT_JUDGED,
    RANK_LIMITED,
    STILL_TRAINING,
    Verdict,
)
from lora_kernels.landscape.weights import WeightNorms
from lora_kernels.statistics import Gradient

DECAY = 0.3


def minimum(scaling, rank=4, decay=DECAY, seed=0):
    """`0.5 |D - T|_F^2 + decay / |s| |D|_*` has the minimum `T` with its singular values lowered by `decay / |s|`."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    s = torch.tensor([3.0, 2.0, 0.1, 0.05, 0.02, 0.01, 0.0], dtype=torch.float64)
    t = (u * s) @ vh
    kept = (s - decay / abs(scaling)).clamp_min(0)[:rank]
    root = (kept / abs(scaling)).sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root * math.copysign(1, scaling)
    return t, a, b


def certificate_at(t, a, b, scaling, decay=DECAY, weight=None, gain=None):
    adapter = Adapter("l", a, b, scaling, weight)
    spectrum = measure([adapter])["l"]
    return spectrum, certify(adapter, spectrum, Gradient(scaling * b @ a - t), decay, gain)


@pytest.mark.parametrize("scaling", [2.0, 0.5, -2.0])
def test_closes_at_the_minimum_whatever_the_scaling(scaling):
    spectrum, found = certificate_at(*minimum(scaling), scaling)
    assert spectrum.numerical_rank == 2 and found.directions == 2 and found.source == "exact"
    assert found.threshold == pytest.approx(DECAY / abs(scaling))
    assert found.ratio == pytest.approx(1, abs=1e-10) and found.ratio_high == found.ratio_low == found.ratio
    assert found.alignment < 1e-10 and found.alignment_error == 0 and found.stationarity < 1e-10
    assert found.implied_weight_decay == pytest.approx(DECAY)
    assert spectrum.balance < 1e-12
    assert "AdamW" in found.objective and "L2" in found.objective
    verdict = judge(spectrum, found)
    assert verdict.kind == LOW_RANK_MINIMUM and "s |G|_2 / lambda = 1" in " ".join(verdict.reasons)


def test_another_decay_does_not_close_and_the_implied_one_says_so():
    spectrum, found = certificate_at(*minimum(2.0), 2.0, decay=2 * DECAY)
    assert found.ratio == pytest.approx(0.5) and found.alignment == pytest.approx(0.5)
    assert found.stationarity == pytest.approx(0.5) and found.implied_weight_decay == pytest.approx(DECAY)
    assert judge(spectrum, found).kind == STILL_TRAINING


def test_stationarity_is_the_gradient_of_the_factors():
    t, a, b = minimum(2.0)
    generator = torch.Generator().manual_seed(1)
    a, b = (x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (a, b))
    _, found = certificate_at(t, a, b, 2.0)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    loss = 0.5 * (2.0 * leaves[1] @ leaves[0] - t).square().sum()
    (loss + 0.5 * DECAY * sum(x.square().sum() for x in leaves)).backward()
    length = math.hypot(*(float(x.grad.norm()) for x in leaves))
    size = math.hypot(float(a.norm()), float(b.norm()))
    assert found.stationarity == pytest.approx(length / (DECAY * size)) and found.alignment > 0.01


def test_a_saddle_is_still_training_and_zero_can_be_the_minimum():
    t, a, b = minimum(2.0)
    a[1], b[:, 1] = 0, 0  # stationary, but the second direction is missing
    spectrum, found = certificate_at(t, a, b, 2.0)
    assert found.stationarity < 1e-10 and found.ratio == pytest.approx(2.0 / (DECAY / 2.0))
    assert judge(spectrum, found).kind == STILL_TRAINING
    for decay, kind in ((10.0, LOW_RANK_MINIMUM), (DECAY, STILL_TRAINING)):
        spectrum, found = certificate_at(t, 0 * a, 0 * b, 2.0, decay)
        assert found.alignment is None and found.stationarity == 0 and found.implied_weight_decay is None
        assert judge(spectrum, found).kind == kind
    # The usual start: B is zero, A is not, and the loss has a gradient.
    spectrum, found = certificate_at(t, torch.ones_like(a), 0 * b, 2.0)
    assert spectrum.status == "zero" and judge(spectrum, found).kind == STILL_TRAINING


def test_stationary_at_full_rank_and_no_minimum():
    # Rank one at the second singular value of T: no other rank-one factors nearby are better to first order.
    t, a, b = minimum(2.0)
    a, b = a[1:2], b[:, 1:2]
    spectrum, found = certificate_at(t, a, b, 2.0)
    assert found.stationarity < 1e-10 and found.ratio > 2
    assert found.cost == pytest.approx(DECAY / 2 * float(torch.linalg.matrix_norm(2 * b @ a)))
    unsure = replace(found, gradient_norm_low=found.threshold)
    assert judge(spectrum, unsure).kind == STILL_TRAINING
    # Without the losses it cannot be told whether the rank is too small or the update too large.
    verdict = judge(spectrum, found)
    assert verdict.kind == NOT_JUDGED and "full rank" in " ".join(verdict.reasons)
    for share, kind in ((1.0, RANK_LIMITED), (0.01, LOUD_FAILURE)):
        weight = WeightNorms(share * spectrum.spectral, 1.0)
        gain = 1.01 * found.cost
        verdict = judge(*certificate_at(t, a, b, 2.0, weight=weight, gain=gain))
        assert verdict.kind == kind, verdict
    verdict = judge(*certificate_at(t, a, b, 2.0, gain=0.99 * found.cost))
    assert verdict.kind == LOUD_FAILURE and "zero would be lower" in verdict.reasons[-1]
    # At the first one too, until the decay is above the second value and rank one is enough.
    assert judge(*certificate_at(t, a, b, 2.0, gain=4.0)).kind == RANK_LIMITED
    t, a, b = minimum(2.0, rank=1, decay=4.2)
    verdict = judge(*certificate_at(t, a, b, 2.0, 4.2))
    assert verdict.kind == LOW_RANK_MINIMUM and "whole rank" in verdict.reasons[-1]


def test_sketched_gradient_brackets():
    t, a, b = minimum(2.0)
    g = 2.0 * b @ a - t
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    adapter = Adapter("l", a, b, 2.0)
    spectrum = measure([adapter])["l"]
    error = float(s[3])
    found = certify(adapter, spectrum, Gradient(u[:, :3] * s[:3], vh[:3], error), DECAY)
    assert found.source == "sketch" and found.ratio == pytest.approx(1, abs=1e-10)
    assert found.ratio_high == pytest.approx(1 + error / found.threshold)
    assert found.ratio_low == pytest.approx(1 - error / found.threshold)
    assert found.alignment_error == pytest.approx(error / found.threshold)
    # What the sketch cannot exclude is not certified.
    assert error / found.threshold > 0.05 and judge(spectrum, found).kind == STILL_TRAINING
    sharp = certify(adapter, spectrum, Gradient(u * s, vh, 1e-6), DECAY)
    assert judge(spectrum, sharp).kind == LOW_RANK_MINIMUM


def test_thresholds_move_the_verdict():
    spectrum, found = certificate_at(*minimum(2.0), 2.0)
    assert judge(spectrum, replace(found, stationarity=math.nan)).kind == STILL_TRAINING
    changes = {"stationarity": 0.051, "gradient_norm_high": 1.06 * found.threshold, "alignment": 0.051}
    for change in ({name: value} for name, value in {**changes, "alignment_error": 0.051}.items()):
        worse = replace(found, **change)
        assert judge(spectrum, worse).kind == STILL_TRAINING
        assert (
            judge(spectrum, worse, Thresholds(stationarity=0.06, ratio=0.07, alignment=0.06)).kind == LOW_RANK_MINIMUM
        )
    loose = Thresholds(rank_tolerance=0.9)
    assert "numerical rank 1 of 4 (tolerance 0.9)" in judge(spectrum, None, loose).reasons
    for name in ("rank_tolerance", "full_rank"):
        with pytest.raises(ValueError, match=name):
            Thresholds(**{name: 1.5})
    with pytest.raises(ValueError, match="stationarity"):
        Thresholds(stationarity=-1.0)


def test_without_a_certificate_only_what_is_loud_is_told():
    a, b = torch.randn(3, 20), torch.randn(30, 3)
    norm = float(torch.linalg.matrix_norm(b @ a, 2))
    for share, kind in ((29.0, NOT_JUDGED), (31.0, LOUD_FAILURE)):
        seen = measure([Adapter("l", a, b, 1.0, WeightNorms(norm / share, 1.0))])["l"]
        assert judge(seen).kind == kind and f"{share:.3g} of |W|_2" in " ".join(judge(seen).reasons)
    wide = torch.randn(24, 20), torch.randn(30, 24)  # more rank than the weight has
    assert judge(measure([Adapter("l", *wide, 1.0, WeightNorms(1e-3, 1.0))])["l"]).kind == LOUD_FAILURE
    assert judge(measure([Adapter("l", a, b, 1.0, WeightNorms(math.nan, math.nan))])["l"]).kind == LOUD_FAILURE
    flat = b.clone()
    flat[:, 1:] = 0
    seen = measure([Adapter("l", a, flat, 1.0, WeightNorms(1e-3, 1.0))])["l"]
    assert judge(seen).kind == NOT_JUDGED  # large, but of low rank
    assert judge(measure([Adapter("l", a, b / 0, 1.0)])["l"]).kind == LOUD_FAILURE
    assert judge(measure([Adapter("l", a, b, 1.0)])["l"]).kind == NOT_JUDGED


def test_overall():
    def of(*kinds):
        return overall([Verdict(kind, ()) for kind in kinds]).kind

    assert of(LOW_RANK_MINIMUM, LOW_RANK_MINIMUM) == LOW_RANK_MINIMUM
    assert of(LOW_RANK_MINIMUM, STILL_TRAINING) == STILL_TRAINING
    assert of(LOW_RANK_MINIMUM, NOT_JUDGED, RANK_LIMITED) == NOT_JUDGED
    assert of(LOW_RANK_MINIMUM, RANK_LIMITED) == RANK_LIMITED
    assert of(*KINDS) == LOUD_FAILURE and of() == NOT_JUDGED
    assert overall([Verdict(LOUD_FAILURE, ())] * 2).reasons == ("2 layers: 2 loud_failure",)


def test_bad_arguments():
    t, a, b = minimum(2.0)
    adapter = Adapter("l", a, b, 2.0)
    spectrum = measure([adapter])["l"]
    for decay in (0.0, math.inf):
        with pytest.raises(ValueError, match="weight_decay"):
            certify(adapter, spectrum, Gradient(t), decay)
    with pytest.raises(ValueError, match="weight_decay"):
        certify(adapter, spectrum, Gradient(t), -1.0)
    with pytest.raises(ValueError, match=r"shape \(7, 9\), but must have shape \(9, 7\)"):
        certify(adapter, spectrum, Gradient(t.mT), DECAY)
