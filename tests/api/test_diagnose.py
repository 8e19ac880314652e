"""`lk.diagnose` on real PEFT models, against closed forms, autograd and dense algebra."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import parts
from lora_kernels.landscape.verdict import (
    LOUD_FAILURE,
    LOW_RANK_MINIMUM,
    NOT_JUDGED,
    RANK_LIMITED,
    STILL_TRAINING,
)
from lora_kernels.reports import plain
from tests.statistics.models import padded, samples, tiny_llama

DECAY = 0.3


class Regression(nn.Module):
    """`0.5 mean |W x - y|^2`."""

    def __init__(self, w):
        super().__init__()
        self.lin = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w)
        self.lin.weight.data.copy_(w)

    def forward(self, x, y):
        return SimpleNamespace(loss=0.5 * (self.lin(x) - y).square().sum(-1).mean())


def regression(rank=4, kept=None, start=1.0):
    """A PEFT model at the minimum over updates, and data whose inputs have the identity as second moment."""
    generator = torch.Generator().manual_seed(0)
    w, t = (torch.randn(9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    u, _, vh = torch.linalg.svd(t, full_matrices=False)
    s = torch.tensor([3.0, 2.0, 0.1, 0.05, 0.0, 0.0, 0.0], dtype=torch.float64)
    x = math.sqrt(7) * torch.eye(7, dtype=torch.float64)
    y = x @ (w + (u * s) @ vh).mT
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.5, target_modules=["lin"])
    model = get_peft_model(Regression(w), config)
    layer = model.base_model.model.lin
    root = ((s - DECAY / 2).clamp_min(0) / 2).sqrt() * start
    chosen = list(range(rank)) if kept is None else kept
    layer.lora_A["default"].weight.data = (root[:, None] * vh)[chosen]
    layer.lora_B["default"].weight.data = (u * root)[:, chosen]
    return model, x, y


def batches_of(x, y, size=3):
    return [{"x": x[low : low + size], "y": y[low : low + size]} for low in range(0, len(x), size)]


def diagnose(model, x, y, **settings):
    settings = {"weight_decay": DECAY, "dtype": torch.float64, "progress": False, **settings}
    return lk.diagnose(model, batches_of(x, y), **settings)


def test_a_minimum_is_certified_and_nothing_changes():
    model, x, y = regression()
    model.train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    found = diagnose(model, x, y)
    (layer,) = found
    assert found.verdict.kind == layer.verdict.kind == LOW_RANK_MINIMUM
    assert layer.certificate.ratio == pytest.approx(1, abs=1e-9) and layer.certificate.alignment < 1e-9
    assert layer.certificate.stationarity < 1e-9 and layer.spectrum.numerical_rank == 2
    with torch.no_grad():
        for each in model.modules():
            if hasattr(each, "scaling"):
                losses = []
                for value in (0.0, 2.0):
                    each.scaling["default"] = value
                    losses.append(float(model.eval()(x=x, y=y).loss))
    assert layer.certificate.gain == pytest.approx(losses[0] - losses[1])
    assert layer.certificate.cost == pytest.approx(DECAY / 2 * layer.spectrum.nuclear)
    assert found.batches == 3 and found.tokens == 7
    model.train()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert flags == {name: each.requires_grad for name, each in model.named_parameters()}
    assert not any(each._forward_hooks for each in model.modules())
    assert [float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None] == []


def test_every_verdict():
    assert diagnose(*regression(start=0.7)).verdict.kind == STILL_TRAINING
    # Rank one is too small for this decay.
    assert diagnose(*regression(rank=1)).verdict.kind == RANK_LIMITED
    model, x, y = regression(rank=1)
    found = diagnose(model, x, y, statistics=None)
    statistics = lk.collect(model, batches_of(x, y), "gradient", progress=False)  # adapters off: another point
    assert lk.diagnose(model, statistics=statistics, weight_decay=DECAY).verdict.kind == STILL_TRAINING
    assert "a larger rank" in found.layers[0].verdict.reasons[-1]
    # A stationary point that costs more than it gains: the loss is that of another target, far away.
    (layer,) = found
    from dataclasses import replace

    from lora_kernels.landscape import judge

    poor = replace(layer.certificate, gain=0.9 * layer.certificate.cost)
    assert judge(layer.spectrum, poor).kind == LOUD_FAILURE
    assert judge(layer.spectrum, replace(poor, gain=None)).kind == NOT_JUDGED


def test_batches_of_other_sizes_give_the_same_and_iterators_no_gain():
    model, x, y = regression(start=0.7)
    whole, parts = (lk.diagnose(model, batches_of(x, y, size), weight_decay=DECAY, progress=False) for size in (7, 2))
    one, two = whole.layers[0].certificate, parts.layers[0].certificate
    for name in ("ratio", "alignment", "stationarity", "gain", "implied_weight_decay"):
        assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-4)
    llama, batches = wrapped(), padded(samples(), 4)
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}  # its loss is NaN
    gains = [
        lk.diagnose(llama, given, weight_decay=DECAY, progress=False).layers[0].certificate.gain
        for given in (batches, [nothing, *batches])
    ]
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)
    once = lk.diagnose(model, iter(batches_of(x, y)), weight_decay=DECAY, progress=False)
    assert once.layers[0].certificate.gain is None
    assert once.layers[0].certificate.ratio == pytest.approx(one.ratio, rel=1e-4)


def wrapped(dtype=torch.float64, sizes=None, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes}
    model = get_peft_model(tiny_llama(dtype, **(sizes or {})), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(0.05 * torch.randn(each.shape, generator=generator))
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_is_that_of_the_adapted_weight(fused):
    model, batches = wrapped(lora_dropout=0.3), padded(samples(), 3)
    if fused:
        lk.accelerate(model, guard=False)
    found = {e.name: e for e in lk.diagnose(model, batches, weight_decay=1e-2, dtype=torch.float64, progress=False)}
    merged = model.merge_and_unload().eval()
    merged.requires_grad_(True)
    total = items = 0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        logits = merged(**{**batch, "labels": None}).logits[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels) * count
        items += count
    (total / items).backward()
    assert len(found) == 4
    for name, each in found.items():
        g = merged.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        assert each.certificate.gradient_norm == pytest.approx(float(torch.linalg.matrix_norm(g, 2)), rel=1e-5)
        assert each.certificate.threshold == pytest.approx(1e-2 / 2)


def test_sketches_bracket_the_exact_norm():
    sizes = {"hidden_size": 160, "intermediate_size": 512}
    model, batches = wrapped(torch.float32, sizes, target_modules=["down_proj"]), padded(samples(), 4)
    exact, sketched = (
        lk.diagnose(model, batches, weight_decay=1e-2, form=form, sketch_size=24, progress=False)
        for form in ("exact", "sketch")
    )
    for one, two in zip(exact, sketched, strict=True):
        assert (one.certificate.source, two.certificate.source) == ("exact", "sketch")
        assert two.certificate.ratio_low <= one.certificate.ratio <= two.certificate.ratio_high
        assert two.certificate.ratio == pytest.approx(one.certificate.ratio, rel=0.1)
        assert two.certificate.alignment == pytest.approx(one.certificate.alignment, rel=0.1)
        assert two.certificate.alignment_error > 0


def test_spectra_alone_follow_the_update_and_the_weight():
    model = wrapped()
    start = lk.api.snapshot(model)
    found = lk.diagnose(model, start=start, intruders=True)
    assert found.verdict.kind == NOT_JUDGED and found.batches == 0 and "no data" in found.notes[0]
    for each in found:
        module = model.get_submodule(each.name)
        dense, w = module.get_delta_weight("default"), module.get_base_layer().weight
        assert each.spectrum.spectral == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-6)
        share = float(torch.linalg.matrix_norm(dense, 2) / torch.linalg.matrix_norm(w, 2))
        assert each.spectrum.spectral_share == pytest.approx(share, rel=1e-3)
        assert each.spectrum.frobenius_share == pytest.approx(float(dense.norm() / w.norm()), rel=1e-5)
        assert each.spectrum.drift == pytest.approx(0, abs=1e-6) and each.certificate is None
        assert len(each.overlap.left) == 4 and each.overlap.intruders == 0
    with torch.no_grad():
        model.get_submodule(each.name).lora_B["default"].weight.add_(1.0)
    moved = lk.diagnose(model, start=start, weights=False).layers[-1].spectrum
    truth = torch.linalg.norm(2 * torch.ones(moved.shape[0], 4, dtype=torch.float64) @ start[each.name][0])
    assert moved.drift == pytest.approx(float(truth), rel=1e-6) and moved.spectral_share is None


def test_the_drift_is_from_the_frozen_start():
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    lk.initialize(model, method="pissa", progress=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert parts.start(layer, "default") is not None
    assert all(each.spectrum.drift == pytest.approx(0, abs=1e-5) for each in lk.diagnose(model))
    start, last = lk.api.snapshot(model), lk.diagnose(model).layers[-1]
    assert last.spectrum.spectral > 0.1
    model.get_submodule(last.name).lora_B["default"].weight.data.add_(1.0)
    moved = lk.diagnose(model).layers[-1].spectrum.drift
    assert lk.diagnose(model, start=start).layers[-1].spectrum.drift == pytest.approx(moved, rel=1e-4) and moved > 1
    assert (
        lk.diagnose(model, start=lk.api.snapshot(model)).layers[-1].spectrum.drift < 1e-3 * moved
    )  # a start that is given


def test_broken_merged_and_variant_adapters_get_answers():
    model, batches = wrapped(), padded(samples(), 4)
    model.merge_adapter()
    merged = lk.diagnose(model)
    assert all("merged" in each.notes[0] and each.spectrum.spectral_share is None for each in merged)
    packed = model.get_submodule(merged.layers[0].name).get_base_layer()
    with_data = lk.diagnose(model, batches, weight_decay=1e-2, progress=False)
    model.unmerge_adapter()
    plain = lk.diagnose(model, batches, weight_decay=1e-2, progress=False)
    for one, two in zip(with_data, plain, strict=True):
        assert one.certificate.ratio == pytest.approx(two.certificate.ratio, rel=1e-3)
        assert one.certificate.gain is None and two.certificate.gain is not None
    packed.packed, packed._parameters["weight"] = packed._parameters["weight"], None
    assert "keeps no weight" in lk.diagnose(model, intruders=True).layers[0].notes[0]
    packed._parameters["weight"] = packed.packed
    name = plain.layers[0].name
    model.get_submodule(name).lora_A["default"].weight.data[0, 0] = math.nan
    broken = lk.diagnose(model, batches, weight_decay=1e-2, progress=False)
    assert broken.verdict.kind == LOUD_FAILURE and "was not read" in broken.notes[0] and broken.batches == 0
    assert broken.layers[0].spectrum.status == "not_finite" and broken.layers[1].spectrum.status == "ok"
    assert json.loads(broken.to_json())["layers"][0]["spectrum"]["nuclear"] is None
    dora = wrapped(use_dora=True)
    found = lk.diagnose(dora, batches, weight_decay=1e-2, progress=False)
    assert all(each.certificate is None and "DoRA" in each.notes[0] for each in found)


def test_the_report_prints_and_serialises():
    found = diagnose(*regression())
    text = str(found)
    assert "low rank minimum" in text and "AdamW" in text and "low_rank_minimum: 1 layers" in text
    data = json.loads(found.to_json())
    assert data["verdict"]["kind"] == LOW_RANK_MINIMUM and data["thresholds"]["stationarity"] == 0.05
    assert data["layers"][0]["certificate"]["ratio"] == pytest.approx(1)
    assert data["layers"][0]["spectrum"]["spectral"] == pytest.approx(found.layers[0].spectrum.spectral)


def test_without_a_scaling_there_is_no_certificate_and_json_holds_what_is_not_finite():
    model, x, y = regression()
    model.base_model.model.lin.scaling["default"] = 0.0
    (layer,) = diagnose(model, x, y)
    assert layer.certificate is None and "no certificate: the scaling is zero" in layer.notes
    assert plain({1: (math.inf, -math.inf, math.nan, 1.5, True, "x")}) == {"1": [None, None, None, 1.5, True, "x"]}


def test_bad_arguments():
    model, x, y = regression()
    with pytest.raises(TypeError, match="must be a PEFT model"):
        lk.diagnose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="adapter_name is 'other'"):
        lk.diagnose(model, adapter_name="other")
    with pytest.raises(ValueError, match="weight_decay"):
        lk.diagnose(model, weight_decay=-1.0)
    with pytest.raises(TypeError, match="max_batches: options of a pass"):
        lk.diagnose(model, max_batches=2)
    with pytest.raises(TypeError, match="unknown option nonsense"):
        lk.diagnose(model, batches_of(x, y), nonsense=2)
    stats = lk.collect(model, batches_of(x, y), "gradient", progress=False)
    with pytest.raises(ValueError, match="at most one of loader and statistics"):
        lk.diagnose(model, batches_of(x, y), statistics=stats)
    with pytest.raises(ValueError, match=r"start has factors of shapes \(4, 3\)"):
        lk.diagnose(model, start={"base_model.model.lin": (torch.ones(4, 3), torch.ones(9, 4))})
    assert "no weight decay" in diagnose(model, x, y, weight_decay=0.0).notes[0]
    with model.disable_adapter(), pytest.raises(ValueError, match="not active"):
        diagnose(model, x, y)
    meta = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        lk.diagnose(meta)
