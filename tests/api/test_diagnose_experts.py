"""`lk.diagnose` on mixtures: every expert is diagnosed as a layer of its own, and shown with those of its parameter."""

import json

import pytest
import torch
from peft import PeftModel
from rich.console import Console

import lora_kernels as lk
from lora_kernels.adapters.experts import expert_layers
from lora_kernels.landscape.diagnosis_page import diagnosis_page
from lora_kernels.landscape.verdict import NOT_JUDGED, STILL_TRAINING
from tests.adapters.start_models import nudge
from tests.adapters.test_experts_files import make
from tests.conftest import relative_error
from tests.statistics.test_expert_layers import BATCH, IDS, adapted, moe, pytestmark, reference, views  # noqa: F401

NAMES = ["Qwen3Moe", "GptOss", "Olmoe"]  # both layouts, with and without biases
FEW = {"input_ids": IDS[:1, :3], "labels": IDS[:1, :3]}


def trained(name, r=2):
    model = adapted(name, r)
    nudge(model)
    return model.eval()


def merged_reference(model, name, monkeypatch):
    """Sums of gradients by expert on a model that has the updates in its weights."""
    twin = adapted(name)
    nudge(twin)
    for view in views(twin):
        with torch.no_grad():
            view.module.get_param().add_(view.module.get_delta_weight("default"))
            view.module.lora_B["default"].weight.zero_()
    for module in twin.modules():
        if hasattr(module, "lora_B") and not hasattr(module, "parameter_name"):
            module.merge()
    return reference_with(twin, monkeypatch)


def reference_with(model, monkeypatch):
    # (`disable_adapter` would unmerge: the linear layers' updates are written into their weights here.)
    for module in model.modules():
        if getattr(module, "merged_adapters", None):
            module.merged_adapters.clear()
    return reference(model, monkeypatch)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_measured_and_certified_as_a_layer(name, fused, monkeypatch, recwarn):
    model = trained(name)
    expected, items = merged_reference(model, name, monkeypatch)
    if fused:
        lk.accelerate(model)
    diagnosis = lk.diagnose(model, [BATCH], weight_decay=0.1, progress=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    by_name = {layer.name: layer for layer in diagnosis}
    experts = [key for view in views(model) for key in expert_layers(view.name, view.module)]
    assert set(experts) <= set(by_name) and not diagnosis.unsupported
    certified = 0
    for view in views(model):
        scaling = view.module.scaling["default"]
        for key, expert in expert_layers(view.name, view.module).items():
            layer = by_name[key]
            delta = view.module.get_delta_weight("default").detach()[expert.expert].double()
            values = torch.linalg.svdvals(delta)[:2]
            assert relative_error(torch.tensor(layer.spectrum.values, dtype=torch.float64), values) < 1e-5
            weight = view.module.get_param().detach()[expert.expert].double()
            assert layer.spectrum.weight.frobenius == pytest.approx(float(weight.norm()), rel=1e-5)
            a, b = (factor.weight.double() for factor in (expert.lora_A["default"], expert.lora_B["default"]))
            balance = (a @ a.T - b.T @ b).norm() / (a.square().sum() + b.square().sum())
            assert layer.spectrum.balance == pytest.approx(float(balance), rel=1e-5)
            second, gradient, count = expected.get(key, (None, None, 0))
            assert layer.tokens == count
            if gradient is None:
                continue
            certified += 1
            ratio = scaling * float(torch.linalg.matrix_norm(gradient / items, 2)) / 0.1
            assert layer.certificate.ratio == pytest.approx(ratio, rel=2e-3)
            assert layer.certificate.gain is not None
    assert certified >= 6


def test_the_report_has_a_row_for_a_parameter_and_names_experts_without_tokens():
    model = trained("Qwen3Moe")
    diagnosis = lk.diagnose(model, [FEW], weight_decay=0.1, progress=False)
    wide = Console(width=250, no_color=True)
    with wide.capture() as captured:
        wide.print(diagnosis)
    text = captured.get()
    assert len(diagnosis.experts) == 4 and len(diagnosis.layers) == 4 * 4 + 2
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 4 + 2
    assert sum("mlp.experts.gate_up_proj (4 experts)" in line for line in lines) == 2
    unreached = 0
    for summary in diagnosis.experts:
        members = [layer for layer in diagnosis if layer.parameter == summary.name]
        assert summary.count == len(members) == 4
        assert summary.unreached == tuple(index for index, layer in enumerate(members) if layer.tokens == 0)
        unreached += len(summary.unreached)
        assert all(layer.certificate is None for layer in members if layer.tokens == 0)
        assert summary.spectral == max(layer.spectrum.spectral for layer in members)
        assert summary.balance == max(layer.spectrum.balance for layer in members)
        assert summary.ranks == (2, 2) and summary.rank == 2 and summary.ratio > 0
        # An expert that the data do not reach decides nothing.
        assert summary.verdict.kind == STILL_TRAINING
    assert unreached > 0 and "no counted token reached expert" in text
    assert diagnosis.verdict.reasons == ("6 layers: 6 still_training",)
    written = json.loads(diagnosis.to_json())
    assert [entry["unreached"] for entry in written["experts"]] == [list(s.unreached) for s in diagnosis.experts]
    page = diagnosis_page(diagnosis).to_html()
    assert page.count("<td") < 300 and "no counted token reached" in page


def test_without_data_and_without_updates():
    model = adapted("GptOss").eval()
    diagnosis = lk.diagnose(model, weights=False)
    assert diagnosis.verdict.kind == NOT_JUDGED
    for summary in diagnosis.experts:
        assert summary.zero == (0, 1, 2, 3) and summary.spectral == 0.0 and summary.spectral_share is None
    assert "the update is zero in any of 4 experts" in str(diagnosis)
    model.get_submodule(views(model)[0].name).lora_A["default"].weight.data[0, 0] = torch.nan
    assert lk.diagnose(model, weights=False).verdict.kind == "loud_failure"


def test_the_drift_of_experts_is_from_the_frozen_start_or_a_snapshot(tmp_path):
    model = adapted("GptOss")
    lk.initialize(model, None, "pissa", progress=False)
    start = lk.api.snapshot(model)
    at_start = lk.diagnose(model, weights=False)
    assert max(layer.spectrum.drift for layer in at_start if layer.parameter) < 1e-5
    nudge(model)
    own, given = lk.diagnose(model, weights=False), lk.diagnose(model, weights=False, start=start)
    for one, two in zip(own, given, strict=True):
        assert one.spectrum.drift > 1e-3 and one.spectrum.drift == pytest.approx(two.spectrum.drift, rel=1e-5)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(make("GptOss"), tmp_path)
    total = {layer.name: layer.spectrum.frobenius for layer in lk.diagnose(stock, weights=False)}
    for layer in own:
        assert total[layer.name] == pytest.approx(layer.spectrum.drift, rel=1e-4)


def test_merged_experts_are_measured_without_the_weight():
    model = trained("Qwen3Moe")
    expected = [layer.spectrum.values for layer in lk.diagnose(model)]
    model.merge_adapter()
    merged = lk.diagnose(model)
    assert [layer.spectrum.values for layer in merged] == expected
    assert any("merged" in note for note in merged.all_notes())
