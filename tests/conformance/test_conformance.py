"""What `make conformance` is made of, on a handful of tests in place of PEFT's."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import selection

from tests.helpers.warm import Warm

HERE = Path(__file__).resolve().parent

TESTS = """
import os
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn

FUSED = os.environ["CONFORMANCE_MODE"] == "fused"
CONFIG = LoraConfig(target_modules=["0"], init_lora_weights=False)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def accelerated(model):
    kinds = [type(module) for module in model.modules() if isinstance(module, Linear)]
    assert kinds
    return all(kind is not Linear for kind in kinds)


@pytest.mark.parametrize("width", [3, 4])
def test_merged(width):
    model = get_peft_model(nn.Sequential(nn.Linear(8, width)), CONFIG)
    x = torch.ones(3, 8)
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)


def test_made(tmp_path):
    model = get_peft_model(net(), CONFIG)
    assert accelerated(model) == FUSED
    model.add_adapter("other", LoraConfig(target_modules=["2"]))
    assert accelerated(model) == FUSED
    model.save_pretrained(tmp_path)
    assert accelerated(PeftModel.from_pretrained(net(), tmp_path)) == FUSED
    assert accelerated(get_peft_model(net(), CONFIG, mixed=True)) == FUSED


def test_injected():
    assert accelerated(inject_adapter_in_model(CONFIG, net())) == FUSED


@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_config(config_cls):
    assert config_cls is LoraConfig


def test_failing():
    get_peft_model(net(), CONFIG)
    raise AssertionError("in both")


@pytest.mark.xfail
def test_expected_to_fail():
    raise AssertionError


@pytest.mark.skip(reason="never")
def test_skipped():
    pass


def test_unsteady():
    path = Path(__file__).with_name("runs")
    runs = path.read_text() if path.exists() else ""
    path.write_text(runs + "x")
    assert len(runs) != 1
"""

# An accelerated layer of four outputs is off by a thousandth.
BROKEN = """
import lora_kernels
from peft.tuners.lora import Linear

right = lora_kernels.accelerate


def accelerate(model, **options):
    report = right(model, **options)
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.out_features == 4:
            layer.register_forward_hook(lambda module, args, output: output if module.merged else output * 1.001)
    return report


lora_kernels.accelerate = accelerate
"""


@pytest.fixture
def conformance(tmp_path, monkeypatch):
    """run.py, whose four processes import torch and PEFT once."""
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("conformance_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    with Warm(("torch", "peft", "transformers"), module.environment(tmp_path)) as warm:

        def run(command, cwd, env, stdout, stderr):
            assert command[1:3] == ["-m", "pytest"]
            done = warm.run(*command[2:], cwd=cwd, environment=env, timeout=600)
            stdout.write(done.stdout + done.stderr)
            return done

        monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run, STDOUT=None))
        yield module


@pytest.mark.slow
def test_what_passes_stock_and_fails_on_accelerated_layers_is_reported(conformance, tmp_path):
    tests = tmp_path / "mini"
    tests.mkdir()
    (tests / "test_mini.py").write_text(TESTS)
    (tests / "conftest.py").write_text(BROKEN)
    assert conformance.main(["--tests", str(tests), "--out", str(tmp_path), "--workers", "1"]) == 1
    found = json.loads((tmp_path / "summary.json").read_text())

    def names(key):
        return [name.split("::")[1] for name in found[key]]

    assert names("pass_stock_fail_fused") == ["test_merged[4]"]
    assert "not close" in found["pass_stock_fail_fused"]["mini/test_mini.py::test_merged[4]"]
    assert names("unsteady") == ["test_unsteady"] and names("fail_stock") == ["test_failing"]
    assert found["stock"] == {"passed": 6, "failed": 1, "xfailed": 1, "skipped": 1}
    assert found["fused"] == {"passed": 4, "failed": 3, "xfailed": 1, "skipped": 1}
    assert found["with_lora_layers"] == found["with_accelerated_layers"] == 5
    assert "| stock | 1 | 6 | 1 | 1 |" in (tmp_path / "summary.md").read_text()


def test_every_file_of_peft_has_one_place():
    names = [*selection.FILES, *(name for names in selection.NOT_RUN.values() for name in names)]
    assert len(names) == len(set(names))
