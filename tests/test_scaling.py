"""docs/scaling.md is what its command writes, and small runs do what was planned for them."""

import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
import lora_kernels as lk
from benchmarks import scaling, scaling_measure
from lora_kernels.api import entry
from lora_kernels.cli import main
from tests.statistics.models import tiny_llama

RECORD = json.loads(scaling.RECORD.read_text())


def of(model):
    return [each for each in RECORD["planned"] if each["model"] == model]


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (other, key)


@pytest.fixture
def one_forward_pass(monkeypatch):
    """A plan's forward pass takes nearly all of its time, and finds the same for all plans of a model."""
    found, find = {}, entry.find_groups

    def find_groups(model, targets, batch, forward):
        key = model, tuple(target.name for target in targets)
        if key not in found:
            found[key] = find(model, targets, batch, forward)
        return found[key]

    monkeypatch.setattr(entry, "find_groups", find_groups)
    yield
    assert len(found) == 1


def test_the_page_is_that_of_the_record():
    assert scaling.PAGE.read_text() == scaling.page(RECORD), "run python -m benchmarks.scaling"


def test_the_record_is_what_plans_say_now(one_forward_pass):
    assert_same(scaling.planned(["7B"]), of("7B"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["70B", "405B"])
def test_the_record_is_what_plans_say_of_large_models(model, one_forward_pass):
    assert_same(scaling.planned([model]), of(model))


def test_the_command_on_the_page_gives_its_figures(capsys):
    text = scaling.PAGE.read_text()
    command = text.split("```text\nlora-kernels ")[1].split("```")[0].replace("\\\n", " ").split()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(each for each in of("70B") if (each["world"], each["method"]) == (8, "lora_da"))
    assert found["passes"] == row["passes"] and found["communication"] == row["sent"]


def test_what_does_not_fit_is_not_passed_over():
    refused = [each for each in RECORD["planned"] if each.get("layout") not in ("whole", "sharded")]
    assert any(each["model"] == "405B" and each["world"] == 1 for each in refused)
    text = scaling.PAGE.read_text()
    assert "one device: the weights do not fit the device" in text and "**does not fit**" in text


@pytest.mark.slow
def test_small_runs_hold_and_send_what_was_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "1.json"), "--quick"])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    scaling_measure.main()  # in this process
    rows = json.loads((tmp_path / "1.json").read_text())["rows"]
    rows += scaling.measure(quick=True, worlds=[2])["rows"]
    assert [each["world"] for each in rows] == [1] * 6 + [2] * 6
    for each in rows:
        assert each["found"] == each["planned"], each["case"]
    assert all(each["found"]["reductions"] > 0 for each in rows if each["world"] == 2)
    assert len({each["found"]["passes"] for each in rows}) == 2  # one, and several
    # Half of it would show.
    assert all(each["found"]["bytes"] > 0 for each in rows)


def test_footprints_and_layouts():
    model = tiny_llama()
    footprint = scaling.Footprint.of(model)
    assert footprint.total == sum(tensor.numel() * 4 for tensor in (*model.parameters(), *model.buffers()))
    block = sum(tensor.numel() * 4 for tensor in model.model.layers[0].parameters())
    assert (footprint.unit, footprint.blocks, footprint.root) == (block, 2, footprint.total - 2 * block)
    plain = scaling.Footprint.of(nn.Linear(3, 4))
    assert plain == scaling.Footprint(64, 64, 0, 0) and plain.sharded(4) == 16 + 64
    one, many = (lk.plan(model, "eva", world_size=world) for world in (1, 8))
    sums = max(one.pass_bytes)
    assert footprint.layout(one) == ("whole", footprint.total + sums)
    large = scaling.Footprint(int(2e11), 200, 100, 8)
    assert large.layout(many) == ("sharded", 2e11 / 8 + 200 + 200 + sums)
    assert large.layout(one) == ("weights and sums do not fit the device", 2e11 + sums)
