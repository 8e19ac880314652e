"""Accelerated layers against PEFT's own: the same numbers, the same files, the same habits."""

import copy
import pickle
import warnings
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from torch._dynamo import compiled_autograd

import lora_kernels as lk
from lora_kernels.ops import _ext
from lora_kernels.training import lora_layer
from lora_kernels.training.lora_layer import FusedForward
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama
from tests.statistics.test_models import quantized

BATCH = padded(samples(), 4)[0]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def wrapped(base=None, **changes):
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changes}
    model = get_peft_model(tiny_llama() if base is None else base, LoraConfig(**settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
    return model


def step(model, batch=BATCH, seed=None):
    """Loss and gradients of one step."""
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), found


def assert_same(one, other, tolerance=1e-5):
    assert relative_error(one[0], other[0]) < tolerance
    assert one[1].keys() == other[1].keys() and one[1]
    for name, value in one[1].items():
        assert relative_error(value, other[1][name]) < 20 * tolerance, name


def paths(report):
    return {each.path for each in report}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"lora_bias": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 1, "down_proj": 5}, "alpha_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_same_loss_and_gradients_as_peft(settings):
    stock, fused = wrapped(**settings), wrapped(**settings)
    report = lk.accelerate(fused, strict=True)
    assert paths(report) == {"fused"} and all(isinstance(fused.get_submodule(each.name), Linear) for each in report)
    assert_same(step(fused), step(stock))
    assert fused.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("kind", ["nf4", "int8_bnb", "int8"])
def test_quantized_bases_keep_their_own_product(kind):
    torch.manual_seed(5)
    stock, fused = wrapped(quantized(kind)), wrapped(quantized(kind))
    assert paths(lk.accelerate(fused, strict=True)) == {"delta"}
    assert_same(step(fused), step(stock), tolerance=1e-4)


def test_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    def made():
        torch.manual_seed(0)
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 61}
        config = GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return wrapped(GPT2LMHeadModel(config), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)

    stock, fused = made(), made()
    assert paths(lk.accelerate(fused)) == {"delta"}
    assert_same(step(fused), step(stock))


def test_biases_and_any_leading_sizes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(7, 9), nn.Linear(9, 5)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    base = Net()
    stock = wrapped(copy.deepcopy(base), target_modules=["one", "two"])
    fused = wrapped(copy.deepcopy(base), target_modules=["one", "two"])
    for each in (stock, fused):
        each.base_model.model.two.base_layer.bias.requires_grad_(True)
        each.base_model.model.two.base_layer.weight.requires_grad_(True)
    lk.accelerate(fused, strict=True)
    for shape in ((7,), (0, 7), (3, 7), (2, 3, 4, 7)):
        x = torch.randn(shape)
        results = []
        for model in (stock, fused):
            model.zero_grad()
            inputs = x.clone().requires_grad_(True)
            y = model(inputs)
            y.square().sum().backward()
            grads = [each.grad for each in model.parameters() if each.grad is not None]
            results.append([y.detach(), inputs.grad, *grads])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_several_adapters_and_the_frozen_start():
    def made():
        model = wrapped(lora_dropout=0.0)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        return model

    torch.manual_seed(1)
    stock = made()
    torch.manual_seed(1)
    fused = made()
    fused.load_state_dict(stock.state_dict())
    lk.accelerate(fused)
    assert_same(step(fused), step(stock))

    stock = wrapped(tiny_llama(hidden_size=48, intermediate_size=80))
    lk.initialize(stock, method="pissa", force=True)
    fused = copy.deepcopy(stock)
    assert paths(lk.accelerate(fused, strict=True)) == {"fused"}
    assert_same(step(fused), step(stock), tolerance=1e-4)


def test_habits_of_peft_stay(tmp_path):
    stock, fused = wrapped(), wrapped()
    for model in (stock, fused):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fused.load_state_dict(stock.state_dict())
    lk.accelerate(fused)
    stock.eval(), fused.eval()
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}

    def same(**more):
        with torch.no_grad():
            torch.testing.assert_close(
                fused(**inputs, **more).logits, stock(**inputs, **more).logits, rtol=1e-4, atol=1e-5
            )

    same()
    same(adapter_names=["default", "second", "__base__", "default"])
    with stock.disable_adapter(), fused.disable_adapter():
        same()
    for model in (stock, fused):
        model.merge_adapter()
    same()
    for model in (stock, fused):
        model.unmerge_adapter()
    same()
    for model in (stock, fused):
        model.set_adapter("second")
    same()
    for model in (stock, fused):
        model.set_adapter("default")
        for module in model.modules():
            if isinstance(module, Linear):
                module.set_scale("default", 0.3)
    same()
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not any(isinstance(each, FusedForward) for each in loaded.modules())
    assert lk.restore(fused) == 6 and lk.restore(fused) == 0
    assert {type(each) for each in fused.modules() if hasattr(each, "lora_A")} == {Linear}
    same()


def dora(**changes):
    """DoRA with magnitudes that are not those of the start."""
    model = wrapped(use_dora=True, **changes)
    torch.manual_seed(7)
    for name, value in model.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.3 * torch.rand_like(value)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 8}, {"target_modules": "all-linear"}])
def test_dora(settings):
    stock, fused = dora(**settings), dora(**settings)
    assert paths(lk.accelerate(fused, strict=True)) == {"fused"}
    for _ in range(2):
        mine, yours = step(fused), step(stock)
        assert sum("magnitude" in name for name in mine[1]) >= 6
        assert_same(mine, yours)
        for model in (stock, fused):
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if "lora_" in name:
                        value.mul_(1.01)
    report = lk.verify(fused, BATCH)
    assert report.ok and all("dm" in each.fused for each in report)


def test_dora_with_bias_and_in_half_precision():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9))
    stock, fused = (wrapped(copy.deepcopy(base), target_modules=["0"], use_dora=True) for _ in range(2))
    lk.accelerate(fused, strict=True)
    x = torch.randn(5, 7)
    assert torch.allclose(fused(x), stock(x), atol=1e-6)
    stock.to(torch.bfloat16), fused.to(torch.bfloat16)
    assert relative_error(fused(x.bfloat16()), stock(x.bfloat16())) < 2e-2


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_dora_with_dropout_and_on_quantized_bases(kind):
    # In training: in evaluation mode bitsandbytes may pack NF4 weights for inference.
    for dropout in (0.0, 0.1):
        torch.manual_seed(5)
        stock = dora(base=quantized(kind) if kind else None, lora_dropout=dropout).train()
        torch.manual_seed(5)
        fused = dora(base=quantized(kind) if kind else None, lora_dropout=dropout).train()
        assert paths(lk.accelerate(fused, strict=True)) == {"delta" if kind else "fused"}
        assert_same(step(fused, seed=1), step(stock, seed=1), 1e-4 if kind else 1e-5)  # torch's own dropout
        assert lk.verify(fused, BATCH).ok


def test_dora_on_rows_of_zeros_is_refused():
    model = dora()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
        layer.lora_B["default"].weight[3] = 0
    with pytest.raises(ValueError, match=r"norms of the rows.*layers.1.self_attn.q_proj are zero .rows 3."):
        lk.accelerate(model)


def test_another_variant_beside_dora_runs_peft():
    model = dora()
    for layer in (each for each in model.modules() if hasattr(each, "lora_B")):
        layer.lora_B["default"].bias = nn.Parameter(torch.zeros(layer.out_features))
    with pytest.warns(RuntimeWarning, match="DoRA with a bias of its own"):
        assert paths(lk.accelerate(model)) == {"eager"}
    model = dora()
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    with pytest.warns(RuntimeWarning, match="beside other adapters"):
        assert paths(lk.accelerate(model)) == {"eager"}


def test_embeddings_are_reported():
    with pytest.warns(RuntimeWarning, match="no fused form of Embedding"):
        report = lk.accelerate(wrapped(target_modules=["q_proj", "embed_tokens"]))
    assert sorted({(each.kind, each.path) for each in report}) == [("Embedding", "eager"), ("Linear", "fused")]


def test_hooks_on_the_base_layer_are_called():
    model, seen = wrapped(), []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    report = lk.accelerate(model)
    assert report.layers[0].path == "delta"
    assert_same(step(model), step(wrapped()))
    assert len(seen) == 1


def test_dropout_follows_torchs_generator_and_keeps_the_mean():
    model = wrapped(lora_dropout=0.3).train()
    lk.accelerate(model, strict=True)
    first, again, other = step(model, seed=1), step(model, seed=1), step(model, seed=2)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    for name, value in first[1].items():
        assert torch.equal(value, again[1][name])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 24)
    with torch.no_grad():
        mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
        model.eval()
        assert relative_error(mean - layer.base_layer(x), layer(x) - layer.base_layer(x)) < 0.06


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_drops_the_same_elements_again(reentrant):
    plain, checkpointed = wrapped(lora_dropout=0.3).train(), wrapped(lora_dropout=0.3).train()
    for each in (plain, checkpointed):
        lk.accelerate(each, strict=True)
        each.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(step(checkpointed, seed=4), step(plain, seed=4))


def test_bytes_saved_for_the_backward_pass():
    def saved(model):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**BATCH).loss
        known = {each.untyped_storage()._cdata for each in model.parameters()}
        del loss
        return sum(size for storage, size in kept.items() if storage not in known)

    base, stock, fused = tiny_llama().train(), wrapped(lora_dropout=0.05), wrapped(lora_dropout=0.05)
    base.requires_grad_(False)
    base.enable_input_require_grads()
    for each in (stock, fused):
        each.enable_input_require_grads()
        each.train()
    lk.accelerate(fused, strict=True)
    own, peft, ours = saved(base), saved(stock), saved(fused)
    assert ours - own < 0.6 * (peft - own)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_as_one_graph_for_any_number_of_tokens(dropout):
    model = wrapped(lora_dropout=dropout).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    lk.accelerate(model, strict=True)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (6, 17, 33):
        results = []
        for run in (layer, compiled):
            torch.manual_seed(2)
            x = torch.randn(tokens, 40, requires_grad=True)
            torch.manual_seed(9)
            y = run(x)
            y.sin().sum().backward()
            results.append((y.detach(), x.grad, layer.lora_A["default"].weight.grad.clone()))
            layer.zero_grad()
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2


@pytest.mark.skipif(not hasattr(compiled_autograd, "_enable"), reason="another interface in this version of torch")
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_backward_passes_that_are_compiled(settings):
    model = wrapped(target_modules=["down_proj"], **settings).train()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    lk.accelerate(model, strict=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for context in (nullcontext(), compiled_autograd._enable(torch.compile(backend="aot_eager"))):
        torch.manual_seed(2)
        x = torch.randn(6, 40, requires_grad=True)
        with context:
            layer(x).sin().sum().backward()
        results.append((x.grad, *(value.grad for value in layer.parameters() if value.grad is not None)))
        layer.zero_grad()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(results[0]) == len(results[1]) >= 3
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_double_backward_in_reference_mode():
    model = wrapped(target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    lk.accelerate(model)
    x = torch.randn(3, 40, requires_grad=True)
    with lk.training.reference_mode(model):
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert x.grad.abs().max() > 0 and layer.fused
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()


def test_autocast_and_half_precision_are_as_accurate_as_peft():
    truth = step(wrapped(tiny_llama(torch.float64)))
    errors = []
    for accelerated in (False, True):
        model = wrapped()
        if accelerated:
            lk.accelerate(model, strict=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(model)
        errors.append([float(relative_error(found[1][name].double(), value)) for name, value in truth[1].items()])
    for stock, fused in zip(*errors, strict=True):
        assert fused < 2 * stock


def test_copies_and_pickles():
    model = wrapped()
    lk.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert sum(isinstance(each, FusedForward) for each in other.modules()) == 6
        assert_same(step(other), step(wrapped()))
        assert lk.restore(other) == 6


def test_the_first_backward_pass_is_watched():
    def dead():
        model = wrapped()
        with torch.no_grad():
            for name in ("lora_A", "lora_B"):
                getattr(model.base_model.model.model.layers[1].mlp.down_proj, name)["default"].weight.zero_()
        return model

    model = dead()
    lk.accelerate(model)
    with pytest.warns(
        RuntimeWarning, match=r"1 of 6 adapters learn nothing .*layers.1.mlp.down_proj.*gradients are zero"
    ):
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        step(model)  # it looks once
        fresh = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=TARGETS))  # B = 0 is no fault
        lk.accelerate(fresh)
        step(fresh)
        model = dead()
        lk.accelerate(model, guard=False)
        step(model)
    model = dead()
    lk.accelerate(model, strict=True)
    with pytest.raises(RuntimeError, match="learn nothing"):
        step(model)
    model = wrapped()
    lk.accelerate(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="gradients are not finite"):
        step(model)


def test_training_gives_the_same_loss_curve():
    curves = []
    for accelerated in (False, True):
        model = wrapped().train()
        if accelerated:
            lk.accelerate(model, strict=True)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
        losses = []
        for number in range(24):
            optimizer.zero_grad()
            loss = model(**padded(samples(), 4)[number % 2]).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] - 0.02
    assert max(abs(one - other) for one, other in zip(*curves, strict=True)) < 1e-4


def test_errors():
    with pytest.raises(ValueError, match="no LoRA layer"):
        lk.accelerate(tiny_llama())


def two_adapters(change):
    """PEFT's model and ours with two active adapters; `change` is made to a layer's modules."""
    models = []
    for _ in range(2):
        model = wrapped(lora_dropout=0.5)
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=TARGETS, lora_dropout=0.5))
        model.base_model.set_adapter(["default", "second"])
        torch.manual_seed(11)
        for name, value in model.named_parameters():
            if ".second." in name:
                nn.init.normal_(value.detach(), std=0.1)
        for module in model.modules():
            if "second" in getattr(module, "lora_A", {}):
                change(module)
        models.append(model)
    lk.accelerate(models[1], guard=False)
    return models


def only_b(module):
    module.lora_A["second"].weight.requires_grad_(False)


def test_an_adapter_of_which_one_factor_is_trained_is_no_frozen_one():
    stock, fused = two_adapters(only_b)
    stock.eval(), fused.eval()
    mine, yours = step(fused), step(stock)
    assert any("lora_B.second" in name for name in mine[1])
    assert_same(mine, yours)


def test_a_frozen_adapter_keeps_its_dropout():
    def freeze(module):
        module.lora_A["second"].requires_grad_(False)
        module.lora_B["second"].requires_grad_(False)

    _, fused = two_adapters(freeze)
    fused.train()
    torch.manual_seed(0)
    losses = {float(fused(**BATCH).loss) for _ in range(3)}
    for module in fused.modules():
        if "second" in getattr(module, "lora_A", {}):
            module.lora_dropout["default"] = nn.Identity()
    losses_of_second_alone = {float(fused(**BATCH).loss) for _ in range(3)}
    assert len(losses) == 3 and len(losses_of_second_alone) == 3


def test_a_dropout_of_another_kind_runs_peft():
    model = wrapped()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.AlphaDropout(0.2)
    with pytest.warns(RuntimeWarning, match="AlphaDropout"):
        assert paths(lk.accelerate(model)) == {"eager"}


def test_bias_and_dtype_where_the_base_makes_its_own_product():
    def cast(_module, _args, output):
        return output.double()

    models = []
    for _ in range(2):
        model = wrapped(lora_bias=True)
        model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS, lora_bias=True))
        model.base_model.set_adapter(["default", "second"])
        torch.manual_seed(11)
        for name, value in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(value.detach(), std=0.1)
        models.append(model.base_model.model.model.layers[0].self_attn.q_proj)
    stock, fused = models
    lk.accelerate(fused, guard=False)
    x = torch.randn(5, stock.in_features)
    assert torch.allclose(fused(x), stock(x), atol=1e-5)
    for layer in models:
        layer.base_layer.register_forward_hook(cast)
    assert fused(x).dtype == stock(x).dtype == torch.float64
    assert torch.allclose(fused(x), stock(x), atol=1e-5)


def one_layer(**settings):
    """An accelerated layer that was called before, and an input."""
    lora_layer.warn_once.cache_clear()
    torch.manual_seed(0)
    model = wrapped(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], r=2, **settings)
    lk.accelerate(model, strict=True, guard=False)
    x = torch.randn(3, 6)
    model(x)
    return model, model.base_model.model[0], x


def assert_pefts(model, x, before):
    """The first call after a change gives what PEFT's forward gives, and not what was there before."""
    y = model(x)
    with lk.training.reference_mode(model):
        torch.testing.assert_close(y, model(x))
    assert relative_error(y, before) > 0.1


def test_a_replaced_magnitude_is_seen():
    model, layer, x = one_layer(use_dora=True)
    before, holder = model(x), layer.lora_magnitude_vector["default"]
    holder.weight = nn.Parameter(3 * holder.weight.detach())
    assert_pefts(model, x, before)
    layer.lora_magnitude_vector["default"] = copy.deepcopy(holder)
    layer.lora_magnitude_vector["default"].weight.data *= 2
    assert_pefts(model, x, before)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 7


@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
def test_another_class_of_a_part_is_seen(part):
    model, layer, x = one_layer()
    before, module = model(x), layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
    module.__class__ = Shifted
    if part == "base_layer":
        assert_pefts(model, x, before)
    else:
        with pytest.warns(RuntimeWarning, match="no plain linear layers"):
            assert_pefts(model, x, before)


def test_a_forward_put_into_pefts_class_is_called(monkeypatch):
    model, _layer, x = one_layer()
    before, real = model(x), Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: real(self, x, *args, **kwargs) + 1)
    with pytest.warns(RuntimeWarning, match="forward of PEFT's Linear is replaced"):
        assert torch.equal(model(x), real(_layer, x) + 1)
    assert torch.allclose(model(x), before + 1)
    report = lk.accelerate(model, guard=False)
    assert paths(report) == {"eager"} and "is replaced" in report.layers[0].reason


def test_sizes_changed_behind_the_layers_back_are_refused():
    model, layer, x = one_layer()
    layer.base_layer.weight.data, layer.base_layer.bias.data = torch.randn(4, 6), torch.randn(4)
    with pytest.raises(ValueError, match=r"factors have shapes .2, 6. and .5, 2."):
        model(x)
    model, layer, x = one_layer()
    y = model(x.requires_grad_())
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.randn(1, 6), torch.randn(5, 1)
    with pytest.raises(ValueError, match=r"factors have shapes .1, 6. and .5, 1."):
        y.sum().backward()


def test_batched_gradients_are_refused_and_zeros_without_memory_taken():
    model, _layer, x = one_layer()
    with pytest.raises(RuntimeError, match="batched gradients.*reference_mode"):
        torch.autograd.functional.jacobian(model, x, vectorize=True)
    with lk.training.reference_mode():
        assert torch.autograd.functional.jacobian(model, x, vectorize=True).shape == (3, 5, 3, 6)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(model(x), x, torch._efficientzerotensor((3, 5)))
    assert not bool(dx.any())


def _hook(where):
    def change(_model, layer):
        layer.get_submodule(where).register_forward_hook(lambda _module, _args, output: output + 1)

    return change


def _own_forward(where):
    def change(_model, layer):
        module = layer.get_submodule(where)
        real = module.forward
        module.forward = lambda x: real(x) + 1

    return change


def _second_adapter(model, _layer):
    model.set_adapter("second")


def _dropout_in_evaluation(_model, layer):
    layer.lora_dropout["default"].eval()


def _no_dropout(_model, layer):
    layer.lora_dropout["default"].p = 0.0


def _other_variant(_model, layer):
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(layer.out_features))


CHANGES = {
    **{f"hook {where}": _hook(where) for where in ("base_layer", "lora_A.default", "lora_B.default")},
    **{f"forward {where}": _own_forward(where) for where in ("base_layer", "lora_A.default", "lora_B.default")},
    "hook dropout": _hook("lora_dropout.default"),
    "forward dropout": _own_forward("lora_dropout.default"),
    "scaling": lambda _model, layer: layer.set_scale("default", 5.0),
    "scaling, replaced": lambda _model, layer: setattr(layer, "scaling", {**layer.scaling, "default": 9.0}),
    "active adapter": _second_adapter,
    "disabled": lambda _model, layer: layer.enable_adapters(False),
    "factor": lambda _model, layer: setattr(layer.lora_A["default"], "weight", nn.Parameter(torch.randn(2, 6))),
    "module": lambda _model, layer: layer.lora_B.update({"default": nn.Linear(2, 5, bias=False)}),
    "base": lambda _model, layer: setattr(layer, "base_layer", nn.Linear(6, 5)),
    "bias of B": _other_variant,
    "base's bias": lambda _model, layer: setattr(layer.base_layer, "bias", None),
    "data": lambda _model, layer: setattr(layer.lora_A["default"].weight, "data", torch.randn(2, 6)),
    "in place": lambda _model, layer: layer.lora_A["default"].weight.data.mul_(4),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_a_call_is_seen_by_the_next(change):
    model, layer, x = one_layer()
    second = LoraConfig(r=3, lora_alpha=50, target_modules=["0"], init_lora_weights=False)
    model.add_adapter("second", second)
    before = model(x)
    change(model, layer)
    assert_pefts(model, x, before)


@pytest.mark.parametrize("change", [_dropout_in_evaluation, _no_dropout], ids=["evaluation", "p"])
def test_dropout_that_is_switched_off_is_seen_by_the_next_call(change):
    model, layer, x = one_layer(lora_dropout=0.5)
    assert not torch.equal(model(x), model(x))
    change(model, layer)
    y = model(x)
    with lk.training.reference_mode(model):
        torch.testing.assert_close(y, model(x))
    layer.lora_dropout["default"].train().p = 0.5
    assert not torch.equal(model(x), model(x))


def test_a_global_hook_is_seen_by_the_next_call():
    model, layer, x = one_layer()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(x)
    assert {layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]} <= set(seen)
    count = len(seen)
    model(x)
    assert len(seen) == count


@pytest.mark.parametrize("change", ["adapter", "scaling"])
def test_recomputation_of_what_was_not_recorded_raises(change):
    model, layer, x = one_layer()
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False))
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    model.set_adapter("second") if change == "adapter" else layer.set_scale("default", 9.0)
    with pytest.raises(RuntimeError, match="recomputed with other adapters active, or another scaling"):
        y.sum().backward()
    fresh = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    fresh.sum().backward()  # the same as was recorded


def test_a_tensor_that_a_transform_has_left_behind():
    """It is a wrapper whose memory belongs to another tensor."""
    model, layer, x = one_layer()
    left = []
    torch.func.grad(lambda z: left.append(2 * z) or z.sum())(x.detach())
    torch.testing.assert_close(model(left[0]), model(2 * x.detach()), rtol=0, atol=0)


UNCHANGED = [lora_layer.unchanged]
if _ext.load()[0] is not None:
    UNCHANGED.append(_ext.extension().unchanged)


@pytest.mark.parametrize("unchanged", UNCHANGED, ids=["python", "extension"][: len(UNCHANGED)])
def test_unchanged_compares_by_identity(unchanged):
    value, part = torch.ones(2), nn.Linear(2, 2)
    cell, hooks, classes = {"value": value}, OrderedDict(), (nn.Linear,)
    cells = ((cell, "value", value), (cell, "absent", None))
    assert unchanged(cells, (hooks, []), (part,), classes)
    cell["value"] = torch.ones(2)  # equal, but another
    assert not unchanged(cells, (hooks, []), (part,), classes)
    cell["value"] = value
    cell["absent"] = 1
    assert not unchanged(cells, (hooks, []), (part,), classes)
    cell["absent"] = None
    assert unchanged(cells, (hooks, []), (part,), classes)
    hooks["one"] = print
    assert not unchanged(cells, (hooks, []), (part,), classes)
    hooks.clear()
    part.__class__ = type("Other", (nn.Linear,), {})
    assert not unchanged(cells, (hooks, []), (part,), classes)


def test_unchanged_of_the_extension_refuses_other_arguments():
    if len(UNCHANGED) == 1:
        pytest.skip("no extension")
    for arguments in ((), ((), (), (1,), ()), ([], (), (), ()), ("", (), (), ())):
        with pytest.raises(ValueError, match="takes four tuples"):
            UNCHANGED[1](*arguments)
    for cells in (((1, 2, 3),), (({}, 2),), (5,)):
        with pytest.raises(TypeError, match="a dictionary, a key and a value"):
            UNCHANGED[1](cells, (), (), ())
    with pytest.raises(TypeError, match="unhashable"):
        UNCHANGED[1]((({}, [], None),), (), (), ())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_the_extension_a_changed_layer_is_seen(dropout, monkeypatch):
    monkeypatch.setattr(_ext, "load", lambda: (None, "not built"))
    model, layer, x = one_layer(lora_dropout=dropout)
    model.eval()
    before = model(x)
    assert layer._prepared.unchanged is lora_layer.unchanged
    layer.set_scale("default", 5.0)
    assert_pefts(model, x, before)
