"""LoRA-Dash: what it chooses, what it computes, when it switches."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lora_kernels as lk
from lora_kernels.linalg.basis import Selection
from lora_kernels.training.dash import _launched, along_directions, select
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding
from tests.training.dash_models import (
    BATCHES,
    adam,
    dashed,
    effective,
    expected_selection,
    linear,
    trained,
    wrapped,
)

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = load_file(str(GOLDEN / "lora_dash.safetensors"))
DESCRIPTION = json.loads((GOLDEN / "lora_dash.json").read_text())


def golden(index, dtype, accelerated):
    """The layer of the papers' code as one of PEFT's."""
    given = {key.split(".")[-1]: value for key, value in DATA.items() if key.startswith(f"layer{index}.in.")}
    found = "f64" if dtype == torch.float64 else "f32"
    start = f"layer{index}.official."
    truth, plain = (
        {key.removeprefix(start + which): value for key, value in DATA.items() if key.startswith(start + which)}
        for which in ("f64.", found + ".")
    )
    m, n = given["W"].shape
    base = nn.Sequential(nn.Linear(n, m, bias="bias" in given))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])).to(dtype)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(given["W"])
        layer.lora_A["default"].weight.copy_(given["A"])
        layer.lora_B["default"].weight.copy_(given["B"])
        if "bias" in given:
            layer.base_layer.bias.copy_(given["bias"]).requires_grad_(True)
            layer.base_layer.bias.requires_grad_(True)
    run = lk.LoraDash(k=8, epsilon=0.0).attach(model)
    if accelerated:
        assert {each.path for each in lk.accelerate(model, strict=True, guard=False)} == {"fused"}
    return model, layer, run, {key: value.to(dtype) for key, value in given.items()}, truth, plain


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_papers_own_code(index, dtype, accelerated):
    assert DESCRIPTION["hyperparameters"]["scaling"] == 2.0
    model, layer, run, given, truth, plain = golden(index, dtype, accelerated)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    # Four products, of which the longest sums have 48 terms; their own float32 is worse where singular vectors enter.
    bound = tolerance if dtype == torch.float64 else 4 * rounding(torch.float32, 48)

    def check(found, name):
        assert_accurate(found.detach(), truth[name], bound, plain=plain[name], what=name)

    x = given["x"].clone().requires_grad_(True)
    check(model(x), "y_before")
    run.launch(torch.optim.SGD(trained(model), lr=0.1), progress=False)
    check(model(x), "y_switch")
    dash = layer.lora_dash["default"]
    entry = run.report().layers[0]
    assert entry.rates[0] == pytest.approx(float(truth["change_rate"].max()), rel=max(tolerance, 1e-9))
    for place in range(8):
        exact, theirs = (torch.outer(each["u"][:, place], each["vt"][place]) for each in (truth, plain))
        assert_accurate(torch.outer(dash.left[:, place], dash.right[place]), exact, bound, plain=theirs)
    # Coordinates are ordered by rate, and a sign turns both vectors: the given values fit as they are.
    with torch.no_grad():
        dash.coordinates.copy_(given["lora_index"])
    y = model(x)
    check(y, "y_after")
    (y * given["dy"]).sum().backward()
    found = {"gA": layer.lora_A["default"].weight, "gB": layer.lora_B["default"].weight, "gx": x}
    for name, value in {**found, "gidx": dash.coordinates}.items():
        check(value.grad, name)
    if "gbias" in truth:
        check(layer.base_layer.bias.grad, "gbias")
    assert layer.base_layer.weight.grad is None and not dash.left.requires_grad


def test_the_selection_of_the_papers_own_code():
    for index in range(3):
        truth = {key.split(".")[-1]: value for key, value in DATA.items() if f"layer{index}.official.f64" in key}
        given = {key.split(".")[-1]: value for key, value in DATA.items() if f"layer{index}.in" in key}
        factors = [(given["A"].double(), given["B"].double(), 2.0)]
        found = select(given["W"].double(), factors, 8, 0.0, None)
        assert found.indices.tolist() == truth["top_index"].tolist()
        assert relative_error(found.rates, truth["change_rate"][truth["top_index"]]) < 1e-10
        assert relative_error(found.sigma, truth["sigma"][truth["top_index"]]) < 1e-12
        share = truth["delta_sigma"].square()
        assert found.share == pytest.approx(float(share[truth["top_index"]].sum() / share.sum()), rel=1e-9)


def test_row_sums_are_the_diagonal_of_the_whole_product():
    torch.manual_seed(0)
    u, vh = torch.randn(9, 5).double(), torch.randn(5, 7).double()
    factors = [(torch.randn(3, 7), torch.randn(9, 3), 0.7), (torch.randn(2, 7), torch.randn(9, 2), -1.3)]
    change = sum(s * b.double() @ a.double() for a, b, s in factors)
    torch.testing.assert_close(along_directions(u, vh, factors), (u.mT @ change @ vh.mT).diagonal(), rtol=0, atol=1e-12)


def test_epsilon_bounds_directions_that_the_weight_has_nothing_of():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 6).double()).Q for size in (9, 6))
    sigma = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0]).double()
    weight = u * sigma @ v.mT
    size = torch.tensor([0.0, 0.3, 1.0, 0.1, 0.0, 0.0]).double()
    factors = [(v.mT, u * size, 1.0)]
    for epsilon, first in ((0.0, [2, 1, 3]), (10.0, [2, 1, 3]), (1e-6, [2])):
        found = select(weight, factors, 3, epsilon, None)
        assert bool(torch.isfinite(found.rates).all())
        rounding = found.sigma < 1e-10  # what is left of a change of zero, over nothing
        if epsilon == 0.0:
            assert [each for each, small in zip(found.indices.tolist(), rounding, strict=True) if not small][0] == 2
        else:
            assert found.indices.tolist()[: len(first)] == first
            assert float(found.rates[0]) == pytest.approx(1.0 / (2.0 + epsilon * 4.0), rel=1e-9)
    zero = select(torch.zeros(4, 3).double(), [(torch.ones(1, 3), torch.ones(4, 1), 1.0)], 2, 1e-6, None)
    assert bool(torch.isfinite(zero.left).all()) and bool(torch.isfinite(zero.right).all())


def test_the_rate_counts_what_the_frozen_start_takes_off():
    model = wrapped()
    lk.initialize(model, method="pissa", force=True, progress=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1 * torch.randn_like(layer.lora_B["default"].weight))
    run = lk.LoraDash(k=3, epsilon=0.0).attach(model)
    run.launch(adam(model), progress=False)
    start, scaling = layer.lora_start["default"], layer.scaling["default"]
    product = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    change = scaling * (product - start.b @ start.a)
    _, products, rates = expected_selection(layer.base_layer.weight.detach(), change, 3)
    dash = layer.lora_dash["default"]
    for place, product in enumerate(products):
        assert relative_error(torch.outer(dash.left[:, place], dash.right[place]), product) < 1e-4
    entry = next(each for each in run.report() if each.name.endswith("layers.0.self_attn.q_proj"))
    assert entry.rates[0] == pytest.approx(float(rates.max()), rel=1e-4)


def test_optimizer_steps_are_counted_and_nothing_else():
    """Evaluations and micro-batches between them are not; the function does not jump at the switch."""
    model = wrapped().train()
    run = lk.LoraDash(k=3, pre_launch=3).attach(model)
    optimizer = adam(model)
    for number in range(1, 6):
        for _ in range(2):
            for batch in BATCHES:  # accumulation
                model(**batch).loss.backward()
        assert all(each.grad is not None for each in run.coordinates())
        if number <= 3:
            assert not any(bool(each.grad.any()) for each in run.coordinates())
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            before = model(**BATCHES[0]).logits
            model(**BATCHES[1])
        assert run.step(optimizer) is (number == 3)
        with torch.no_grad():
            after = model(**BATCHES[0]).logits
        model.train()
        assert torch.equal(before, after)
        assert run.launched is (number >= 3) and run.steps == min(number, 3)
        moved = [bool(each.any()) for each in run.coordinates()]
        assert all(moved) if number > 3 else not any(moved)
    assert "6 launched" in run.report().summary() and "layers.1.mlp.down_proj" in str(run.report())


def test_the_optimizer_starts_afresh_on_the_coordinates():
    model = wrapped().train()
    run = lk.LoraDash(k=3, pre_launch=2).attach(model)
    optimizer = adam(model, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(**BATCHES[0]).loss.backward()
        optimizer.step()
        run.step(optimizer)
    # Adam's first step with its bias corrected is the learning rate, whatever the gradient.
    for each in run.coordinates():
        torch.testing.assert_close(each.abs(), torch.full_like(each, 1e-3), rtol=0.05, atol=0)  # eps
        assert float(optimizer.state[each]["step"]) == 1
    factor = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert float(optimizer.state[factor]["step"]) == 3


def test_an_entry_of_the_report():
    rates = torch.tensor([7.0, 2.0, 0.0])
    selection = Selection(
        left=torch.eye(5)[:, :3],
        right=torch.eye(3, 4),
        indices=torch.arange(3),
        sigma=torch.tensor([2.0, 4.0, 1.0]),
        rates=rates,
        largest=8.0,
        share=0.5,
    )
    entry = _launched("l", selection)
    assert entry.sigma == (0.5, 0.125) and entry.rates == (7.0, 0.0) and entry.share == 0.5 and not entry.reason
    nothing = _launched("l", replace(selection, rates=0 * rates, sigma=0 * rates, largest=0.0))
    assert nothing.sigma == (0.0, 0.0) and "arbitrary" in nothing.reason


def test_an_optimizer_that_was_made_before():
    model = wrapped().train()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.5)  # (some other group first)
    optimizer.add_param_group(adam(model).param_groups[0])
    run = lk.LoraDash(k=3, pre_launch=1).attach(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    schedule.step()
    assert run.step(optimizer)
    alone = wrapped().eval()
    before = adam(alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.LoraDash(k=3).attach(alone).launch(before, progress=False)
    assert not any(each.training for each in alone.modules())
    assert len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["params"][-6:] == run.coordinates()
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    schedule.step()  # which knows the groups that there were
    assert all(bool(each.any()) for each in run.coordinates())
    other = wrapped()
    with pytest.raises(ValueError, match="holds no factor of the adapter"):
        lk.LoraDash(k=3, pre_launch=1).attach(other).step(optimizer)
    with pytest.raises(TypeError, match="Optimizer"):
        lk.LoraDash(k=3, pre_launch=1).attach(other).step(None)


def test_steps_that_accelerate_left_out_are_not_counted():
    class Left(torch.optim.SGD):
        step_was_skipped = True

    class Accumulating(torch.optim.SGD):
        class gradient_state:
            sync_gradients = False

    model = wrapped()
    run = lk.LoraDash(k=2, pre_launch=1).attach(model)
    for kind in (Left, Accumulating):
        assert not run.step(kind(trained(model), lr=0.1)) and run.steps == 0
    assert run.step(torch.optim.SGD(trained(model), lr=0.1))


def test_the_gradient_of_a_coordinate_is_u_g_v():
    model, layer = linear()
    x, dy = torch.randn(6, 10).double(), torch.randn(6, 14).double()
    _, run = dashed(model, k=4)
    y = model(x)
    assert relative_error(y, x @ effective(layer).mT) < 1e-13
    (y * dy).sum().backward()
    dash, g = layer.lora_dash["default"], dy.mT @ x
    expected = torch.stack([dash.left[:, i] @ g @ dash.right[i] for i in range(4)])
    assert relative_error(run.coordinates()[0].grad, expected) < 1e-12
    layer.set_scale("default", 3.0)  # of s B A alone
    assert relative_error(model(x), x @ effective(layer).mT) < 1e-13
    assert layer.scaling["default"] == 6.0


@pytest.mark.parametrize("accelerated", [False, True])
def test_coordinates_see_the_undropped_input(accelerated):
    model, layer = linear(lora_dropout=0.5)
    _, _run = dashed(model, k=4)
    if accelerated:
        lk.accelerate(model, strict=True, guard=False)
    model.train()
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    x = torch.randn(6, 10).double()
    assert relative_error(model(x), x @ effective(layer).mT) < 1e-13


def test_the_switch_sets_out_from_zero():
    model = wrapped()
    run = lk.LoraDash(k=3).attach(model)
    with torch.no_grad():
        run.coordinates()[0].fill_(0.3)  # by noise on all parameters, say
        before = model(**BATCHES[0]).logits
        run.launch(adam(model), progress=False)
        assert torch.equal(model(**BATCHES[0]).logits, before)


def test_bad_factors_at_the_switch_name_the_layer():
    model = wrapped()
    run = lk.LoraDash(k=3, pre_launch=1).attach(model)
    weight = model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    optimizer = adam(model)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.v_proj: the factors .* NaN"):
        run.step(optimizer)
    assert not run.launched
    with torch.no_grad():
        weight[0, 0] = 0.0
    assert run.step(optimizer)
    with pytest.raises(ValueError, match="directions already"):
        run.launch(optimizer)


def test_adapters_that_have_changed_nothing_are_said():
    model = wrapped()
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.lora_B["default"].weight.zero_()
    run = lk.LoraDash(k=3).attach(model)
    with pytest.warns(RuntimeWarning, match=r"1 adapters have changed nothing .*layers.1.self_attn.v_proj"):
        report = run.launch(adam(model), progress=False)
    assert sum("arbitrary" in each.reason for each in report) == 1


def test_prepared_bases_are_read_at_the_switch(tmp_path, monkeypatch):
    model = wrapped()
    monkeypatch.chdir(tmp_path.parent)
    run = lk.LoraDash(k=3, cache_dir=tmp_path.name).attach(model)
    monkeypatch.chdir("/")
    run.prepare(progress=False)
    assert len(list(tmp_path.iterdir())) == 6
    expected = wrapped()
    dashed(expected)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("decomposed again"))
        run.launch(adam(model), progress=False)
    other = dict(expected.named_buffers())
    for name, value in model.named_buffers():
        assert torch.equal(value, other[name])
    with pytest.raises(ValueError, match="cache_dir is None"):
        lk.LoraDash(k=3).attach(wrapped()).prepare()


def test_a_layer_with_fewer_directions_is_refused_with_a_line():
    model = wrapped()
    with pytest.warns(RuntimeWarning, match=r"2 LoRA layers get no coordinates .*v_proj: k is 13, .* min.m, n. = 12"):
        run = lk.LoraDash(k=13).attach(model)
    run.launch(adam(model), progress=False)
    status = {entry.name: entry.status for entry in run.report()}
    assert sorted(status.values()) == ["launched"] * 4 + ["refused"] * 2
    assert all((value == "refused") == name.endswith("v_proj") for name, value in status.items())


def test_a_layer_is_refused_with_a_line():
    model = wrapped(target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(RuntimeWarning, match=r"1 LoRA layers get no coordinates .*embed_tokens.*Embedding"):
        run = lk.LoraDash(k=3).attach(model)
    assert [each.status for each in run.report()].count("refused") == 1
    assert "refused" in run.report().summary()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

    with pytest.warns(RuntimeWarning, match="Conv2d"):
        lk.LoraDash(k=2).attach(get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv", "out"])))


def test_errors():
    model = wrapped()
    with pytest.raises(ValueError, match=r"no layer of adapter.*q_proj.*k is 1000, but it has only min.m, n. = "):
        lk.LoraDash(k=1000).attach(model)
    assert not any(hasattr(each, "lora_dash") for each in model.modules())
    with pytest.raises(ValueError, match="no layer of adapter 'default' can have coordinates.*DoraLinearVariant"):
        lk.LoraDash(k=2).attach(wrapped(use_dora=True))
    with pytest.raises(ValueError, match="the model has 'default'"):
        lk.LoraDash(adapter_name="other").attach(model)
    with pytest.raises(ValueError, match="no LoRA layer"):
        lk.LoraDash().attach(nn.Linear(3, 3))
    for bad in ({"k": 0}, {"pre_launch": 0}, {"epsilon": -1.0}, {"epsilon": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            lk.LoraDash(**bad)
    with pytest.raises(TypeError, match="k must be an int"):
        lk.LoraDash(k=2.0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        lk.LoraDash(k=2).attach(model)
    model.unmerge_adapter()
    run = lk.LoraDash(k=2).attach(model)
    with pytest.raises(ValueError, match="has 2 coordinates already"):
        lk.LoraDash(k=3).attach(model)
    with pytest.raises(ValueError, match="initialise first"):
        lk.initialize(model, method="pissa", force=True)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        run.launch(adam(model))
