import pytest
import torch
from torch import nn

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
    real = lora_layer.LoraFunction

    class Wrong(real):
        @staticmethod
        def forward(ctx, x, weight, start, a, b, scalars, *others):
            if part == "y":
                scalars = scalars._replace(scaling=scalars.scaling * 1.001)
            return real.forward(ctx, x, weight, start, a, b, scalars, *others)

        @staticmethod
        def backward(ctx, g):
            dx, dw, start, da, db, *others = real.backward(ctx, g)
            return (dx, dw, start, da, db / 2 if part == "dB" else db, *others)

    monkeypatch.setattr(lora_layer, "apply_directly", Wrong.apply)
    model = wrapped()
    lk.accelerate(model)
    report = lk.verify(model, BATCH)
    assert not report.ok and "LESS ACCURATE" in str(report)
    worst = report.layers[0]
    assert worst.fused[part] > 100 * worst.stock[part]


class Shared(nn.Module):
    """A layer called twice, on inputs of other sizes, the first call without a gradient."""

    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.no_grad():
            still = self.head(x)
        return self.tail(self.head(still[:1]).tanh() + self.head(x))


def test_calls_of_a_shared_layer_keep_their_gradients():
    torch.manual_seed(0)
    model = wrapped(Shared(), target_modules=["head", "tail"])
    lk.accelerate(model, strict=True)
    report = lk.verify(model, torch.randn(4, 6), forward=lambda model, x: model(x), loss=lambda y, _: y.square().sum())
    assert report.ok and len(report.layers) == 2


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_layer_of_few_rows_is_right(rows):
    for seed in range(8):
        torch.manual_seed(seed)
        model = wrapped(nn.Sequential(nn.Linear(7, 3)), target_modules=["0"], r=1)
        lk.accelerate(model, strict=True)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            x = torch.randn(rows, 7, dtype=dtype)
            report = lk.verify(model, x, forward=lambda model, x: model(x), loss=lambda y, _: y.square().sum())
            assert report.ok, str(report)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**batch)

    model = wrapped()
    lk.accelerate(model)
    if inside:
        report = lk.verify(model, BATCH, forward=forward)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = lk.verify(model, BATCH)
    assert report.ok and all(layer.fused["y"] > 1e-4 for layer in report), "autocast was not repeated"


def test_what_is_not_accelerated_is_said():
    model = wrapped()
    with pytest.raises(ValueError, match="no layer of the model is accelerated"):
        lk.verify(model, BATCH)
    mixed = wrapped(use_dora=False)
    lk.accelerate(mixed)
    mixed.base_model.model.model.layers[0].self_attn.q_proj.merge()
    report = lk.verify(mixed, BATCH)
    assert list(report.skipped.values()) == ["adapters are merged or disabled"] and len(report.layers) == 5


def test_layers_that_all_run_pefts_forward_are_no_comparison():
    model = wrapped()
    lk.accelerate(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="all 6 LoRA layers run PEFT's own forward.*merged or disabled"):
        lk.verify(model, BATCH)


def test_errors_below_rounding_are_alike():
    errors = {"y": 1e-9, "dA": 3e-6}, {"y": 1e-12, "dA": 1e-6}
    for floor, ratio in ((1e-7, 3.0), (1e-5, 1.0), (2e-6, 1.5)):
        layer = lk.training.LayerErrors("layer", *errors, {"y": floor, "dA": floor})
        assert layer.ratio == pytest.approx(ratio)
