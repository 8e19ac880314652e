import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lora_kernels.init import LoraGA, resolve_method
from lora_kernels.init.lora_ga import DIRECTIONS, SCALES
from lora_kernels.init.problem import BaseLayer
from lora_kernels.statistics import Statistics
from tests.helpers.layers import fisher_diagonal, gradient_layer, layer_statistics, sketched_gradient_layer

CPU = torch.device("cpu")


def matrix(m, n, decay=0.8):
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k)).Q, torch.linalg.qr(torch.randn(n, k)).Q
    return (u * decay ** torch.arange(k)) @ v.mT


def base_of(weight, scaling=1.5):
    return {"l": BaseLayer(lambda: weight, scaling)}


@pytest.mark.parametrize("shape", [(24, 33), (33, 24)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", [each for each in DIRECTIONS if each != "random"])
def test_same_start_as_peft(direction, scale, shape):
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    model[0].weight.data = matrix(m, n)
    weight = model[0].weight.data.clone()
    x = torch.randn(500, n) * 0.85 ** torch.arange(n)
    target = torch.randn(500, m) * 0.9 ** torch.arange(m)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale={"gd": "gd_scale"}.get(scale, scale), stable_gamma=9),
    )
    preprocess_loraga(model, config, lambda: nn.functional.mse_loss(model(x), target).backward())
    gradient = model[0]._peft_loraga_grad.clone()
    theirs = get_peft_model(model, config).base_model.model[0]
    peft_a, peft_b = theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data
    # As a collection would hold it: the sum over the items.
    statistics = Statistics(layers={"l": gradient_layer("l", gradient * 500)}, loss_items=500.0)
    method = LoraGA(direction=direction, scale=scale, gamma=9)
    found = method.factors(statistics, {"l": 4}, base=base_of(weight))["l"]
    a, b = found.factors.A, found.factors.B
    # A and B hold different triplets: rows and columns have signs of their own.
    signs, columns = (a * peft_a).sum(-1).sign(), (b * peft_b).sum(0).sign()
    torch.testing.assert_close(a, peft_a * signs[:, None], rtol=0, atol=2e-3)
    torch.testing.assert_close(b, peft_b * columns, rtol=0, atol=2e-3 * float(peft_b.abs().max()))
    start = 1.5 * (b * columns) @ (a * signs[:, None])
    theirs_start = 1.5 * peft_b @ peft_a
    assert float((start - theirs_start).norm() / theirs_start.norm()) < 2e-3
    torch.testing.assert_close(
        weight - start, theirs.get_base_layer().weight.data, rtol=0, atol=2e-3 * float(theirs_start.abs().max())
    )


def test_equals_the_definition_and_the_bound_holds():
    gradient = matrix(200, 150, decay=0.9)
    found = LoraGA().factors({"l": gradient_layer("l", gradient)}, {"l": 8})["l"]
    u, s, vh = torch.linalg.svd(gradient.double())
    assert float(((found.factors.A.double() * vh[:8]).sum(-1).abs() - 1).abs().max()) < 1e-6
    expected = s[8:16] * 200**0.25 / 4
    torch.testing.assert_close((found.factors.B.double() * u[:, 8:16]).sum(0).abs(), expected, rtol=1e-4, atol=0)
    assert float(s[16] / s[0]) <= found.residual * (1 + 1e-5) <= 4 * float(s[16:].norm() / s[0])


def test_a_sketch_gives_the_same():
    x, g = torch.randn(300, 6) @ matrix(6, 70), torch.randn(300, 6) @ matrix(6, 50)
    sums = Statistics(layers={"l": sketched_gradient_layer("l", g, x, 24)}, loss_items=300.0)
    exact = Statistics(layers={"l": gradient_layer("l", g.mT @ x)}, loss_items=300.0)
    one, two = (LoraGA(scale="unit").factors(each, {"l": 3})["l"] for each in (sums, exact))
    torch.testing.assert_close(one.factors.A, two.factors.A, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.factors.B, two.factors.B, rtol=0, atol=1e-4 * float(two.factors.B.abs().max()))
    assert one.solver == "two_sided"


def test_random_is_seeded_and_repeats_are_bitwise():
    layers = {name: gradient_layer(name, matrix(40, 30)) for name in ("a", "b", "c")}
    layers["c"] = gradient_layer("c", matrix(30, 40))
    ranks = {"a": 6, "c": 6, "b": 6}
    method = LoraGA(direction="random", scale="unit", seed=7)
    one, two = (method.factors(layers, ranks) for _ in range(2))
    assert list(one) == list(ranks)
    for name in ranks:
        assert torch.equal(one[name].factors.A, two[name].factors.A)
        assert torch.equal(one[name].factors.B, two[name].factors.B)
        # A and B hold the same triplets: G A^T is B.
        product = layers[name].sums["gradient"].total @ one[name].factors.A.mT
        torch.testing.assert_close(product, one[name].factors.B, rtol=0, atol=1e-4)
    other = LoraGA(direction="random", scale="unit", seed=8).factors(layers, ranks)
    assert not torch.equal(other["a"].factors.A, one["a"].factors.A)


def test_a_zero_gradient_is_said():
    found = LoraGA(scale="weight_svd").factors(
        {"l": gradient_layer("l", torch.zeros(12, 15))}, {"l": 3}, base=base_of(torch.randn(12, 15))
    )["l"]
    assert "its weight gradient is zero" in found.notes[0] and found.solver == "stock"
    assert torch.isfinite(found.factors.A).all() and float(found.factors.B.abs().max()) == 0


@pytest.mark.parametrize("form", ["exact", "sketch"])
@pytest.mark.parametrize("scale", SCALES)
def test_fewer_directions_than_2r_in_the_gradient_are_said_and_rounding_is_not_blown_up(scale, form):
    g, x = torch.randn(3, 40), torch.randn(3, 50)
    statistics = gradient_layer("l", g.mT @ x) if form == "exact" else sketched_gradient_layer("l", g, x, 16)
    weight = torch.randn(40, 50)
    found = LoraGA(scale=scale).factors({"l": statistics}, {"l": 4}, base=base_of(weight))["l"]
    assert "the gradient has 3 directions above rounding for the 2r = 8 of A and B" in found.notes[0]
    assert not found.factors.B.any()  # ArB2r: B gets triplets 5 to 8, of which there is none
    right = torch.linalg.svd((g.mT @ x).double()).Vh[:3]
    inside = torch.nn.functional.normalize(found.factors.A[:3].double(), dim=1) @ right.mT
    assert float((torch.linalg.svdvals(inside) - 1).abs().max()) < 1e-5
    other = LoraGA(scale=scale, direction="A2rBr").factors({"l": statistics}, {"l": 4}, base=base_of(weight))["l"]
    assert torch.linalg.matrix_rank(other.factors.B) == 3 and not other.factors.B[:, 3].any()


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e4])
def test_gradients_of_any_size_give_the_same_directions_and_their_size_is_said(size):
    gradient = matrix(40, 30)
    plain, scaled = (
        LoraGA().factors({"l": gradient_layer("l", gradient * each)}, {"l": 4})["l"] for each in (1.0, size)
    )
    torch.testing.assert_close(scaled.factors.A, plain.factors.A, rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.factors.B / size, plain.factors.B, rtol=0, atol=1e-4)
    assert not plain.notes and "need another gamma" in scaled.notes[0]
    weight = base_of(torch.randn(40, 30))
    relative = LoraGA(scale="weight_svd").factors({"l": gradient_layer("l", gradient * size)}, {"l": 4}, base=weight)[
        "l"
    ]
    assert not relative.notes and 1 < float(relative.factors.B.norm(dim=0).max()) < 20


@pytest.mark.parametrize("size", [1e18, 1e38])
def test_factors_that_would_round_the_weight_away_leave_the_stock_start(size):
    statistics, base = {"l": gradient_layer("l", matrix(40, 30) * size)}, base_of(torch.randn(40, 30))
    found = LoraGA(gamma=1e-20).factors(statistics, {"l": 4})["l"]
    assert found.solver == "stock" and "another gamma" in found.notes[0] and not found.factors.B.any()
    relative = LoraGA(scale="weight_svd").factors(statistics, {"l": 4}, base=base)["l"]
    assert not relative.notes and 1 < float(relative.factors.B.norm(dim=0).max()) < 20


@pytest.mark.parametrize("form", ["exact", "sketch"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_than_2r_directions_are_all_given_away(rank, direction, form):
    g, x = torch.randn(50, 3), torch.randn(50, 15)
    statistics = gradient_layer("l", g.mT @ x) if form == "exact" else sketched_gradient_layer("l", g, x, 8)
    found = LoraGA(direction=direction, scale="weight_svd").factors(
        {"l": statistics}, {"l": rank}, base=base_of(torch.randn(3, 15))
    )["l"]
    a, b = found.factors.A, found.factors.B
    assert a.shape == (rank, 15) and b.shape == (3, rank) and torch.isfinite(b).all()
    if direction == "random":  # A and B have the same r
        assert torch.linalg.matrix_rank(b @ a) == rank and not found.notes
        return
    # What neither A's rows nor B's columns reach of the gradient, which is what the first step of LoRA leaves.
    gradient = g.mT @ x
    ranks = torch.linalg.matrix_rank(b), torch.linalg.matrix_rank(a)
    left, right = torch.linalg.svd(b).U[:, : ranks[0]], torch.linalg.svd(a).Vh[: ranks[1]]
    assert left.shape[1] + right.shape[0] == 3
    rest = gradient - left @ (left.mT @ gradient)
    rest = rest - (rest @ right.mT) @ right
    assert rest.norm() < 1e-4 * gradient.norm()
    assert f"min(m, n) = 3 directions for the 2r = {2 * rank}" in found.notes[0]


def test_errors():
    statistics = {"l": gradient_layer("l", matrix(12, 15))}
    empty = layer_statistics("l", 12, 15, fisher_diagonal(torch.zeros(12)))
    for missing in ({}, {"l": layer_statistics("l", 12, 15)}, {"l": empty}):
        with pytest.raises(ValueError, match="no weight gradient of layer l"):
            LoraGA().factors(missing, {"l": 2})
    with pytest.raises(ValueError, match="hold no loss"):
        LoraGA().factors(Statistics(layers=statistics), {"l": 2})
    with pytest.raises(ValueError, match=r"layer l has rank 13, but must be between 1 and min\(m, n\) = 12"):
        LoraGA().factors(statistics, {"l": 13})
    for scale in ("weight_svd", "gd"):
        with pytest.raises(ValueError, match="base has no layer l"):
            LoraGA(scale=scale).factors(statistics, {"l": 2})
    with pytest.raises(ValueError, match="the weight gradient of layer l holds NaN"):
        LoraGA().factors({"l": gradient_layer("l", torch.full((12, 15), torch.nan))}, {"l": 2})
    with pytest.raises(ValueError, match="8 triplets are asked of a sketch with 6 columns"):
        LoraGA().factors({"l": sketched_gradient_layer("l", torch.randn(50, 12), torch.randn(50, 15), 6)}, {"l": 4})
    with pytest.raises(ValueError, match="direction is 'up'"):
        LoraGA(direction="up")
    with pytest.raises(ValueError, match="scale is 'gd_scale'"):
        LoraGA(scale="gd_scale")
    for gamma in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma is"):
            LoraGA(gamma=gamma)
    assert resolve_method("lora_ga") == LoraGA() and LoraGA.offsets_base
    assert LoraGA().sketch_size([4, 8]) == 32
