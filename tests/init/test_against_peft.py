"""PiSSA, CorDA and LoRA-GA beside PEFT's own, on the same model and data."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.init.factors import BaseLayer
from lora_kernels.statistics import Statistics
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama
from tests.statistics.test_models import quantized

TARGETS = ["q_proj", "v_proj", "down_proj"]
EMPTY = Statistics({}, 0, 0.0, 0.0)


def base_model():
    return tiny_llama(hidden_size=48, intermediate_size=80)


def wrap(model, **changes):
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": TARGETS, **changes}))


def layers(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def products(model):
    """By layer: s B A, and the base weight."""
    found = {}
    for name, module in layers(model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        product = module.scaling["default"] * b.detach().double() @ a.detach().double()
        found[name] = product, module.get_base_layer().weight.detach().double()
    return found


def same_start(ours, theirs, tolerance):
    one, other = products(ours), products(theirs)
    assert list(one) == list(other) and len(one) == 6
    for name in one:
        assert relative_error(one[name][0], other[name][0]) < tolerance, name
        assert relative_error(one[name][1], other[name][1]) < tolerance, name
        assert float(one[name][0].norm()) > 0


@pytest.mark.parametrize(("n_iter", "tolerance"), [(None, 1e-5), (6, 1e-3)])
def test_pissa(n_iter, tolerance):
    theirs = wrap(base_model(), init_lora_weights="pissa")
    ours = wrap(base_model())
    report = lk.initialize(ours, method=lk.PiSSA(n_iter=n_iter), base="mutate", progress=False)
    same_start(ours, theirs, tolerance)
    assert all((layer.eigen_residual == 0.0) == (n_iter is None) for layer in report.layers)
    assert {layer.solver for layer in report.layers} == ({"svd"} if n_iter is None else {"krylov", "direct"}) or n_iter


@pytest.mark.parametrize(("mode", "theirs_mode"), [("instruction_previewed", "ipm"), ("knowledge_preserved", "kpm")])
def test_corda(mode, theirs_mode):
    from peft.tuners.lora.config import CordaConfig  # noqa: PLC0415

    corda = pytest.importorskip("peft.tuners.lora.corda")
    # PEFT scales each sample by its own largest entry; with one sample that is one factor, which cancels.
    (ids, labels), *_ = sorted(samples(), key=lambda each: -len(each[0]))
    batch = {"input_ids": ids[None].repeat(1, 9), "labels": labels[None].repeat(1, 9)}
    batch["input_ids"] = (batch["input_ids"] + torch.arange(batch["input_ids"].shape[1]) % 17) % 61
    model = base_model()
    settings = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS}
    config = LoraConfig(**settings, init_lora_weights="corda", corda_config=CordaConfig(corda_method=theirs_mode))
    corda.preprocess_corda(model, config, run_model=lambda: model(**batch))
    theirs = get_peft_model(model, config)
    ours = wrap(base_model())
    lk.initialize(ours, [batch], lk.CorDA(mode=mode, n_iter=None), base="mutate", progress=False)
    same_start(ours, theirs, 2e-3)
    if mode == "instruction_previewed":
        sketched = wrap(base_model())
        report = lk.initialize(sketched, [batch], lk.CorDA(n_iter=6), base="mutate", progress=False)
        same_start(sketched, theirs, 5e-3)
        assert all(layer.eigen_residual > 0 for layer in report.layers)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("scale", "theirs_scale"), [("stable", "stable"), ("gd", "gd_scale"), ("unit", "unit")])
def test_lora_ga(direction, scale, theirs_scale):
    from peft.tuners.lora.config import LoraGAConfig  # noqa: PLC0415
    from peft.tuners.lora.loraga import preprocess_loraga  # noqa: PLC0415

    batch = padded(samples(), 8)[0]
    model = base_model()
    settings = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS}
    ga = LoraGAConfig(direction=direction, scale=theirs_scale)
    config = LoraConfig(**settings, init_lora_weights="lora_ga", lora_ga_config=ga)
    preprocess_loraga(model, config, lambda: model(**batch).loss.backward())
    theirs = get_peft_model(model, config)
    ours = wrap(base_model())
    lk.initialize(ours, [batch], lk.LoraGA(direction=direction, scale=scale), base="mutate", progress=False)
    # A takes v_i and B another u_j, so the sign of their product is free: up to it, rows and columns are the same.
    for (name, one), (_, other) in zip(layers(ours), layers(theirs), strict=True):
        for x, y in ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B)):
            x, y = x["default"].weight.detach(), y["default"].weight.detach()
            x, y = (x, y) if x.shape[0] == 4 else (x.mT, y.mT)
            signs = torch.sign((x * y).sum(1, keepdim=True))
            assert relative_error(x, signs * y) < 3e-2, name  # both are approximations; other vectors are at 1.4
    whole = {name: product + weight for name, (product, weight) in products(ours).items()}
    for name, (product, weight) in products(theirs).items():
        torch.testing.assert_close(whole[name], product + weight, rtol=1e-5, atol=1e-6)


def test_lora_ga_from_a_sketch_and_on_a_quantized_base():
    batches = padded(samples(), 4)
    exact, sketched = (wrap(tiny_llama(hidden_size=96, intermediate_size=256), r=2) for _ in range(2))
    lk.initialize(exact, batches, "lora_ga", progress=False)
    report = lk.initialize(sketched, batches, "lora_ga", progress=False, form="sketch", sketch_size=12)
    assert "two_sided" in {layer.solver for layer in report.layers}
    for (name, one), (_, other) in zip(layers(exact), layers(sketched), strict=True):
        a, b = (each.lora_A["default"].weight.detach() for each in (one, other))
        assert float(torch.linalg.svdvals(a @ b.mT).max()) > 0.8, name
    base = quantized("nf4").eval()
    batch = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():  # with gradients, bitsandbytes takes kernels that round otherwise
        before = base(**batch).logits
        model = wrap(base)
        lk.initialize(model, batches, "lora_ga", progress=False)
        assert relative_error(model.eval()(**batch).logits, before) < 1e-4
    with pytest.raises(ValueError, match="quantized base"):
        lk.initialize(wrap(quantized("nf4")), batches, "lora_ga", base="mutate", progress=False)


def test_the_function_is_kept_on_an_untouched_base():
    batches = padded(samples(), 4)
    for method in ("pissa", "corda", "lora_ga", "task_directions"):
        base = base_model().eval()
        before, weights = base(**batches[0]).logits.detach(), copy.deepcopy(base.state_dict())
        model = wrap(base)
        report = lk.initialize(model, batches, method, progress=False)
        assert relative_error(model.eval()(**batches[0]).logits.detach(), before) < 1e-4, method
        for name, value in model.get_base_model().state_dict().items():
            if name.replace(".base_layer", "") in weights:
                assert torch.equal(value, weights[name.replace(".base_layer", "")])
        assert all(layer.start_share > 0 for layer in report.layers)
        report.to_json()


def test_errors():
    weight = torch.randn(8, 6)
    base = {"l": BaseLayer(lambda: weight, 1.0)}
    for method in (lk.PiSSA(), lk.CorDA(), lk.LoraGA()):
        with pytest.raises(ValueError, match="base is None"):
            method.factors(EMPTY, {})
    with pytest.raises(ValueError, match="rank"):
        lk.PiSSA().factors(EMPTY, {"l": 7}, base=base)
    with pytest.raises(ValueError, match="n_iter"):
        lk.PiSSA(n_iter=-1)
    for bad in ({"mode": "both"}, {"damping": 0.0}, {"n_iter": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            lk.CorDA(**bad)
    for bad in ({"direction": "up"}, {"scale": "huge"}, {"gamma": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            lk.LoraGA(**bad)
    model, batches = wrap(base_model(), r=30), padded(samples(), 4)
    with pytest.raises(ValueError, match="rank"):
        lk.initialize(model, batches, "lora_ga", progress=False)
    stats = lk.collect(wrap(base_model()), batches, "input_second", progress=False)
    with pytest.raises(ValueError, match="the data reached no token|no weight gradient"):
        lk.initialize(wrap(base_model()), method="lora_ga", statistics=stats, unreached="raise", progress=False)
