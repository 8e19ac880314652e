import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from lora_kernels.init import CorDA, resolve_method
from lora_kernels.init.problem import BaseLayer
from lora_kernels.statistics import InputMoments
from lora_kernels.statistics.sketches import InputSketch
from tests.helpers.accuracy import assert_accurate
from tests.helpers.layers import layer_statistics

MODES = {"instruction_previewed": "ipm", "knowledge_preserved": "kpm"}


def layer(name, x, out_features, moments=None):
    if moments is None:
        moments = InputMoments(x.shape[-1], x.device)
        moments.update(x)
    return layer_statistics(name, out_features, moments.features, moments)


def data(tokens=400, n=20, decay=0.9):
    return 0.5 + torch.randn(tokens, n) * decay ** torch.arange(n)


def base_of(weight, scaling=1.5):
    return {"l": BaseLayer(lambda: weight, scaling)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(16, 24), (30, 20)])
def test_same_start_as_peft(mode, shape):
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    weight, x = model[0].weight.data.clone(), data(n=n)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=MODES[mode]),
    )
    preprocess_corda(model, config, run_model=lambda: model(x))
    theirs = get_peft_model(model, config).base_model.model[0]
    peft_a, peft_b = theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data
    found = CorDA(mode=mode).factors({"l": layer("l", x, m)}, {"l": 4}, base=base_of(weight))["l"]
    a, b = found.factors.A, found.factors.B
    # The smallest components of a float32 decomposition are off by rounding at the scale of the largest.
    tolerance = {"rtol": 0, "atol": 2e-5 if mode == "instruction_previewed" else 1e-3}
    scale = float((1.5 * b @ a).abs().max())
    assert scale > 0.02
    torch.testing.assert_close(1.5 * b @ a, 1.5 * peft_b @ peft_a, **tolerance)
    torch.testing.assert_close(weight - 1.5 * b @ a, theirs.get_base_layer().weight.data, **tolerance)
    # They sum over the tokens of a call, divided by the largest input: that moves scale between A and B, no more.
    factor = (len(x) / float(x.max()) ** 2) ** 0.5
    signs = (a * peft_a).sum(-1).sign()
    relative = 1e-3 if mode == "instruction_previewed" else 2e-2
    for ours, expected in ((a, peft_a * signs[:, None] * factor), (b, peft_b * signs / factor)):
        assert float((ours - expected).norm() / expected.norm()) < relative


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(40, 17), (17, 40), (70, 60)])
def test_equals_the_definition(mode, shape):
    m, n = shape
    weight, x, rank = torch.randn(m, n), data(n=n), 5
    found = CorDA(mode=mode, damping=0.1).factors({"l": layer("l", x, m)}, {"l": rank}, base=base_of(weight))["l"]
    part = slice(None, rank) if mode == "instruction_previewed" else slice(-rank, None)

    def definition(second):
        second = second / len(x) + 0.1 * second.diagonal().mean() / len(x) * torch.eye(n)
        u, s, vh = torch.linalg.svd(weight.double() @ second, full_matrices=False)
        return u[:, part] * s[part] @ vh[part] @ torch.linalg.inv(second), s

    expected, s = definition(x.double().mT @ x.double())
    # The moments are float32: at most twice the error that they make in the worst order.
    moments = torch.zeros(n, n)
    for row in x:
        moments += torch.outer(row, row)
    plain, _ = definition(moments.double())
    got = 1.5 * found.factors.B.double() @ found.factors.A.double()
    assert_accurate(got, expected, torch.finfo(torch.float32).eps, plain=plain)
    split = (s[part] / 1.5).sqrt()
    torch.testing.assert_close(found.factors.B.norm(dim=0).double(), split, rtol=1e-4, atol=0)
    if mode == "instruction_previewed":
        assert float(s[rank] / s[0]) <= found.residual * (1 + 1e-6) <= 4 * float(s[rank:].norm() / s[0])
    else:
        assert found.residual < 1e-12 and found.solver == "svd"


def test_layers_with_one_input_and_repeats():
    x = data()
    q = layer("q", x, 30)
    statistics = {"q": q, "other": layer("other", data(), 12), "k": layer("k", x, 8, q.input)}
    weights = {name: torch.randn(each.out_features, 20) for name, each in statistics.items()}
    base = {name: BaseLayer(lambda w=w: w, 2.0) for name, w in weights.items()}
    ranks = {"q": 4, "other": 2, "k": 3}
    one, two = (CorDA().factors(statistics, ranks, base=base) for _ in range(2))
    assert list(one) == list(ranks)
    for name in ranks:
        alone = CorDA().factors({name: statistics[name]}, {name: ranks[name]}, base=base)[name].factors
        assert torch.equal(one[name].factors.A, two[name].factors.A) and torch.equal(one[name].factors.A, alone.A)
        assert torch.equal(one[name].factors.B, two[name].factors.B) and torch.equal(one[name].factors.B, alone.B)


def test_few_tokens_without_damping_are_said():
    x = torch.randn(3, 20)
    found = CorDA(damping=0.0).factors({"l": layer("l", x, 9)}, {"l": 2}, base=base_of(torch.randn(9, 20)))["l"]
    assert "damping raised to" in found.notes[0]
    assert torch.isfinite(found.factors.A).all() and torch.isfinite(found.factors.B).all()


def test_a_singular_weight_is_said():
    weight = torch.randn(9, 2) @ torch.randn(2, 20)
    statistics = {"l": layer("l", data(), 9)}
    found = CorDA(mode="knowledge_preserved").factors(statistics, {"l": 4}, base=base_of(weight.double()))["l"]
    assert torch.isfinite(found.factors.A).all() and torch.isfinite(found.factors.B).all()
    zero = CorDA().factors(statistics, {"l": 4}, base=base_of(torch.zeros(9, 20)))["l"]
    assert "4 components have singular value zero" in zero.notes[0] and zero.residual == 0


def test_a_layer_without_inputs_starts_as_stock_lora_and_the_others_as_ever():
    statistics = {
        "good": layer("good", data(), 9),
        "zero": layer("zero", torch.zeros(4, 20), 9),
        "empty": layer("empty", torch.zeros(0, 20), 9),
    }
    weights = {name: torch.randn(9, 20) for name in statistics}
    base = {name: BaseLayer(lambda w=w: w, 1.0) for name, w in weights.items()}
    found = CorDA().factors(statistics, dict.fromkeys(statistics, 3), base=base)
    alone = CorDA().factors({"good": statistics["good"]}, {"good": 3}, base=base)["good"]
    assert torch.equal(found["good"].factors.A, alone.factors.A) and found["good"].solver != "stock"
    for name, why in (("zero", "its input is always zero"), ("empty", "it saw no token")):
        answer = found[name]
        assert answer.solver == "stock" and why in answer.notes[0]
        a = answer.factors.A
        assert a.shape == (3, 20) and 0.1 < float(a.abs().max()) <= 20**-0.5 and not answer.factors.B.any()


def test_errors():
    weight, statistics = torch.randn(9, 20), {"l": layer("l", data(), 9)}
    sketch = layer_statistics("l", 9, 20, InputSketch(20, torch.device("cpu"), size=8))
    for missing in ({}, {"l": layer_statistics("l", 9, 20)}, {"l": sketch}):
        with pytest.raises(ValueError, match="no exact second moment of the input of layer l"):
            CorDA().factors(missing, {"l": 2}, base=base_of(weight))
    with pytest.raises(ValueError, match="starts from the base weight, but base has no layer l"):
        CorDA().factors(statistics, {"l": 2})
    with pytest.raises(ValueError, match=r"layer l has rank 10, but must be between 1 and min\(m, n\) = 9"):
        CorDA().factors(statistics, {"l": 10}, base=base_of(weight))
    with pytest.raises(ValueError, match="the base weight of layer l holds NaN"):
        CorDA().factors(statistics, {"l": 2}, base=base_of(weight * torch.nan))
    with pytest.raises(ValueError, match=r"the base weight of layer l is \(20, 9\), but must be \(9, 20\)"):
        CorDA().factors(statistics, {"l": 2}, base=base_of(weight.mT))
    with pytest.raises(ValueError, match="the second moment of the input of layer l holds NaN"):
        CorDA().factors({"l": layer("l", data() * torch.nan, 9)}, {"l": 2}, base=base_of(weight))
    with pytest.raises(ValueError, match="mode is 'ipm', but must be one of"):
        CorDA(mode="ipm")
    with pytest.raises(ValueError, match="damping is -1"):
        CorDA(damping=-1)
    assert resolve_method("corda") == CorDA() and CorDA.offsets_base
