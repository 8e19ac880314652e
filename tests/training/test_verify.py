from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.training import lora_layer
from tests.statistics.test_models import quantized
from tests.training.test_accelerate import BATCH, wrapped


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_fused_layers_are_as_accurate_as_pefts(kind):
    model = wrapped(quantized(kind) if kind else None, lora_dropout=0.2).train()
    lk.accelerate(model)
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora" in name}
    report = lk.verify(model, BATCH)
    assert report.ok and not report.skipped and len(report.layers) == 6
    assert "as accurate as PEFT" in str(report)
    for each in report:
        assert set(each.fused) == {"y", "dx", "dA", "dB"}
        assert all(0 < value < 1e-4 for value in each.stock.values())
    assert abs(report.loss[0] - report.loss[1]) < 1e-4 * report.loss[1]
    assert model.training and all(each.grad is None for each in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(each.fused for each in model.modules() if isinstance(each, lora_layer.FusedForward))


def test_half_precision():
    model = wrapped().to(torch.bfloat16)
    lk.accelerate(model)
    assert lk.verify(model, BATCH).ok


def test_an_adapter_with_a_bias():
    model = wrapped(lora_bias=True)
    lk.accelerate(model)
    report = lk.verify(model, BATCH)
    assert report.ok and all(0 < value < 1e-4 for each in report for value in each.stock.values())


def test_only_layers_that_the_loss_reaches():
    model = wrapped()
    lk.accelerate(model)
    settings = {"forward": lambda model, batch: model(**batch, output_hidden_states=True)}
    report = lk.verify(model, BATCH, **settings, loss=lambda outputs, _: outputs.hidden_states[1].square().mean())
    assert report.ok and {each.name.split("layers.")[1][0] for each in report} == {"0"}
    with pytest.raises(ValueError, match="the loss reaches no accelerated layer"):
        lk.verify(model, BATCH, loss=lambda *_: torch.ones((), requires_grad=True) * 2)


@pytest.mark.parametrize("part", ["y", "dB"])
def test_a_wrong_layer_is_found(part, monkeypatch):
    real = lora_layer.lora_linear_group

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, g):
            return g / 2

    def wrong(x, members):
        if part == "y":
            return real(x, [replace(each, scaling=each.scaling * 1.001) for each in members])
        return real(x, [replace(each, b=Halved.apply(each.b)) for each in members])

    monkeypatch.setattr(lora_layer, "lora_linear_group", wrong)
    model = wrapped()
    lk.accelerate(model)
    report = lk.verify(model, BATCH)
    assert not report.ok and "LESS ACCURATE" in str(report)
    worst = report.layers[0]
    assert worst.fused[part] > 100 * worst.stock[part]


def test_what_is_not_accelerated_is_said():
    model = wrapped()
    with pytest.raises(ValueError, match="no layer of the model is accelerated"):
        lk.verify(model, BATCH)
    mixed = wrapped(use_dora=False)
    lk.accelerate(mixed)
    mixed.base_model.model.model.layers[0].self_attn.q_proj.merge()
    report = lk.verify(mixed, BATCH)
    assert list(report.skipped.values()) == ["adapters are merged or disabled"] and len(report.layers) == 5


def test_errors_below_rounding_are_alike():
    errors = lk.training.LayerErrors("layer", {"y": 1e-9, "dA": 3e-6}, {"y": 1e-12, "dA": 1e-6})
    assert errors.ratio(1e-7) == pytest.approx(3.0) and errors.ratio(1e-5) == 1.0
    few = lk.training.LayerErrors("layer", {"dc": 4e-7}, {"dc": 1e-7})
    assert few.ratio(1e-7) == 1.0 and few.ratio(1e-8) == pytest.approx(4.0)
