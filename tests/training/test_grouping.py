"""Layers that read the same tensor: found while they run, then computed as one, with the same numbers."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.training import grouping, groups, lora_layer
from tests.statistics.models import tiny_llama
from tests.statistics.test_models import quantized
from tests.training.test_accelerate import BATCH, assert_same, step, wrapped

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def moved(model):
    """Change the adapters in place, as an optimizer does."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name and value.requires_grad:
                value.mul_(1.01)
    return model


class Calls:
    """How many layers each call of the op computes."""

    def __init__(self, monkeypatch):
        self.sizes = []
        real = lora_layer.lora_linear_group

        def counted(x, members, **more):
            self.sizes.append(len(members))
            return real(x, members, **more)

        monkeypatch.setattr(lora_layer, "lora_linear_group", counted)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 1, "v_proj": 7}, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    ],
)
def test_same_numbers_as_peft(settings, calls):
    settings = {"target_modules": ALL, **settings}
    stock, fused = wrapped(**settings), wrapped(**settings)
    lk.accelerate(fused, strict=True)
    assert_same(step(fused), step(stock))
    assert set(calls.sizes) == {1}
    calls.sizes.clear()
    moved(stock), moved(fused)
    assert_same(step(fused), step(stock))
    expected = [2, 1] if len(settings["target_modules"]) == 3 else [3, 1, 2, 1]
    assert calls.sizes == expected * 2
    first = [each.rsplit(".", 1)[1] for each in groups(fused)[0]]
    assert first == [each for each in ("q_proj", "k_proj", "v_proj") if each in settings["target_modules"]]


def test_no_layer_is_grouped_on_request(calls):
    model = wrapped(target_modules=ALL)
    lk.accelerate(model, group=False)
    step(model), step(moved(model))
    assert set(calls.sizes) == {1} and groups(model) == []


def test_restore_forgets(calls):
    model = wrapped(target_modules=ALL)
    lk.accelerate(model)
    step(model)
    assert len(groups(model)) == 4
    lk.restore(model)
    assert groups(model) == []
    step(moved(model))
    lk.accelerate(model)
    calls.sizes.clear()
    step(model)
    assert set(calls.sizes) == {1}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases(kind, calls):
    stock, fused = (wrapped(quantized(kind), target_modules=ALL) for _ in range(2))
    lk.accelerate(fused)
    step(fused)
    assert_same(step(moved(fused)), step(moved(stock)), tolerance=1e-4)
    assert 3 in calls.sizes


def test_dropout_draws_what_single_layers_draw():
    one, other = (wrapped(target_modules=ALL, lora_dropout=0.3).train() for _ in range(2))
    lk.accelerate(one)
    lk.accelerate(other, group=False)
    for seed in (1, 2, 3):
        assert_same(step(one, seed=seed), step(other, seed=seed))
        moved(one), moved(other)
    assert len(groups(one)) == 4


def test_a_start_away_from_zero():
    loader = [BATCH]
    models = []
    for group in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=ALL, lora_dropout=0.2))
        lk.initialize(model, loader, method="lora_ga")
        lk.accelerate(model, group=group)
        model.train()
        step(model, seed=1)
        models.append(step(moved(model), seed=1))
    assert_same(*models)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_what_it_recorded(reentrant):
    stock, fused = (wrapped(target_modules=ALL) for _ in range(2))
    lk.accelerate(fused, strict=True)
    for model in (stock, fused):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
    for _ in range(3):
        assert_same(step(fused), step(stock))
        moved(stock), moved(fused)
    # Two passes before a backward pass: the first is recomputed long after the second was recorded.
    fresh, plain = (wrapped(target_modules=ALL).train() for _ in range(2))
    lk.accelerate(fresh)
    for model in (fresh, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        losses = [model(**BATCH).loss for _ in range(2)]
        (losses[0] + 2 * losses[1]).backward()
    for mine, yours in zip(fresh.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None or torch.allclose(mine.grad, yours.grad, atol=1e-5)


class Net(nn.Module):
    """Two layers on one input, and what is done between and after."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)
        self.between = lambda x: x
        self.skip_two = False

    def forward(self, x):
        y = self.one(x)
        return y if self.skip_two else y + self.two(self.between(x)).square()


def net():
    torch.manual_seed(0)
    model = wrapped(Net(), target_modules=["one", "two"])
    lk.accelerate(model)
    x = torch.randn(7, 6)
    model(x).sum().backward()
    moved(model)
    return model, x


def reference(model, x):
    with lk.reference_mode(model):
        return model(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: x.add_(1),
        lambda x: x.view(7, 6),
    ],
)
def test_an_output_is_used_only_for_the_tensor_it_was_made_from(change, calls):
    model, x = net()
    inner = model.base_model.model
    y = model(x.clone())
    assert calls.sizes == [1, 1, 2]
    inner.between = change
    y = model(x.clone())
    assert torch.allclose(y, reference(model, x.clone()), atol=1e-5)
    assert calls.sizes[3:] == [2, 1]
    with pytest.warns(RuntimeWarning, match="no longer do"):
        moved(model)(x.clone())
    calls.sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.allclose(moved(model)(x.clone()), reference(model, x.clone()), atol=1e-5)
    assert set(calls.sizes) == {1}


def test_an_output_that_nobody_takes(calls):
    model, x = net()
    model.base_model.model.skip_two = True
    y = model(x)
    y.sum().backward()
    assert calls.sizes[-1] == 2
    model(x)  # the same parameters: what was recorded may still be recomputed
    assert calls.sizes[-1] == 2
    moved(model)
    with pytest.warns(RuntimeWarning, match="no longer do"):
        model(x)
    assert calls.sizes[-1] == 1
    model.base_model.model.skip_two = False
    calls.sizes.clear()
    for _ in range(3):
        moved(model)(x.clone())
        with grouping.afresh(list(model.modules())):
            pass
    assert set(calls.sizes) == {1}  # a leader whose group did not hold leads no other


def change_scaling(layer):
    layer.scaling["default"] = 7.0


def disable(layer):
    layer.enable_adapters(False)


def other_base(layer):
    layer.base_layer = nn.Linear(6, 5)


@pytest.mark.parametrize("change", [change_scaling, disable, other_base])
def test_a_layer_that_changes_in_between_computes_for_itself(change):
    model, x = net()
    inner = model.base_model.model

    def between(value):
        change(inner.two)
        return value

    inner.between = between
    y = model(x)
    inner.between = lambda value: value
    assert torch.allclose(y, reference(model, x), atol=1e-5)


def test_autocast_in_between():
    model, x = net()
    inner = model.base_model.model
    whole = inner.forward

    def forward(x):
        y = inner.one(x)
        with torch.autocast("cpu", torch.bfloat16):
            return y, inner.two(x)

    inner.forward = forward
    one, two = model(x)
    assert one.dtype == torch.float32 and two.dtype == torch.bfloat16
    inner.forward = whole


def test_unused_outputs_and_inference(calls):
    model, x = net()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert calls.sizes == [1, 1] * 3  # and in net() itself
    inner = model.base_model.model
    y = inner.one(x)
    inner.two(x)
    model.zero_grad()
    y.sum().backward()  # the other output has no gradient
    assert calls.sizes[-1] == 2
    assert inner.one.lora_B["default"].weight.grad is not None and inner.two.lora_B["default"].weight.grad is None


def test_copies_and_pickles_learn_for_themselves():
    model = wrapped(target_modules=ALL)
    lk.accelerate(model)
    step(model), step(moved(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert groups(other) == []
        assert_same(step(other), step(model))
        assert len(groups(other)) == 4
    assert len(groups(model)) == 4


def test_nothing_is_kept_alive():
    model = wrapped(target_modules=ALL)
    lk.accelerate(model)
    step(model), step(moved(model))
    layers = [weakref.ref(each) for each in model.modules() if isinstance(each, lora_layer.FusedForward)]
    assert len(layers) == 14 and all(each() in grouping._groups for each in layers) and len(grouping._ready) == 0
    del model
    gc.collect()
    assert not any(each() for each in layers)


def test_a_shared_layer_and_layers_far_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            for _ in range(3):
                x = x + self.one(x) * self.two(x)
            return x + self.one(x)

    torch.manual_seed(0)
    base = Shared()
    stock, fused = (wrapped(copy.deepcopy(base), target_modules=["one", "two"]) for _ in range(2))
    lk.accelerate(fused)
    x = torch.randn(4, 6)
    for _ in range(3):
        grads = []
        for model in (stock, fused):
            model.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(x).sum().backward()
            grads.append([each.grad for each in model.parameters() if each.grad is not None])
            moved(model)
        assert all(torch.allclose(*pair, atol=1e-4, rtol=1e-4) for pair in zip(*grads, strict=True))


def test_verify_measures_groups_and_leaves_them(calls):
    model = wrapped(target_modules=ALL)
    lk.accelerate(model)
    assert lk.verify(model, BATCH).ok
    assert {2, 3} < set(calls.sizes)
    assert groups(model) == []
    step(model)
    found = groups(model)
    assert len(found) == 4 and lk.verify(model, BATCH).ok and groups(model) == found


def test_a_checkpoint_inside_keeps_its_mode_until_the_next_step(calls):
    model, x = net()
    inner = model.base_model.model
    x = x.requires_grad_(True)
    y = checkpoint(inner, x, use_reentrant=False)
    inner_calls = len(calls.sizes)
    y.sum().backward()
    assert calls.sizes[inner_calls - 1 :] == [2, 2]


def test_a_follower_that_is_called_by_itself_and_a_group_that_strays(calls):
    model, x = net()
    inner = model.base_model.model
    inner.two(torch.randn(3, 6))  # by itself
    model(x)
    assert calls.sizes[-1] == 2
    inner.between = torch.clone
    model(x)
    with pytest.warns(RuntimeWarning, match="no longer do"):
        moved(model)(x)


def test_a_tensor_that_is_changed_in_between_is_another_one(calls):
    model = wrapped(Net(), target_modules=["one", "two"])
    lk.accelerate(model)
    model.base_model.model.between = lambda x: x.add_(1)
    for _ in range(3):
        model(torch.randn(4, 6))
        moved(model)
    assert groups(model) == [] and set(calls.sizes) == {1}
