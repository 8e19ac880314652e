"""The monitor in a plain loop, and the callback in transformers' Trainer."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.api.monitor import latest_run, read_log, summarize
from tests.statistics.models import padded, samples, tiny_llama


def wrapped():
    return get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))


def train(model, rate, steps, monitor=None):
    torch.manual_seed(0)
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    found = []
    for step in range(steps):
        model(**padded(samples(), 4)[step % 2]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            found.append(monitor.step(model))
    return found


def test_every_so_many_steps_into_the_file_and_back(tmp_path):
    model, path = wrapped(), tmp_path / "logs" / "landscape.jsonl"
    monitor = lk.api.LandscapeMonitor(3, path, drift=True)
    start = lk.api.snapshot(model)
    monitor.begin(model)
    found = train(model, 1e-2, 7, monitor)
    assert [each is not None for each in found] == [False, False, True, False, False, True, False]
    lines = read_log(path)
    assert [line["step"] for line in lines] == [3, 6]
    last = summarize(monitor.latest)
    for name, value in found[5].items():
        assert lines[1][name] == pytest.approx(value) and last[name] == value
    assert set(lines[1]["layers"]) == set(start) == set(monitor.latest)
    # The seventh step is not in: measured anew the numbers differ, and agree with `diagnose`.
    now = monitor.measure(model)
    assert now["drift"] > found[5]["drift"] > found[2]["drift"] > 0
    spectra = {each.name: each.spectrum for each in lk.diagnose(model, start=start)}
    assert now["nuclear"] == pytest.approx(sum(each.nuclear for each in spectra.values()), rel=1e-6)
    assert now["drift"] == pytest.approx(math.hypot(*(each.drift for each in spectra.values())), rel=1e-6)
    assert now["share"] == pytest.approx(max(each.spectral_share for each in spectra.values()), rel=1e-5)
    assert now["balance"] == max(each.balance for each in spectra.values()) and now["not_finite"] == 0
    assert now["rank"] == sum(each.numerical_rank for each in spectra.values()) / 4
    assert now["entropy_rank"] == pytest.approx(sum(each.entropy_rank for each in spectra.values()) / 4)


def test_a_relative_path_holds_after_a_change_of_directory(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monitor = lk.api.LandscapeMonitor(1, "log.jsonl")
    monkeypatch.chdir(tmp_path / "two")
    monitor.step(wrapped())
    assert len(read_log(tmp_path / "one" / "log.jsonl")) == 1 and not list((tmp_path / "two").iterdir())


def test_norms_of_weights_are_taken_once(monkeypatch):
    from lora_kernels.api import monitor as module

    calls = []
    real = module.base_norms
    monkeypatch.setattr(module, "base_norms", lambda layers: calls.append(1) or real(layers))
    model, watched = wrapped(), lk.api.LandscapeMonitor(1)
    for _ in range(3):
        watched.step(model)
    assert calls == [1] and watched.count == 3
    assert "share" not in lk.api.LandscapeMonitor(1, weights=False).step(model)
    assert watched.step(model, 12)["rank"] == 0 and watched.count == 12


def test_factors_that_break_are_counted(tmp_path):
    model, path = wrapped(), tmp_path / "log.jsonl"
    monitor = lk.api.LandscapeMonitor(1, path)
    name = next(name for name in lk.api.snapshot(model))
    model.get_submodule(name).lora_A["default"].weight.data.fill_(math.nan)
    numbers = monitor.step(model)
    assert numbers["not_finite"] == 1 and math.isfinite(numbers["nuclear"])
    assert read_log(path)[0]["layers"][name]["nuclear"] is None
    for name in lk.api.snapshot(model):
        model.get_submodule(name).lora_A["default"].weight.data.fill_(math.inf)
    assert monitor.step(model)["not_finite"] == 4 and math.isnan(monitor.measure(model)["nuclear"])


def test_a_sane_run_and_a_hundred_times_its_rate_are_told_apart():
    verdicts = []
    for rate in (2e-3, 0.2):
        model = wrapped()
        train(model, rate, 20)
        verdicts.append(lk.diagnose(model).verdict.kind)
    assert verdicts == ["not_judged", "loud_failure"]


def test_bad_logs_and_arguments(tmp_path):
    with pytest.raises(ValueError, match="every"):
        lk.api.LandscapeMonitor(0)
    with pytest.raises(ValueError, match=r"must be a \.jsonl file"):
        read_log(tmp_path / "none.jsonl")
    path = tmp_path / "log.jsonl"
    good = json.dumps({"step": 1, "layers": {}})
    path.write_text(f'{good}\n\n{json.dumps({"step": 2, "layers": {}})}\n{{"step": 3, "lay')
    assert len(read_log(path)) == 2  # the last line was cut off
    for text, message in (
        ("", "no measurement"),
        (f"{{\n{good}", "line 1 of"),
        ('{"loss": 1}\n', "not written by"),
        ('{"step": "one", "layers": {}}\n', "not written by"),
        (f"[1]\n{good}", "not written by"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_log(path)


def trainer(model, folder, callbacks, **settings):
    from transformers import Trainer, TrainingArguments

    made = samples(12)
    data = [dict(zip(("input_ids", "labels"), each, strict=True)) for each in made]

    def collate(rows):
        return padded([(row["input_ids"], row["labels"]) for row in rows], len(rows))[0]

    settings = {"max_steps": 6, "logging_steps": 4, "report_to": "none", "save_strategy": "no", **settings}
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **settings
    )
    return Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=callbacks)


def reporter():
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Stands where TensorBoard's would: before the user's callbacks."""

        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append((state.global_step, dict(logs)))

    return Reporter()


def test_the_trainer_hands_the_numbers_to_every_callback(tmp_path):
    model, report, path = wrapped(), reporter(), tmp_path / "landscape.jsonl"
    callback = lk.api.LandscapeCallback(every=3, path=path)
    training = trainer(model, tmp_path, [report])
    assert callback.attach(training) is callback.attach(training) and report in training.callback_handler.callbacks
    before = [type(each).__name__ for each in training.callback_handler.callbacks]
    training.train()
    after = [type(each).__name__ for each in training.callback_handler.callbacks]
    assert sorted(before) == sorted(after) and after[0] == "LandscapeCallback"
    assert after.count("LandscapeCallback") == 1
    shown = {step: logs for step, logs in report.seen if "landscape/rank" in logs}
    assert sorted(shown) == [3, 6]
    history = {entry["step"]: entry for entry in training.state.log_history if "landscape/rank" in entry}
    lines = {line["step"]: line for line in read_log(path)}
    for step in (3, 6):
        assert "loss" in shown[step]
        for name in ("rank", "entropy_rank", "nuclear", "share", "balance", "not_finite"):
            assert shown[step][f"landscape/{name}"] == history[step][f"landscape/{name}"]
            assert lines[step][name] == pytest.approx(shown[step][f"landscape/{name}"])
    assert any(step == 4 and "landscape/rank" not in logs for step, logs in report.seen)  # its own cadence stays
    training.state.save_to_json(str(tmp_path / "state.json"))


def test_the_trainer_that_does_not_log_is_not_made_to(tmp_path):
    report, path = reporter(), tmp_path / "landscape.jsonl"
    training = trainer(
        wrapped(), tmp_path, [report, lk.api.LandscapeCallback(every=2, path=path)], logging_strategy="no", max_steps=4
    )
    training.train()
    assert [line["step"] for line in read_log(path)] == [2, 4]
    assert [step for step, _ in report.seen] == [4]  # the summary at the end


def test_the_callback_is_one_of_transformers_and_can_be_derived_from(tmp_path):
    from transformers import TrainerCallback

    class Louder(lk.api.LandscapeCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1
            return super().on_step_end(*args, **kwargs)

    louder = Louder(every=2)
    assert isinstance(louder, TrainerCallback) and isinstance(louder, lk.api.LandscapeCallback)
    training = trainer(wrapped(), tmp_path, [louder], max_steps=2)
    training.train()
    assert louder.steps == 2 and louder.monitor.latest
    assert training.callback_handler.callbacks.count(louder) == 1


def test_a_callback_that_comes_after_the_reporting_ones_says_so():
    from types import SimpleNamespace

    callback, model = lk.api.LandscapeCallback(every=1), wrapped()
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, log_history=[])
    with pytest.warns(RuntimeWarning, match=r"tensorboard gets the logs before .* use LandscapeCallback\(...\).attach"):
        callback.on_train_begin(SimpleNamespace(report_to=["tensorboard"]), state, None, model=model)
    control = SimpleNamespace(should_log=False)
    callback.on_step_end(SimpleNamespace(logging_strategy="steps"), state, control, model=model)
    assert control.should_log
    logs = {"loss": 1.0}
    callback.on_log(None, state, control, logs)
    assert "landscape/rank" in logs and state.log_history == []


class Wrapped(torch.nn.parallel.DistributedDataParallel):
    """Looks like it, without processes."""

    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module


def test_a_wrapped_model_is_looked_into():
    model = wrapped()
    one, other = (lk.api.LandscapeMonitor(1, drift=True) for _ in range(2))
    one.begin(Wrapped(model))
    assert one.step(Wrapped(model)) == other.step(model)


def test_a_resumed_run_measures_again_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [(step, run) for run, steps in enumerate(((5, 10, 15), (10, 15, 20), (5,), (5, 10))) for step in steps]
    path.write_text("".join(json.dumps({"step": step, "run": run, "layers": {}}) + "\n" for step, run in lines[:6]))
    assert [(each["step"], each["run"]) for each in latest_run(read_log(path))] == [(5, 0), (10, 1), (15, 1), (20, 1)]
    path.write_text("".join(json.dumps({"step": step, "run": run, "layers": {}}) + "\n" for step, run in lines))
    assert [(each["step"], each["run"]) for each in latest_run(read_log(path))] == [(5, 3), (10, 3)]


def test_a_log_that_was_cut_off_is_continued(tmp_path):
    path, model = tmp_path / "log.jsonl", wrapped()
    killed = lk.api.LandscapeMonitor(1, path)
    for _ in range(3):
        killed.step(model)
    path.write_bytes(path.read_bytes()[:-50])
    again = lk.api.LandscapeMonitor(1, path)
    for _ in range(2):
        again.step(model)
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 1, 2]
    assert [entry["step"] for entry in latest_run(read_log(path))] == [1, 2]
