"""`LandscapeMonitor` on mixtures: every expert is measured, the experts of a parameter are one entry of a line."""

import json
import math
import statistics

import pytest
import torch

import lora_kernels as lk
from lora_kernels.adapters.folders import read_adapter
from lora_kernels.api.diagnosis import inspect_folder
from lora_kernels.api.monitor import LAYER_FIELDS, read_log
from lora_kernels.landscape.diagnosis_page import diagnosis_page
from tests.adapters.start_models import nudge
from tests.adapters.test_experts_files import IDS, experts_alone
from tests.adapters.test_experts_files import adapted as with_routers
from tests.statistics.test_expert_layers import adapted, pytestmark, views  # noqa: F401

NAMES = ["Qwen3Moe", "GptOss"]


@pytest.mark.parametrize("name", NAMES)
def test_a_line_has_an_entry_for_a_parameter_and_the_numbers_of_every_expert(name, tmp_path):
    model, path = adapted(name).eval(), tmp_path / "log.jsonl"
    monitor = lk.api.LandscapeMonitor(1, path, drift=True)
    monitor.begin(model)
    start = lk.api.snapshot(model)
    nudge(model)
    # One expert of a parameter has a smaller rank than the others.
    model.get_submodule(views(model)[0].name).lora_A["default"].weight.data[0] = 0
    numbers = monitor.step(model)
    truth = lk.diagnose(model, start=start)
    assert any(summary.ranks[0] < summary.ranks[1] for summary in truth.experts)
    assert {layer.name: layer.spectrum.values for layer in truth} == {
        key: spectrum.values for key, spectrum in monitor.latest.items()
    }
    (line,) = read_log(path)
    by_row = {}
    for layer in truth:
        by_row.setdefault(layer.parameter or layer.name, []).append(layer.spectrum)
    assert set(line["layers"]) == set(by_row) and len(truth.experts) == 4 and len(by_row) == 6
    for summary in truth.experts:
        entry, members = line["layers"][summary.name], by_row[summary.name]
        assert set(entry) == {*LAYER_FIELDS, "smallest_rank", "experts", "not_finite"}
        assert (entry["smallest_rank"], entry["numerical_rank"]) == summary.ranks
        assert (entry["experts"], entry["not_finite"]) == (summary.count, 0)
        for key in ("spectral", "spectral_share", "entropy_rank", "balance"):
            assert entry[key] == pytest.approx(getattr(summary, key), rel=1e-6)
        assert entry["nuclear"] == pytest.approx(sum(spectrum.nuclear for spectrum in members), rel=1e-6)
        for key in ("frobenius", "drift"):
            assert entry[key] == pytest.approx(math.hypot(*(getattr(one, key) for one in members)), rel=1e-6)
    # A parameter is one layer in the means; sums and maxima are over all experts.
    for key, field in (("rank", "numerical_rank"), ("entropy_rank", "entropy_rank")):
        means = [statistics.mean(getattr(spectrum, field) for spectrum in members) for members in by_row.values()]
        assert numbers[key] == pytest.approx(statistics.mean(means), rel=1e-6)
    assert numbers["nuclear"] == pytest.approx(sum(layer.spectrum.nuclear for layer in truth), rel=1e-6)
    assert numbers["share"] == pytest.approx(max(layer.spectrum.spectral_share for layer in truth), rel=1e-5)
    assert monitor.unsupported == () and "unsupported" not in line


def test_what_is_not_measured_is_in_the_line(tmp_path):
    model, path = experts_alone("Qwen3Moe"), tmp_path / "log.jsonl"
    monitor = lk.api.LandscapeMonitor(1, path)
    assert monitor.step(model)["nuclear"] == 0 and len(monitor.latest) == 16
    model = with_routers("Llama4Text")
    lk.api.LandscapeMonitor(1, path).step(model)
    line = read_log(path)[-1]
    assert len(line["unsupported"]) == 4 and all("target_parameters" in why for why in line["unsupported"].values())
    assert {name.rpartition(".")[2] for name in line["layers"]} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("experts", [1, 4])
def test_experts_that_break_are_counted(experts, tmp_path):
    model, path = adapted("GptOss").eval(), tmp_path / "log.jsonl"
    nudge(model)
    wrapper = model.get_submodule(views(model)[0].name)
    rank = wrapper.r["default"]
    wrapper.lora_A["default"].weight.data[: rank * experts] = torch.nan
    monitor = lk.api.LandscapeMonitor(1, path)
    numbers = monitor.step(model)
    assert numbers["not_finite"] == experts and math.isfinite(numbers["nuclear"]) and math.isfinite(numbers["rank"])
    (entry,) = [entry for entry in read_log(path)[0]["layers"].values() if entry.get("not_finite")]
    assert entry["not_finite"] == experts and (entry["nuclear"] is None) == (experts == 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_history_of_a_page_has_a_cell_for_a_parameter(name, tmp_path):
    model, path = experts_alone(name), tmp_path / "log.jsonl"
    monitor = lk.api.LandscapeMonitor(1, path)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(model)
    model.save_pretrained(tmp_path / "adapter")
    log = read_log(path)
    assert [line["step"] for line in log] == [1, 2, 3] and log[-1]["nuclear"] > log[0]["nuclear"] > 0
    assert all(len(line["layers"]) == 4 for line in log) and json.dumps(log)
    page = diagnosis_page(inspect_folder(read_adapter(tmp_path / "adapter")), log).to_html()
    assert "Growth of |sBA| since step 1" in page and "gate_up_proj" in page
