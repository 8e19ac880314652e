import io
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.demo import run as orchestration
from benchmarks.demo.config import DEFAULT_RATES, DEFAULT_STEPS, OTHER_RATE, DemoConfig
from benchmarks.demo.roundtrip import RoundTrip
from benchmarks.demo.run import run


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
    assert {path.name for path in config.out.iterdir()} == {"demo.json", "loss.png", "ranks.png", "adapter"}

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
    settings = DemoConfig(**{**config.__dict__, "seeds": 1, "plots": False, "method": "random"})
    assert run(settings, Console(file=output, width=140)) == 1
    assert "DIFFER by 5.0e-01" in output.getvalue()
    assert {path.name for path in config.out.iterdir()} == {"demo.json", "adapter"}
    record = json.loads((config.out / "demo.json").read_text())
    assert record["verdict"] == []
    assert not record["round_trip"]["ok"]


def test_plots_without_matplotlib_are_refused_before_the_long_part(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="plots was True, must be False without matplotlib"):
        run(config, Console(file=io.StringIO()))
    assert not config.out.exists()


def test_the_default_rates_are_those_of_the_study():
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_rates.json"
    study = json.loads(path.read_text())
    defaults = DemoConfig()
    assert {arm: entry["rate"] for arm, entry in study["choice"].items()} == DEFAULT_RATES
    assert not any(entry["at_edge"] for entry in study["choice"].values())
    assert study["steps"] == DEFAULT_STEPS
    for name in ("rank", "batch_size", "max_tokens"):
        assert study[name] == getattr(defaults, name)
    # The study's seeds are not the demo's, and the choice follows from the curves in the record.
    assert min(study["seeds"]) >= defaults.seeds
    for arm, entry in study["choice"].items():
        runs = [each for each in study["runs"] if each["arm"] == arm]
        means = {
            rate: sum(each["evaluations"][-1]["loss"] for each in runs if each["learning_rate"] == rate)
            / len(study["seeds"])
            for rate in study["rates"]
            if all("evaluations" in each for each in runs if each["learning_rate"] == rate)
        }
        assert entry["rate"] == min(means, key=means.get)
        assert entry["losses"][f"{entry['rate']:g}"] == pytest.approx(min(means.values()))


@pytest.mark.parametrize("method", ["pissa", "lora_da"])
def test_any_method_accelerated(config, method):
    import dataclasses

    config = dataclasses.replace(config, method=method, accelerate=True, seeds=1, plots=False)
    output = io.StringIO()
    assert run(config, Console(file=output, width=140)) == 0, output.getvalue()
    record = json.loads((config.out / "demo.json").read_text())
    assert [each["arm"] for each in record["runs"]] == ["random", method] and record["round_trip"]["ok"]
    assert record["learning_rates"][method]["from"] == "from the study on another task"


def test_the_other_rates_are_those_of_the_study_on_another_task():
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "results" / "quality_banking77.json"
    record = json.loads(path.read_text())
    chosen = record["tuning"]
    # Optimizers are the study's alone.
    starts = {arm for arm, settings in record["arms"].items() if "training" not in (settings or {})}
    assert {chosen[arm]["rate"] for arm in starts - set(DEFAULT_RATES)} == {OTHER_RATE}
