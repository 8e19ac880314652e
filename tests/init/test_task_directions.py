import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.init.problem import BaseLayer, LoraFactors
from lora_kernels.statistics import Statistics
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama

EMPTY = Statistics()
NAME = "model.layers.1.mlp.down_proj"


def wrapped():
    return get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))


def known(m=14, n=10, changed=(7, 2, 5)):
    """W with known core directions, and an update along some of them."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 10).double()).Q for size in (m, n))
    s = torch.arange(10, 0, -1).double()
    weight = (u * s @ v.mT).float()
    size = torch.zeros(10).double()
    for rank, index in enumerate(changed):
        size[index] = (3 - rank) * s[index]
    b, a = (u * size)[:, list(changed)], v[:, list(changed)].mT
    return weight, LoraFactors(a.float(), b.float() / 2), u, v


def test_the_directions_with_the_largest_rates_are_chosen_in_order():
    weight, adapter, u, v = known()
    base = {"l": BaseLayer(lambda: weight, 2.0, lambda: adapter)}
    found = lk.init.TaskDirections(update="adapter", share=0.1).factors(EMPTY, {"l": 3}, base=base)["l"]
    for row, index in enumerate((7, 2, 5)):
        a, b = found.factors.A[row].double(), found.factors.B[:, row].double()
        assert float(a @ v[:, index]).__abs__() / float(a.norm()) > 1 - 1e-5
        # Signs are free, but paired.
        assert float((b @ u[:, index]) * (a @ v[:, index])) > 0
    product = 2.0 * found.factors.B @ found.factors.A
    assert float(product.norm() / weight.norm()) == pytest.approx(0.1, rel=1e-4)
    torch.testing.assert_close(found.factors.A.norm(dim=1), found.factors.B.norm(dim=0))
    assert "100 % of the update" in found.notes[0]


def test_the_gradient_step_is_the_one_of_the_statistics():
    model, batches = wrapped(), padded(samples(), 4)
    method = lk.init.TaskDirections(share=0.2)
    stats = lk.collect(model, batches, method, weighting="sample", progress=False)
    name = f"base_model.model.{NAME}"
    layer, weight = stats[name], model.get_submodule(name).get_base_layer().weight.detach().double()
    second = layer.input.covariance(center=False) + 1e-6 * torch.eye(layer.in_features)
    fisher = layer.sums["fisher"].total.double() / layer.sums["fisher"].tokens + 1e-6
    update = -(stats[name].gradient().double() / fisher.unsqueeze(1)) @ torch.linalg.inv(second)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    rates = torch.einsum("mk,mn,kn->k", u, update, vh).abs() / (s + 1e-6 * s[0])
    before = model(**batches[0]).logits
    report = lk.initialize(model, method=method, statistics=stats, progress=False)
    torch.testing.assert_close(model(**batches[0]).logits, before, rtol=1e-4, atol=1e-5)
    a = model.get_submodule(name).lora_A["default"].weight.detach().double()
    expected = vh[rates.topk(3).indices]
    assert float(torch.linalg.svdvals(torch.nn.functional.normalize(a) @ expected.mT).min()) > 1 - 1e-4
    assert all(layer.start_share == pytest.approx(0.2, rel=1e-3) for layer in report.layers)


def test_a_short_run_of_training_can_be_the_update():
    model = wrapped()
    batch = padded(samples(), 4)[0]
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.5)
    before = model(**batch).logits.detach()
    model(**batch).loss.backward()
    optimizer.step()
    del optimizer
    with pytest.raises(ValueError, match="force=True"):
        lk.initialize(model, method=lk.init.TaskDirections(update="adapter"))
    report = lk.initialize(model, method=lk.init.TaskDirections(update="adapter"), force=True, progress=False)
    assert all(layer.status == "initialised" for layer in report.layers)
    assert relative_error(model(**batch).logits, before) < 1e-5  # the run's own change is gone


def test_errors():
    weight, adapter, *_ = known()
    base = {"l": BaseLayer(lambda: weight, 2.0, lambda: adapter)}
    with pytest.raises(ValueError, match="base has no layer l"):
        lk.init.TaskDirections(update="adapter").factors(EMPTY, {"l": 3})
    with pytest.raises(ValueError, match="rank"):
        lk.init.TaskDirections(update="adapter").factors(EMPTY, {"l": 11}, base=base)
    zero = copy.deepcopy(adapter)
    zero.B.zero_()
    base = {"l": BaseLayer(lambda: weight, 2.0, lambda: zero)}
    found = lk.init.TaskDirections(update="adapter").factors(EMPTY, {"l": 3}, base=base)["l"]
    assert found.solver == "stock" and "its update is zero" in found.notes[0]
    for bad in ({"share": 0.0}, {"update": "magic"}, {"epsilon": -1.0}, {"damping": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            lk.init.TaskDirections(**bad)
