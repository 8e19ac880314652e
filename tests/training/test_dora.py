"""DoRA's norms, and its forward and backward built from two callables, against PEFT's layer."""

import copy

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from torch import nn
from torch.nn.functional import linear

import lora_kernels as lk
from lora_kernels.adapters.base_weight import dense_weight
from lora_kernels.ops import _ext, use_backend
from lora_kernels.training import dora
from tests.conftest import relative_error
from tests.helpers.quantized import bitsandbytes_linear


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.lin = layer

    def forward(self, x):
        return self.lin(x)


def dora_layer(base=None, dtype=torch.float32, dropout=0.0, bias=True, **changes):
    torch.manual_seed(0)
    base = nn.Linear(12, 20, bias=bias) if base is None else base
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["lin"],
        "use_dora": True,
        "lora_dropout": dropout,
        **changes,
    }
    layer = get_peft_model(Net(base), LoraConfig(**settings)).base_model.model.lin
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 0.3)
        layer.lora_magnitude_vector["default"].weight.mul_(1 + 0.3 * torch.rand(layer.out_features))
    return layer.to(dtype)


def parts(layer):
    magnitudes = layer.lora_magnitude_vector["default"].weight
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"], magnitudes


def ours(layer, x):
    """DoRA as a fused layer composes it."""
    a, b, s, m = parts(layer)
    base, norms = layer.get_base_layer(), dora.norms(layer, "default")
    weight = base.weight.mT if layer.fan_in_fan_out else base.weight

    def product(z):
        return linear(z, weight) + s * linear(linear(z, a), b)

    dropout = layer.lora_dropout["default"]
    if layer.training and isinstance(dropout, nn.Dropout):
        dropped = dropout(x)
        return dora.rescaled(product(dropped), m, norms, outer=base(x - dropped))
    return dora.rescaled(product(x), m, norms, outer=base.bias)


def results(function, layer, x, g, seed=5):
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    y = function(layer, x) if function is ours else layer(x)
    y.backward(g)
    grads = {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_output_and_gradients_are_pefts(dtype, dropout, bias):
    layer = dora_layer(dtype=dtype, dropout=dropout, bias=bias)
    if bias:
        layer.base_layer.bias.requires_grad_(True)
    x, g = torch.randn(2, 7, 12, dtype=dtype), torch.randn(2, 7, 20, dtype=dtype)
    mine, theirs = (results(function, layer, x, g) for function in (ours, None))
    # The norm's own dtype is at least float32 here; PEFT rounds W + s B A to that of the input.
    truth = results(None, copy.deepcopy(layer).double(), x.double(), g.double()) if dropout == 0 else theirs
    assert mine.keys() == theirs.keys() == truth.keys() and len(mine) == 5 + bias
    for name, value in mine.items():
        assert value.dtype == dtype and relative_error(value, truth[name]) < TOLERANCES[dtype], name
        assert relative_error(2 * value, truth[name]) > 0.5, name


def test_no_less_accurate_than_peft_in_bfloat16():
    """With float32 adapters, as PEFT keeps them: magnitudes are not rounded to the dtype of the activations."""
    layer = dora_layer(nn.Linear(128, 96))
    layer.base_layer.to(torch.bfloat16)
    x, g = torch.randn(300, 128).bfloat16(), torch.randn(300, 96).bfloat16()

    def fused(layer, z):
        a, b, s, m = parts(layer)
        low = s * linear(linear(z.float(), a), b)
        product = (linear(z.float(), layer.base_layer.weight.float()) + low).to(z.dtype)  # one rounding, as the op's
        return dora.rescaled(product, m, dora.norms(layer, "default"), outer=layer.base_layer.bias)

    truth = results(None, copy.deepcopy(layer).double(), x.double(), g.double())
    torch.manual_seed(5)
    layer.zero_grad()
    inputs = x.clone().requires_grad_(True)
    y = fused(layer, inputs)
    y.backward(g)
    mine = {"y": y.detach(), "x": inputs.grad, **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}
    theirs = results(None, layer, x, g)
    for name, value in mine.items():
        error, stock = relative_error(value.double(), truth[name]), relative_error(theirs[name].double(), truth[name])
        assert error < max(2 * stock, 2**-9), (name, error, stock)


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize(
    ("inner", "outer"), [(False, False), (True, False), (True, True), (False, True), (True, "full")]
)
def test_every_form_of_the_rescaling(rows, inner, outer, monkeypatch):
    monkeypatch.setattr(dora, "_SCALE_BLOCK", 70 // torch.get_num_threads())  # blocks of 7 rows
    torch.manual_seed(1)
    double = {"dtype": torch.float64, "requires_grad": True}
    product, m = torch.randn(rows, 10, **double), torch.randn(10, **double)
    norms = torch.rand(10, dtype=torch.float64) + 0.5
    inner = torch.randn(10, **double) if inner else None
    outer = torch.randn(rows if outer == "full" else 1, 10, **double) if outer else None
    if outer is not None and outer.shape[0] == 1 and rows != 1:
        outer = outer.detach()[0].clone().requires_grad_(True)

    def function(product, m, inner, outer):
        return dora.rescaled(product, m, norms, inner=inner, outer=outer)

    truth = (product - (0 if inner is None else inner)) * (m / norms) + (0 if outer is None else outer)
    torch.testing.assert_close(function(product, m, inner, outer), truth)
    if rows:
        assert torch.autograd.gradcheck(function, (product, m, inner, outer))
        assert torch.autograd.gradgradcheck(function, (product, m, inner, outer))
    if rows == 40 and outer is not None and outer.dim() == 1:  # narrow products, in blocks
        half = function(product.detach().bfloat16(), m.detach().float(), None, outer.detach().float())
        assert half.dtype == torch.bfloat16
        assert relative_error(half.double(), (product * (m / norms) + outer).detach()) < 2**-8


def test_frozen_magnitudes_and_vmap():
    product, m, norms = torch.randn(5, 4, requires_grad=True), torch.rand(4), torch.rand(4) + 1
    dora.rescaled(product, m, norms).sum().backward()
    torch.testing.assert_close(product.grad, (m / norms).expand(5, 4))
    found = torch.func.vmap(lambda each: dora.rescaled(each, m, norms, outer=m))(product)
    torch.testing.assert_close(found, product * (m / norms) + m)


@pytest.mark.parametrize("block", [2**18, 50, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_norms(dtype, block, monkeypatch):
    monkeypatch.setattr("lora_kernels.adapters.dora.NORM_BLOCK", block)
    torch.manual_seed(2)
    weight, a, b = torch.randn(33, 17).to(dtype), torch.randn(4, 17).to(dtype), torch.randn(33, 4).to(dtype)
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for source in (weight, weight.mT.contiguous().mT, iter(weight.float().split(5))):
            found = dora.row_norms(source, a, b, 0.7)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert relative_error(found.double(), truth) < 1e-6
        for scaling in (numpy.float32(0.7), torch.tensor(0.7)):
            assert relative_error(dora.row_norms(weight, a, b, scaling).double(), truth) < 1e-6


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 47), (8, 48), (33, 97), (20, 200), (0, 5), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_row_norms(rank, rows, columns, dtype):
    torch.manual_seed(4)
    weight = torch.randn(rows, columns + 3).to(dtype)[:, :columns]  # its rows are not beside each other
    a, b = torch.randn(rank, columns), torch.randn(rows, rank).mT.contiguous().mT
    found = dora.row_norms(weight, a, b, 0.7)
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=2e-6 if rank < 16 else 4e-6, atol=0)


def test_the_extension_reads_dense_rows_of_two_dtypes_where_its_backend_may_run():
    rows = torch.randn(4, 6)
    assert dora.extension_for(rows, rows.bfloat16()[:, :3]) is _ext.load()[0]
    for other in (rows.mT, rows.half(), rows.double(), torch.empty(4, 6, device="meta")):
        assert dora.extension_for(rows, other) is None
    with use_backend("torch"):
        assert dora.extension_for(rows) is None


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 15), (33, 16), (70, 53), (200, 130), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", ["both", "product", "magnitudes"])
def test_gradients_of_the_rescaling(inner, rows, columns, dtype, needed, monkeypatch):
    torch.manual_seed(5)
    product, g = torch.randn(2, rows, columns).to(dtype), torch.randn(2, rows, columns + 5).to(dtype)[..., :columns]
    m, norms = torch.rand(columns) + 0.5, torch.rand(columns) + 0.5
    shift = torch.randn(columns) if inner else None
    asked = {"both": (True, True), "product": (True, False), "magnitudes": (False, True)}[needed]

    def gradients(dtype=None):
        pair = [
            each.to(dtype or each.dtype).requires_grad_(need) for each, need in zip((product, m), asked, strict=True)
        ]
        wide = None if shift is None else shift.to(dtype or shift.dtype)
        y = dora.rescaled(*pair, norms.to(dtype or norms.dtype), inner=wide)
        return torch.autograd.grad(y, [each for each in pair if each.requires_grad], g.to(y.dtype))

    compiled, truth = gradients(), gradients(torch.float64)
    monkeypatch.setattr(dora, "extension_for", lambda *_: None)
    for one, other, exact in zip(compiled, gradients(), truth, strict=True):
        assert one.dtype == other.dtype
        allowed = max(2 * relative_error(other.double(), exact), 1e-6) if exact.numel() else 0
        assert not exact.numel() or relative_error(one.double(), exact) <= allowed


def test_rows_that_nearly_cancel():
    """The sum of the three terms of the square is off by more than the norm here."""
    torch.manual_seed(3)
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    weight = -(b @ a) * (1 + 1e-5 * torch.randn(32, 64))
    truth = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    assert relative_error(dora.row_norms(weight, a, b, 1.0).double(), truth) < 0.02
    squares = weight.norm(dim=1) ** 2 + 2 * ((weight @ a.mT) * b).sum(1) + ((b @ (a @ a.mT)) * b).sum(1)
    assert not relative_error(squares.sqrt().double(), truth) < 0.02


def test_rows_of_zero_norm_are_refused_and_never_divided_by():
    layer = dora_layer(bias=False)
    with torch.no_grad():
        for row in (3, 11):
            layer.base_layer.weight[row] = 0
            layer.lora_B["default"].weight[row] = 0
    assert layer(torch.randn(2, 12)).isnan().any()  # PEFT
    with pytest.raises(ValueError, match=r"2 of layer of shape \(20, 12\) are zero \(rows 3, 11\)"):
        dora.norms(layer, "default")
    with pytest.raises(ValueError, match=r"2 of layer a\.lin are zero .* leave the layer out of target_modules"):
        dora.check(layer, "default", "a.lin")
    a, b, s, m = parts(layer)
    norms = dora._guarded(dora.row_norms(layer.base_layer.weight, a, b, s))  # where nobody can wait
    y = dora.rescaled(torch.randn(2, 20), m, norms)
    y.sum().backward()
    assert y.isfinite().all() and (y[:, [3, 11]] == 0).all() and m.grad.isfinite().all()


@pytest.mark.parametrize("square", [False, True])
def test_conv1d(square):
    from transformers.pytorch_utils import Conv1D

    layer = dora_layer(Conv1D(20, 20 if square else 12), fan_in_fan_out=True)
    x = torch.randn(5, 20 if square else 12)
    assert relative_error(ours(layer, x), layer(x)) < 2e-6


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bases_that_compute_their_own_product(kind, dropout):
    base = bitsandbytes_linear(kind, 128, 20)
    base(torch.randn(2, 128))
    model = Net(base)
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind != "int8"
    torch.manual_seed(0)
    layer = get_peft_model(
        model, LoraConfig(r=3, target_modules=["lin"], use_dora=True, lora_dropout=dropout)
    ).base_model.model.lin
    assert type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    if kind == "int8":  # PEFT has read its weight, after which it would look for its scales in the wrong place
        base.weight.CB = None
    nn.init.normal_(layer.lora_B["default"].weight, 0, 0.3)
    a, b, s, m = parts(layer)
    x = torch.randn(6, 128)
    norms = dora.norms(layer, "default")
    layer.train()

    def fused(z):
        return base(z) + s * linear(linear(z, a), b)

    torch.manual_seed(4)
    if dropout:
        dropped = layer.lora_dropout["default"](x)
        found = dora.rescaled(fused(dropped), m, norms, inner=base.bias, outer=base(x - dropped))
    else:
        found = dora.rescaled(fused(x), m, norms, inner=base.bias, outer=base.bias)
    torch.manual_seed(4)
    weight, dropped = dense_weight(layer), layer.lora_dropout["default"](x)
    c = m / torch.linalg.vector_norm(weight + s * b @ a, dim=1)
    truth = linear(x, weight, base.bias) + (c - 1) * linear(dropped, weight) + c * s * linear(linear(dropped, a), b)
    assert relative_error(found.detach(), truth.detach()) < 1e-5
    if kind != "int8":  # which PEFT's DoRA cannot run on a CPU
        torch.manual_seed(4)
        assert relative_error(found.detach(), layer(x).detach()) < 1e-5
    base(x)  # the layer still runs after its weight was read


def calls_of_row_norms(monkeypatch):
    calls, inner = [], dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or inner(*args))
    return calls


def test_norms_are_kept_where_peft_keeps_them(monkeypatch):
    calls = calls_of_row_norms(monkeypatch)
    layer = dora_layer().eval()
    a, b, s, m = parts(layer)

    def count():
        found, before = dora.norms(layer, "default"), len(calls)
        truth = torch.linalg.vector_norm(layer.base_layer.weight + layer.scaling["default"] * b @ a, dim=1)
        assert relative_error(found, truth.detach()) < 1e-6
        return before

    assert [count(), count()] == [1, 2]
    with DoraCaching():
        assert [count(), count(), count()] == [3, 3, 3]
        for change in (
            lambda: a.mul_(1.1),
            lambda: b.mul_(1.1),
            lambda: layer.base_layer.weight.mul_(1.1),
            lambda: layer.scaling.update(default=0.3),
            lambda: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(20, 12))),
            lambda: setattr(b, "data", b.data * 1.1),
        ):
            before = len(calls)
            with torch.no_grad():
                change()
            assert [count(), count()] == [before + 1] * 2
        layer(torch.randn(2, 12))  # PEFT's own entries are beside ours
        before = len(calls)
        assert count() == before
        layer.train()
        assert [count(), count()] == [before + 1, before + 2]
    with DoraCaching():
        dora.norms(layer.eval(), "default")
    before = len(calls)
    assert count() == before + 1  # no longer asked for


def test_compiled():
    layer = dora_layer(dropout=0.0)
    x, g = torch.randn(6, 12), torch.randn(6, 20)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    layer.zero_grad()
    y = compiled(layer, x)
    y.backward(g)
    grads = {name: each.grad.clone() for name, each in layer.named_parameters() if each.grad is not None}
    truth = results(None, layer, x, g)
    assert relative_error(y, truth["y"]) < 2e-6 and len(grads) == 3
    for name, value in grads.items():
        assert relative_error(value, truth[name]) < 5e-6, name


def test_nothing_is_kept_in_a_graph():
    layer, x = dora_layer().eval(), torch.randn(6, 12)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with DoraCaching(), torch.no_grad():
        for _ in range(2):
            layer.lora_B["default"].weight.mul_(2)
            layer.lora_magnitude_vector["default"]._cache_clear()  # PEFT's own is stale
            assert relative_error(compiled(layer, x), layer(x)) < 2e-6


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(64, 48), (1000, 1000)], ids=str)
def test_a_new_adapter_changes_no_bit(shape, dropout):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    x = torch.randn(10, shape[0])
    expected = base(x)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], use_dora=True, lora_dropout=dropout)).eval()
    lk.accelerate(model, strict=True)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("trained", [False, True])
def test_an_accelerated_layer_with_a_bias_and_other_magnitudes(trained):
    stock = dora_layer()
    stock.get_base_layer().bias.requires_grad_(trained)
    fused = copy.deepcopy(stock)
    lk.accelerate(fused, strict=True)
    results = []
    for layer in (stock, fused):
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        learned = [x, *(value for value in layer.parameters() if value.requires_grad)]
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), learned)])
    assert len(results[0]) == 5 + trained
    for expected, value in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-5
