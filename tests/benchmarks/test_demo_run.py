import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.demo import __main__ as orchestration
from benchmarks.demo.__main__ import main, run
from benchmarks.demo.config import DEFAULT_RATES, DEFAULT_STEPS, OTHER_RATE, DemoConfig
from benchmarks.demo.roundtrip import RoundTrip
from benchmarks.demo.study import RATES_ONLY
from benchmarks.records import RESULTS


@pytest.fixture
def config(tiny_model, colour_file, tmp_path):
    return DemoConfig(
        model=tiny_model,
        data=colour_file,
        rank=4,
        steps=8,
        seeds=2,
        batch_size=8,
        max_tokens=8,
        out=tmp_path / "out",
        threads=1,
    )


def test_the_whole_demo_on_a_tiny_model(config):
    output = io.StringIO()
    threads = torch.get_num_threads()
    assert run(config, Console(file=output, width=140)) == 0
    assert torch.get_num_threads() == threads
    text = output.getvalue()
    assert "run 4/4  eva, seed 1, step 8: held-out loss" in text
    assert "Held-out loss, EVA against random LoRA:" in text
    assert "Adapter: reloaded logits are" in text
    assert {path.name for path in config.out.iterdir()} == {"demo.json", "loss.png", "adapter"}

    record = json.loads((config.out / "demo.json").read_text())
    assert [(each["arm"], each["seed"]) for each in record["runs"]] == [
        ("random", 0),
        ("eva", 0),
        ("random", 1),
        ("eva", 1),
    ]
    assert all(len(each["train_loss"]) == 8 and all(map(math.isfinite, each["train_loss"])) for each in record["runs"])
    assert record["round_trip"]["ok"]
    assert record["learning_rates"]["eva"] == {"rate": DEFAULT_RATES["eva"], "from": "from the rate study"}
    assert record["task"]["labels"] == ["blue", "green", "red"]
    assert record["config"]["threads"] == record["threads"] == 1
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )
    ends = [each["evaluations"][-1]["loss"] for each in record["runs"] if each["arm"] == "eva"]
    assert record["summary"]["eva"]["loss_mean"][-1] == pytest.approx(sum(ends) / 2)
    saved = json.loads((config.out / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"


def test_a_failed_check_is_a_failed_demo(config, monkeypatch):
    failed = RoundTrip(False, 0.5, "reloaded logits DIFFER by 5.0e-01")
    monkeypatch.setattr(orchestration, "check_round_trip", lambda *args: failed)
    output = io.StringIO()
    settings = DemoConfig(**{**config.__dict__, "seeds": 1, "method": "random"})
    assert run(settings, Console(file=output, width=140)) == 1
    assert "DIFFER by 5.0e-01" in output.getvalue()
    assert {path.name for path in config.out.iterdir()} == {"demo.json", "loss.png", "adapter"}
    record = json.loads((config.out / "demo.json").read_text())
    assert record["verdict"] == []
    assert not record["round_trip"]["ok"]


def test_a_bad_option_is_one_line_and_exit_status_2(capsys):
    assert main(["--rank", "0"]) == 2
    assert capsys.readouterr().err == "benchmarks.demo: error: rank is 0, but must be an integer of at least 1\n"


def test_the_default_rates_are_those_of_the_study():
    study = json.loads((RESULTS / "demo_rates.json").read_text())
    defaults, protocol = DemoConfig(), study["protocol"]
    assert {arm: choice["rate"] for arm, choice in study["tuning"].items()} == DEFAULT_RATES
    assert not any(choice["at_edge"] for choice in study["tuning"].values())
    assert protocol["evaluate_at"][-1] == DEFAULT_STEPS and not protocol["head_rates"]
    for name in ("rank", "batch_size", "max_tokens"):
        assert protocol[name] == getattr(defaults, name) == getattr(RATES_ONLY, name)
    assert protocol["rates"] == list(RATES_ONLY.rates) and protocol["tuning_seeds"] == list(RATES_ONLY.tuning_seeds)
    # The study's seeds are not the demo's, and the choice follows from the curves in the record.
    assert min(protocol["tuning_seeds"]) >= defaults.seeds
    for arm, entry in study["tuning"].items():
        runs = [each for each in study["runs"] if each["arm"] == arm]
        means = {
            rate: sum(each["evaluations"][-1]["loss"] for each in runs if each["learning_rate"] == rate)
            / len(protocol["tuning_seeds"])
            for rate in protocol["rates"]
            if all("evaluations" in each for each in runs if each["learning_rate"] == rate)
        }
        assert entry["rate"] == min(means, key=means.get)
        assert entry["losses"][f"{entry['rate']:g}"] == pytest.approx(min(means.values()))


@pytest.mark.parametrize("method", ["pissa", "lora_da"])
def test_any_method_accelerated(config, method):
    config = dataclasses.replace(config, method=method, accelerate=True, seeds=1)
    output = io.StringIO()
    assert run(config, Console(file=output, width=140)) == 0, output.getvalue()
    record = json.loads((config.out / "demo.json").read_text())
    assert [each["arm"] for each in record["runs"]] == ["random", method] and record["round_trip"]["ok"]
    assert record["learning_rates"][method]["from"] == "from the study on another task"


def test_the_other_rates_are_those_of_the_study_on_another_task():
    record = json.loads((RESULTS / "quality_banking77.json").read_text())
    chosen = record["tuning"]
    # Optimizers are the study's alone.
    starts = {arm for arm, settings in record["arms"].items() if "training" not in (settings or {})}
    assert {chosen[arm]["rate"] for arm in starts - set(DEFAULT_RATES)} == {OTHER_RATE}
