"""PEFT's LoRA classes for quantized and foreign base layers: on stand-ins, as their libraries are not at hand.

| class | in `peft.tuners.lora.` | there if | adapter's part | result |
| --- | --- | --- | --- | --- |
| `GPTQLoraLinear` | `gptq` | always | factors' dtype | cast back after each adapter |
| `AwqLoraLinear` | `awq` | always | cast back before it is scaled (not under autocast) | dtype of the sum |
| `EetqLoraLinear` | `eetq` | eetq is installed | as AWQ | as AWQ |
| `AqlmLoraLinear` | `aqlm` | always | as AWQ | added in place |
| `HqqLoraLinear` | `hqq` | hqq is installed | factors' dtype | cast back (not under autocast) |
| `IncLoraLinear` | `inc` | neural_compressor is installed | as `Linear`, whose forward it is | as `Linear` |
| `TeLinear` | `te` | PEFT 0.20 or newer | factors' dtype | cast back after all |

All of them are `base(x) + s B A drop(x)`, the base layer given x as it comes, the adapter x in the factors' dtype.
"""

import copy

import pytest
import torch
from torch.nn.functional import linear

import lora_kernels as lk
from lora_kernels.training.lora_layer import FusedForward
from tests.conftest import relative_error
from tests.helpers.quantized import KINDS, LayerNormLinear, peft_class, wrapped


def made(kind, **settings):
    model = wrapped(kind, **settings)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.2)
    return model


def results(layer, x, g, autocast=False):
    """Output and gradients of one call."""
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(g.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}


def assert_same(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys() and len(mine) == 4
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert relative_error(value.float(), theirs[name].float()) < tolerance, name


CASES = {
    "float32": (torch.float32, False, 1e-5),
    "bfloat16 inputs": (torch.bfloat16, False, 2e-2),
    "autocast": (torch.float32, True, 2e-2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_forward_is_base_and_adapter(kind, case):
    dtype, autocast, tolerance = CASES[case]
    with peft_class(kind):
        layer = made(kind, lora_dropout=0.3).base_model.model.lin
        x = torch.randn(6, 24).to(dtype)
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = layer(x).detach()
            start = layer.base_layer(x)
        assert found.dtype == start.dtype
        torch.manual_seed(4)
        a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
        dropped = layer.lora_dropout["default"](x.to(a.dtype))
        truth = start.float() + layer.scaling["default"] * linear(linear(dropped, a), b)
        assert relative_error(found.float(), truth) < tolerance
        assert relative_error(start.float(), truth) > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_as_stock(kind, case):
    dtype, autocast, tolerance = CASES[case]
    with peft_class(kind) as expected:
        stock = made(kind)
        fused = copy.deepcopy(stock)
        (report,) = lk.accelerate(fused, strict=True)
        assert (report.kind, report.path) == (expected.__name__, "delta")
        x, g = torch.randn(3, 5, 24).to(dtype), torch.randn(3, 5, 40)
        one, other = (each.base_model.model.lin for each in (fused, stock))
        assert isinstance(one, FusedForward) and isinstance(one, expected)
        assert_same(results(one, x, g, autocast), results(other, x, g, autocast), tolerance)
        if not autocast and dtype == torch.float32:
            assert lk.verify(fused, x, loss=lambda outputs, _batch: outputs).ok
            with fused.disable_adapter(), torch.no_grad():
                assert torch.equal(one(x), one.base_layer(x))
        assert lk.restore(fused) == 1 and type(one) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_fused_with_dropout_and_two_adapters(kind):
    with peft_class(kind):
        stock = made(kind, lora_dropout=0.5)
        fused = copy.deepcopy(stock)
        assert [each.path for each in lk.accelerate(fused, strict=True)] == ["delta"]
        x = torch.randn(4000, 24)
        with torch.no_grad():
            one, other, plain = (each.base_model.model.lin for each in (fused, stock, copy.deepcopy(stock).eval()))
            shares = [(each(x) - each.base_layer(x)).square().mean() for each in (one, other, plain)]
        # Masks differ; their mean effect does not: twice the square of what is not dropped.
        assert float(shares[0] / shares[1]) == pytest.approx(1.0, abs=0.1) and float(shares[0] / shares[2]) > 1.5
        for model in (stock, fused):
            model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
            model.base_model.set_adapter(["default", "second"])
            model.eval()
        fused.load_state_dict(stock.state_dict())
        with torch.no_grad():
            assert relative_error(one(x), other(x)) < 1e-5


def test_a_base_that_normalises_first():
    with peft_class("te"):
        stock = made("te", layer=LayerNormLinear(24, 40))
        fused = copy.deepcopy(stock)
        assert [each.path for each in lk.accelerate(fused, strict=True)] == ["delta"]
        x, g = torch.randn(7, 24), torch.randn(7, 40)
        assert_same(*(results(each.base_model.model.lin, x, g) for each in (fused, stock)), 1e-5)
