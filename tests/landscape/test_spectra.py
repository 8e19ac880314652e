"""Spectra, norms, ranks and balance against dense float64 algebra."""

import math

import pytest
import torch

from lora_kernels.landscape import Adapter, directions, factor_spectra, measure, overlap, spectra
from lora_kernels.landscape.weights import INTRUDER, WeightNorms, leading_directions, weight_norms

SHAPES = [(30, 20, 4), (30, 20, 4), (7, 13, 1), (13, 7, 24), (5, 3, 8), (64, 48, 16), (30, 20, 4)]


def draw(m, n, r, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * m + n)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((r, n), (m, r)))
    return a.to(dtype), b.to(dtype)


def product(a, b, scaling=1.0):
    return scaling * b.double() @ a.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_shapes_against_dense_singular_values(dtype):
    pairs = [draw(*shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    scalings = [0.5, -2.0, 1.0, 3.0, 0.0, 1e-3, 7.0]
    found = factor_spectra(pairs, scalings)
    for (a, b), scaling, values in zip(pairs, scalings, found, strict=True):
        truth = torch.linalg.svdvals(product(a, b, scaling))
        truth = torch.nn.functional.pad(truth, (0, max(0, len(values) - len(truth))))[: len(values)]
        assert values.dtype == torch.float64 and values.shape == (a.shape[0],)
        bound = (1e-12 if dtype == torch.float64 else 3e-6) * max(float(truth[0]), 1e-30)
        assert float((values - truth).abs().max()) <= bound
        if scaling:
            assert float((values / 2 - truth).abs().max()) > bound  # half the answer would be seen


def test_factors_of_two_dtypes_are_taken_in_the_wider():
    a, b = draw(30, 20, 4, torch.float64)
    for pair in ((a.float(), b), (a, b.float())):
        (values,) = factor_spectra([pair])
        truth = torch.linalg.svdvals(product(*pair))[:4]
        assert float((values - truth).abs().max()) < 1e-12 * float(truth[0])


def test_a_balance_in_parts_is_that_of_the_whole(monkeypatch):
    adapters = [Adapter(str(i), *(10.0**i * x for x in draw(30, 20, 4, seed=i)), 1.0) for i in range(5)]
    whole = measure(adapters)
    monkeypatch.setattr(spectra, "_CHUNK", 2 * 4 * 30)  # two pairs at a time
    monkeypatch.setattr(spectra, "_STACK", 3 * 4 * 50)  # and three in a stack
    assert {name: each.balance for name, each in measure(adapters).items()} == pytest.approx(
        {name: each.balance for name, each in whole.items()}, rel=1e-12
    )


def test_numbers_follow_from_the_dense_update():
    a, b = draw(30, 20, 6, torch.float64)
    b[:, 3] *= 1e-3
    spectrum = measure([Adapter("l", a, b, -0.5, WeightNorms(4.0, 10.0))], rank_tolerance=0.05)["l"]
    s = torch.linalg.svdvals(product(a, b, 0.5))[:6]
    shares = s / s.sum()
    gap = a @ a.mT - b.mT @ b
    assert spectrum.status == "ok" and spectrum.shape == (30, 20) and spectrum.rank == 6
    assert spectrum.spectral == pytest.approx(float(s[0])) and spectrum.nuclear == pytest.approx(float(s.sum()))
    assert spectrum.frobenius == pytest.approx(float(s.norm()))
    assert spectrum.numerical_rank == int((s > 0.05 * s[0]).sum()) == 5
    assert spectrum.stable_rank == pytest.approx(float(s.square().sum() / s[0] ** 2))
    assert spectrum.entropy_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert spectrum.norm_a == pytest.approx(float(a.norm())) and spectrum.norm_b == pytest.approx(float(b.norm()))
    assert spectrum.balance == pytest.approx(float(gap.norm() / (a.norm() ** 2 + b.norm() ** 2)))
    assert spectrum.spectral_share == pytest.approx(float(s[0]) / 4)
    assert spectrum.frobenius_share == pytest.approx(float(s.norm()) / 10)
    assert spectrum.drift is None


def test_equal_values_have_full_entropy_and_stable_rank_and_balanced_factors_no_imbalance():
    q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q
    p = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64)).Q
    spectrum = measure([Adapter("l", q.mT, p, 1.0)])["l"]
    assert spectrum.entropy_rank == pytest.approx(5) and spectrum.stable_rank == pytest.approx(5)
    assert spectrum.balance < 1e-14
    assert measure([Adapter("l", q.mT, 0 * p, 1.0)])["l"].balance == pytest.approx(1 / math.sqrt(5))


def test_drift_is_the_distance_from_the_start():
    (a, b), (a0, b0) = draw(30, 20, 4), draw(30, 20, 2, seed=3)
    found = measure([Adapter("l", a, b, 0.5, None, (a0, b0)), Adapter("same", a, b, 0.5, None, (a, b))])
    truth = float(torch.linalg.norm(product(a, b, 0.5) - product(a0, b0, 0.5)))
    assert found["l"].drift == pytest.approx(truth, rel=1e-5)
    assert found["same"].drift == pytest.approx(0, abs=1e-4)


def test_bad_and_extreme_adapters_get_answers():
    a, b = draw(30, 20, 4)
    nan, infinite = b.clone(), a.clone()
    nan[3, 2], infinite[0, 0] = math.nan, math.inf
    given = {
        "good": (a, b),
        "nan": (a, nan),
        "infinite": (infinite, b),
        "zero b": (a, 0 * b),
        "zero": (0 * a, 0 * b),
        "no rank": (a[:0], b[:, :0]),
        "rank one": (a[:1], b[:, :1]),
        "huge": (1e30 * a, 1e30 * b),
        "tiny": (1e-30 * a, 1e-30 * b),
    }
    found = measure([Adapter(name, *pair, 2.0) for name, pair in given.items()])
    assert list(found) == list(given)
    status = {name: each.status for name, each in found.items()}
    assert status == {
        **dict.fromkeys(("good", "rank one", "huge", "tiny"), "ok"),
        **dict.fromkeys(("nan", "infinite"), "not_finite"),
        **dict.fromkeys(("zero b", "zero", "no rank"), "zero"),
    }
    truth = float(torch.linalg.svdvals(product(a, b, 2.0))[0])
    assert found["good"].spectral == pytest.approx(truth, rel=1e-6)  # untouched by its neighbours
    assert found["huge"].spectral == pytest.approx(1e60 * truth, rel=1e-6)
    assert found["tiny"].spectral == pytest.approx(1e-60 * truth, rel=1e-6)
    for name in ("huge", "tiny"):
        assert found[name].balance == pytest.approx(found["good"].balance, rel=1e-5)
        assert found[name].entropy_rank == pytest.approx(found["good"].entropy_rank, rel=1e-5)
    for name in ("nan", "infinite"):
        assert math.isnan(found[name].spectral) and found[name].numerical_rank == 0
    assert found["zero"].balance == 0 and found["zero b"].numerical_rank == 0 and found["zero"].entropy_rank == 0
    assert found["rank one"].entropy_rank == found["rank one"].stable_rank == 1
    assert found["no rank"].values == () and found["no rank"].spectral == 0


def test_bad_arguments_are_named():
    a, b = draw(30, 20, 4)
    with pytest.raises(ValueError, match=r"layer l has factors of shapes \(4, 20\) and \(30, 3\)"):
        Adapter("l", a, b[:, :3], 1.0)
    with pytest.raises(ValueError, match="layer l has scaling nan"):
        Adapter("l", a, b, math.nan)
    with pytest.raises(ValueError, match="scalings has 1 entries, but must have 2"):
        factor_spectra([(a, b), (a, b)], [1.0])
    assert measure([]) == {} and factor_spectra([]) == []


def test_one_batched_call_per_shape(monkeypatch):
    calls = []
    real = spectra.factor_spectrum
    monkeypatch.setattr(spectra, "factor_spectrum", lambda a, b, **kw: calls.append(a.shape) or real(a, b, **kw))
    measure([Adapter(str(i), *draw(*shape), 1.0) for i, shape in enumerate(SHAPES)])
    assert len(calls) == len(set(SHAPES)) and max(shape[0] for shape in calls) == 3


@pytest.mark.parametrize("scaling", [0.5, -0.5])
def test_directions_are_singular_triplets(scaling):
    a, b = draw(30, 20, 4)
    u, s, v = directions(Adapter("l", a, b, scaling), 3)
    dense = product(a, b, scaling)
    assert torch.allclose(u.mT @ dense @ v, torch.diag(s), atol=1e-5 * float(s[0]))
    assert torch.allclose(s, torch.linalg.svdvals(dense)[:3], rtol=1e-6)


def test_weight_norms_by_blocks_of_rows():
    w = torch.randn(70, 50)
    for height in (1, 13, 70):
        found = weight_norms(lambda height=height: w.split(height), (70, 50))
        assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-3)
        assert found.frobenius == pytest.approx(float(w.norm()), rel=1e-6)
    assert weight_norms(lambda: [0 * w], (70, 50)) == WeightNorms(0.0, 0.0)
    assert math.isnan(weight_norms(lambda: [w / 0], (70, 50)).spectral)


def test_overlap_and_intruders():
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for n in (90, 80))
    w = (u[:, :60] * torch.linspace(10, 1, 60)) @ v[:, :60].mT
    weight = leading_directions(lambda: w.split(20), (90, 80), 30)
    inside = (u[:, [0, 5]].double(), torch.tensor([20.0, 9.0]).double(), v[:, [0, 5]].double())
    outside = (u[:, [70, 75]].double(), torch.tensor([20.0, 0.1]).double(), v[:, [70, 75]].double())
    found = overlap(inside, weight)
    assert min(found.left + found.right) > 0.99 and found.intruders == 0
    assert found.chance == pytest.approx(math.sqrt(30 / 90))
    itself = overlap((weight.U.double(), weight.S.double(), weight.Vh.mT.double()), weight)
    assert 0.999 < min(itself.left + itself.right) <= max(itself.left + itself.right) <= 1
    mixed = (u[:, [70]].double(), torch.tensor([20.0]).double(), v[:, [0]].double())
    assert overlap(mixed, weight).intruders == 0  # one side of it is the weight's own
    found = overlap(outside, weight)
    assert max(found.left + found.right) < 0.05 < INTRUDER and found.intruders == 1  # the other is too small to matter
