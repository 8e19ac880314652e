import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

pytest.importorskip("peft")
from peft import PeftModel

import lora_kernels as lk
from benchmarks import records
from benchmarks.demo import __main__ as orchestration
from benchmarks.demo.__main__ import main, run
from benchmarks.demo.config import OURS, RANDOM, STOCK, STOCK_RATE, DemoConfig
from benchmarks.demo.roundtrip import RoundTrip

FILES = {"demo.json", "loss.png", "adapter"}


@pytest.fixture
def config(tiny_decoder, tmp_path):
    sizes = {"rank": 4, "steps": 8, "init_batches": 2, "held_out": 4, "answer_tokens": 5, "max_tokens": 96}
    return DemoConfig(model=tiny_decoder, method="lora_ga", rate=(1e-2, 1e-2), out=tmp_path / "out", threads=1, **sizes)


@pytest.fixture
def no_round_trip(monkeypatch):
    """For tests of something else: a fresh process takes longer than the rest of them."""
    monkeypatch.setattr(orchestration, "check_round_trip", lambda *arguments: RoundTrip(True, 0.0, "reloaded"))


def printed(config):
    output = io.StringIO()
    status = run(config, Console(file=output, width=160))
    return status, output.getvalue(), json.loads((config.out / "demo.json").read_text())


def test_the_whole_demo_on_a_tiny_model(config):
    threads = torch.get_num_threads()
    status, text, record = printed(config)
    assert status == 0 and torch.get_num_threads() == threads
    assert "lora_kernels: start lora_ga, accelerated layers, learning rate 0.01 (given)" in text
    assert "step   8: held-out loss stock PEFT" in text and "Gained: " in text
    assert "Adapter: reloaded logits are" in text and {path.name for path in config.out.iterdir()} == FILES
    for title in ("Prompt", "Right answer", "Before", "After, stock PEFT", "After, lora_kernels"):
        assert f"\n{title}:\n" in text

    stock, ours = record["sides"]
    assert (stock["name"], ours["name"]) == (STOCK, OURS) and stock["start_seconds"] < ours["start_seconds"]
    for side in (stock, ours):
        assert len(side["step_seconds"]) == len(side["train_loss"]) == 8 and all(map(math.isfinite, side["train_loss"]))
        assert [point["step"] for point in side["evaluations"]] == list(config.evaluate_at) == [0, 1, 2, 3, 4, 6, 8]
        assert side["evaluations"][0]["seconds"] == side["start_seconds"]
        assert side["evaluations"][-1]["loss"] < side["evaluations"][0]["loss"]
    # One base, one order of batches: both begin with the same loss, and the starts tell them apart.
    assert stock["train_loss"][0] == pytest.approx(ours["train_loss"][0], rel=1e-4)
    assert stock["train_loss"][-1] != pytest.approx(ours["train_loss"][-1], rel=1e-4)
    losses = [side["evaluations"][-1]["loss"] for side in (stock, ours)]
    (row,) = [row for row in record["rows"] if row["measure"] == "loss after 8 steps"]
    assert [row["stock"], row["ours"]] == losses
    assert record["round_trip"]["ok"] and record["task"]["test"] == 4 and record["environment"]["versions"]["torch"]
    assert json.loads((config.out / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_record_is_shown_among_the_results(config, no_round_trip, tmp_path, monkeypatch):
    pytest.importorskip("jinja2")
    from benchmarks import pages

    for file in records.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = dataclasses.replace(config, steps=2)
    _, _, record = printed(config)
    (tmp_path / "demo.json").write_bytes((config.out / "demo.json").read_bytes())
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    page = pages.page()
    assert "## The demo" in page and f"> {record['verdict'][0]}\n" in page
    assert "| held-out loss in nats per token | stock PEFT | lora_kernels |" in page


def test_with_a_random_start_only_the_layers_differ(config):
    _, text, record = printed(dataclasses.replace(config, method=RANDOM))
    stock, ours = (side["train_loss"] for side in record["sides"])
    assert ours == pytest.approx(stock, rel=1e-4) and record["round_trip"]["ok"]
    assert "lora_kernels: start random, accelerated layers" in text


@pytest.mark.parametrize("rate", [0.0123, None])
def test_ones_own_texts_at_the_suggested_rate(config, no_round_trip, tmp_path, monkeypatch, rate):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"How many dollars are {i} dollars ?"}) for i in range(20)))
    measured = lk.api.LearningRateAdvice(optimizer="adamw", rate=rate, low=0.01, high=0.02, reason="it is flat")
    asked = []
    monkeypatch.setattr(lk, "suggest_learning_rate", lambda *arguments: asked.append(arguments) or measured)
    _, text, record = printed(dataclasses.replace(config, data=file, method="eva", rate=None))
    assert "own.jsonl; 16 training and 4 held-out texts" in text
    assert [side["rate"] for side in record["sides"]] == [STOCK_RATE, STOCK_RATE if rate is None else rate]
    assert "stock PEFT: start random, PEFT's layers, learning rate 0.0003 (of many examples; PEFT advises none)" in text
    expected = (
        "0.0003 (of many examples: it is flat)" if rate is None else "0.012 (suggested in 0 s; 1.0e-02 to 2.0e-02)"
    )
    assert f"accelerated layers, learning rate {expected}" in text
    assert record["verdict"][-1].startswith("PEFT's rate was not tuned")
    ((model, batches),) = asked
    assert len(batches) == config.init_batches and isinstance(model, PeftModel)


def test_a_failed_check_is_a_failed_demo(config, monkeypatch):
    failed = RoundTrip(False, 0.5, "reloaded logits DIFFER by 5.0e-01")
    monkeypatch.setattr(orchestration, "check_round_trip", lambda *args: failed)
    status, text, record = printed(dataclasses.replace(config, steps=2))
    assert status == 1 and "DIFFER by 5.0e-01" in text and not record["round_trip"]["ok"]
    assert {path.name for path in config.out.iterdir()} == FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank is 0, but must be an integer of at least 1"),
        (["--rate", "1e-3", "2"], "rate is (0.001, 2.0), but must be above 0 and below 1"),
        (["--method", "magic"], "method is 'magic', but must be one of random, corda, "),
        (["--dropout", "1"], "dropout is 1.0, but must be at least 0 and below 1"),
        (["--data", "nowhere.jsonl"], "data is 'nowhere.jsonl', but must be an existing .jsonl or .csv file"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_status_2(options, message, capsys):
    assert main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.demo: error: {message}")


def test_the_command_line(monkeypatch):
    configs = []
    monkeypatch.setattr(orchestration, "run", lambda config: configs.append(config) or 0)
    assert main([]) == main(["--quick", "--steps", "5", "--rate", "1e-4"]) == main(["--rate", "1e-4", "1e-3"]) == 0
    assert configs[0] == DemoConfig() and (configs[1].steps, configs[1].held_out) == (5, 8)
    assert (configs[1].rate, configs[2].rate) == ((1e-4, 1e-4), (1e-4, 1e-3))
    with pytest.raises(SystemExit):
        main(["--rate", "1e-3", "1e-3", "1e-3"])


def test_texts_without_room_for_an_answer_are_refused(config):
    with pytest.raises(ValueError, match="max_tokens is 5, but must leave room for answers: of 2000 training"):
        run(dataclasses.replace(config, max_tokens=5))
