"""LoRA-Dash in PEFT's layers and in accelerated ones: the same numbers, merged or not, on any base."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters.base_weight import dense_weight
from lora_kernels.training.lora_layer import FusedForward
from tests.conftest import relative_error
from tests.statistics.test_models import quantized
from tests.training.dash_models import BATCHES, adam, dashed, effective, linear, wrapped

BATCH = BATCHES[0]


def step(model, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-5):
    assert relative_error(one[0], other[0]) < tolerance
    assert one[1].keys() == other[1].keys() and sum("coordinates" in name for name in one[1]) == 6
    for name, value in one[1].items():
        if bool(other[1][name].any()):
            assert relative_error(value, other[1][name]) < 20 * tolerance, name
        else:
            assert not bool(value.any()), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 3}},
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_accelerated_is_eager(settings, after):
    models = []
    for accelerated in (False, True):
        model = wrapped(**settings).train()
        if after:
            dashed(model)
        else:
            lk.LoraDash(k=3).attach(model)
        if accelerated:
            assert {each.path for each in lk.accelerate(model, strict=True)} == {"fused"}
        models.append(model)
    stock, fused = models
    assert_same(step(fused), step(stock))
    values = [name for name, value in step(stock)[1].items() if "coordinates" in name and bool(value.any())]
    assert len(values) == (6 if after else 0)
    assert fused.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("kind", ["nf4", "int8_bnb", "int8"])
def test_quantized_bases(kind):
    models = []
    for accelerated in (False, True):
        torch.manual_seed(5)
        model, _run = dashed(wrapped(quantized(kind)))
        if accelerated:
            assert {each.path for each in lk.accelerate(model, strict=True)} == {"delta"}
        models.append(model)
    stock, fused = models
    assert_same(step(fused), step(stock), tolerance=1e-4)
    layer = stock.base_model.model.model.layers[0].self_attn.q_proj
    weight = dense_weight(layer)
    assert weight.shape == (64, 64) and weight.dtype == torch.float32
    s = torch.linalg.svdvals(weight.double())
    dash = layer.lora_dash["default"]
    along = (dash.left * (weight @ dash.right.mT)).sum(0).double()  # u_i^T W v_i is a singular value
    assert all(float((s - each).abs().min()) < 1e-5 * float(s[0]) for each in along)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_verify(dropout):
    model, _run = dashed(wrapped(lora_dropout=dropout).train())
    lk.accelerate(model, strict=True)
    report = lk.verify(model, BATCH)
    assert report.ok and not report.skipped
    for each in report:
        assert set(each.fused) == {"y", "dx", "dA", "dB", "dc"}
        assert all(0 < value < 1e-4 for value in each.stock.values())
    assert "dc: fused / stock" in str(report)
    model = wrapped()
    lk.LoraDash(k=3).attach(model)
    lk.accelerate(model, strict=True)
    report = lk.verify(model, BATCH)
    assert report.ok and all(set(each.fused) == {"y", "dx", "dA", "dB"} for each in report)


def test_verify_finds_a_wrong_extension(monkeypatch):
    from lora_kernels.training import lora_layer

    model, _run = dashed()
    lk.accelerate(model, strict=True)
    real = lora_layer.torch.cat
    monkeypatch.setattr(lora_layer.torch, "cat", lambda parts, dim=0: real((parts[0], 0.99 * parts[1]), dim))
    report = lk.verify(model, BATCH)
    assert not report.ok and max(each.fused["dc"] for each in report) > 1e-3


@pytest.mark.parametrize("scaling", [1.5, 0.0])
@pytest.mark.parametrize("frozen", [(), ("lora_A", "lora_B"), ("lora_A", "lora_B", "lora_dash")])
def test_any_scaling_and_what_is_frozen(scaling, frozen):
    model, layer = linear(bias=True)
    dashed(model, k=4)
    layer.scaling["default"] = scaling
    for name, value in model.named_parameters():
        if any(each in name for each in frozen):
            value.requires_grad_(False)
    x = torch.randn(6, 10).double().requires_grad_(True)
    results = []
    for accelerated in (False, True):
        if accelerated:
            lk.accelerate(model, strict=True, guard=False)
        model.zero_grad()
        x.grad = None
        y = model(x)
        y.sin().sum().backward()
        grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        results.append({"y": y.detach(), "x": x.grad.clone(), **grads})
    stock, fused = results
    assert stock.keys() == fused.keys() and len(stock) == 2 + 3 - len(frozen)
    for name, value in stock.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-10, atol=1e-12)
    assert relative_error(stock["y"], x @ effective(layer).mT + layer.base_layer.bias) < 1e-12


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, accelerated):
    """Before the switch, at it and after it, with dropout: the same as without."""
    results = []
    for checkpointed in (False, True):
        model = wrapped(lora_dropout=0.3).train()
        run = lk.LoraDash(k=3, pre_launch=2).attach(model)
        if accelerated:
            lk.accelerate(model, strict=True)
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = adam(model)
        for number in range(4):
            found = step(model, seed=number)
            optimizer.step()
            run.step(optimizer)
        assert run.launched
        results.append((found, [each.detach().clone() for each in run.coordinates()]))
    assert_same(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert relative_error(one, other) < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_as_one_graph_before_and_after_the_switch(dropout):
    model = wrapped(lora_dropout=dropout).train()
    run = lk.LoraDash(k=3).attach(model)
    lk.accelerate(model, strict=True)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for launched in (False, True):
        if launched:
            run.launch(adam(model), progress=False)
            with torch.no_grad():
                run.directions()["base_model.model.model.layers.0.mlp.down_proj"].coordinates.fill_(0.7)
        for tokens in (6, 17):
            results = []
            for call in (layer, compiled):
                torch.manual_seed(2)
                x = torch.randn(tokens, 40, requires_grad=True)
                torch.manual_seed(9)
                y = call(x)
                y.sin().sum().backward()
                coordinates = layer.lora_dash["default"].coordinates
                results.append(
                    (y.detach(), x.grad, layer.lora_A["default"].weight.grad.clone(), coordinates.grad.clone())
                )
                layer.zero_grad()
            for one, other in zip(*results, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            assert bool(results[0][3].any()) is launched
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 4


def test_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    def made():
        torch.manual_seed(0)
        sizes = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 61}
        config = GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return dashed(wrapped(GPT2LMHeadModel(config), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))[0]

    stock, fused = made(), made()
    lk.accelerate(fused, strict=True)
    layer = stock.base_model.model.transformer.h[0].attn.c_attn
    assert layer.lora_dash["default"].left.shape == (72, 3) and layer.lora_dash["default"].right.shape == (3, 24)
    x = torch.randn(5, 24)
    assert relative_error(layer(x), x.double() @ effective(layer).mT + layer.base_layer.bias) < 1e-5
    assert relative_error(fused.base_model.model.transformer.h[0].attn.c_attn(x), layer(x)) < 1e-5
    expected = layer(x).detach()
    for safe in (False, True):
        stock.merge_adapter(safe_merge=safe)
        assert relative_error(layer(x), expected) < 1e-5
        stock.unmerge_adapter()
    assert relative_error(layer(x), expected) < 1e-5


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_takes_the_coordinates_along(safe, accelerated):
    model, layer = linear(m=14, n=14)
    _, _run = dashed(model, k=4)
    if accelerated:
        lk.accelerate(model)
    model.eval()
    x = torch.randn(6, 14).double()
    expected, weight, plain = model(x), layer.base_layer.weight.detach().clone(), effective(layer)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(layer.base_layer.weight, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), x @ weight.mT, rtol=0, atol=1e-12)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-12)
    assert type(merged[0]) is nn.Linear


def test_a_quantized_base_takes_nothing_up_silently():
    """PEFT's layers for quantized bases hand over the dequantized weight; its plain layer the packed one."""
    torch.manual_seed(5)
    model, _run = dashed(wrapped(quantized("int8_bnb")))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    variant, dense = layer.lora_variant["default"], dense_weight(layer)
    merged = variant.merge_safe(layer, "default", dense)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(merged, dense + delta)
    torch.testing.assert_close(variant.unmerge(layer, "default", merged), dense)
    if type(layer).__name__ == "Linear":
        for safe in (False, True):
            with pytest.raises(ValueError, match="torch.int8 cannot take an adapter up"):
                model.merge_adapter(safe_merge=safe)


def test_several_adapters():
    model, run = dashed()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    first = model(**inputs).logits.detach()
    assert run.launched and len(run.coordinates()) == 6
    model.set_adapter("second")
    assert not any(each.requires_grad for each in run.coordinates())
    second = model(**inputs).logits.detach()
    other = lk.LoraDash(k=2, adapter_name="second").attach(model)
    other.launch(adam(model), progress=False)
    with torch.no_grad():
        for each in other.coordinates():
            each.fill_(0.4)
    changed = model(**inputs).logits.detach()
    assert relative_error(changed, second) > 1e-4
    names = ["default", "second", "__base__", "second"]
    mixed = model(**inputs, adapter_names=names).logits
    with model.disable_adapter():
        base = model(**inputs).logits
    for row, expected in enumerate((first, changed, base, changed)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="must be one of the active adapters .'default', 'second'."):
        lk.LoraDash(k=3).attach(model)
    both = model(**inputs).logits
    lk.accelerate(model, strict=True)
    torch.testing.assert_close(model(**inputs).logits, both, rtol=1e-4, atol=1e-5)
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    torch.testing.assert_close(model(**inputs).logits, first, rtol=1e-4, atol=1e-5)


def test_coordinates_of_a_second_adapter_that_is_not_scaled():
    model, _run = dashed()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    dashed(model, adapter_name="second", k=2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["second"] = 0.0
    x = torch.randn(3, 24)
    expected = layer(x)
    lk.accelerate(model, strict=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert relative_error(x @ effective(layer, "default").float().mT, expected) > 1e-2


def test_conversion_sees_the_coordinates():
    model, layer = linear()
    dashed(model, k=4)
    if hasattr(layer, "supports_lora_conversion"):  # from PEFT 0.19 on
        assert layer.supports_lora_conversion("default")
    delta = effective(layer) - layer.base_layer.weight.double()
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=0, atol=1e-12)


def test_bf16_and_autocast():
    truth = step(dashed()[0].double())
    for accelerated in (False, True):
        model = dashed()[0]
        if accelerated:
            lk.accelerate(model, strict=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(model)
        for name, value in truth[1].items():
            assert relative_error(found[1][name].double(), value) < 0.2, name
    model = dashed()[0].to(torch.bfloat16)
    lk.accelerate(model, strict=True)
    assert lk.verify(model, BATCH).ok


@pytest.mark.parametrize("accelerated", [False, True])
def test_copies_and_pickles(accelerated):
    model, run = dashed()
    if accelerated:
        lk.accelerate(model)
    expected = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(other), expected)
        taken = lk.LoraDash(k=3).attach(other)
        assert taken.launched and not any(
            one is two for one, two in zip(taken.coordinates(), run.coordinates(), strict=True)
        )
        layer = other.base_model.model.model.layers[0].self_attn.q_proj
        before = layer.get_delta_weight("default")
        with torch.no_grad():
            layer.lora_dash["default"].coordinates.mul_(2.0)
        assert not torch.equal(layer.get_delta_weight("default"), before)
    assert_same(step(model), expected)
    if accelerated:
        assert lk.restore(model) == 6 and not any(isinstance(each, FusedForward) for each in model.modules())
        assert_same(step(model), expected)


def test_detach_gives_plain_lora_back():
    plain, model = wrapped(), wrapped()
    run = lk.LoraDash(k=3).attach(model)
    run.detach()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model.peft_config["default"]) is LoraConfig
    layer, other = (each.base_model.model.model.layers[0].self_attn.q_proj for each in (model, plain))
    assert layer.adapter_layer_names == other.adapter_layer_names and not layer.lora_variant
    assert layer.__dict__.keys() - {"adapter_layer_names"} == other.__dict__.keys()
    assert not model._ddp_params_and_buffers_to_ignore
    one, two = (each(**BATCH).logits for each in (model, plain))
    assert torch.equal(one, two)
    model, run = dashed(model)
    with pytest.raises(ValueError, match="6 layers have coordinates that are not zero"):
        run.detach()
    run.detach(force=True)
    assert torch.equal(model(**BATCH).logits, two)


def test_training_over_the_switch_is_pefts():
    results = []
    for accelerated in (False, True):
        model = wrapped().train()
        run = lk.LoraDash(k=3, pre_launch=3).attach(model)
        if accelerated:
            lk.accelerate(model, strict=True)
        optimizer = adam(model, lr=1e-3)
        for _ in range(6):
            step(model)
            optimizer.step()
            run.step(optimizer)
        results.append(step(model))
    assert_same(results[1], results[0], tolerance=1e-4)
