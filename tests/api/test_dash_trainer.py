"""LoRA-Dash in transformers' Trainer: in the optimizer from the start, and resumed bit by bit."""

import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lora_kernels as lk
from tests.training.dash_models import adam, wrapped


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 61, (7,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trainer(folder, *, steps=6, accelerated=False, dropout=0.0, callback=None, **settings):
    model = wrapped(lora_dropout=dropout)
    if accelerated:
        lk.accelerate(model, strict=True)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=5,
        **settings,
    )
    callback = callback or lk.api.LoraDashCallback(lk.LoraDash(k=3, pre_launch=3))
    return Trainer(model, arguments, train_dataset=Data(), eval_dataset=Data(), callbacks=[callback]), callback


def adapter(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("accelerated", [False, True])
def test_resumed_before_the_switch_at_it_and_after_it(tmp_path, accelerated):
    whole, callback = trainer(tmp_path / "whole", accelerated=accelerated, dropout=0.1)
    whole.train()
    held = {id(each) for group in whole.optimizer.param_groups for each in group["params"]}
    assert all(id(each) in held for each in callback.run.coordinates())
    assert len(whole.optimizer.param_groups) <= 2  # decay and no decay: nothing was added later
    assert callback.run.launched and callback.run.steps == 3
    assert all(bool(each.any()) for each in callback.run.coordinates())
    assert {int(whole.optimizer.state[each]["step"]) for each in callback.run.coordinates()} == {3}
    for checkpoint in (2, 3, 5):
        again, resumed = trainer(tmp_path / "again", accelerated=accelerated, dropout=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{checkpoint}"))
        assert resumed.run.launched
        expected = adapter(whole.model)
        for name, value in adapter(again.model).items():
            assert torch.equal(value, expected[name]), (checkpoint, name)


def test_accumulation_and_evaluation_do_not_count(tmp_path):
    run_of = lk.api.LoraDashCallback(lk.LoraDash(k=3, pre_launch=3))
    made, _ = trainer(
        tmp_path, steps=4, callback=run_of, gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=1
    )
    seen = []
    original = type(run_of).on_evaluate

    def on_evaluate(self, args, state, control, **kwargs):
        seen.append((state.global_step, run_of.run.launched))
        return original(self, args, state, control, **kwargs)

    run_of.on_evaluate = on_evaluate.__get__(run_of)
    made.train()
    assert seen == [(1, False), (2, False), (3, True), (4, True)]


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    made = Trainer(wrapped(), arguments, train_dataset=Data())
    made.add_callback(lk.api.LoraDashCallback())
    with pytest.raises(RuntimeError, match=r"pass it to Trainer\(callbacks"):
        made.train()
    with pytest.raises(TypeError, match="config must be a LoraDash"):
        lk.api.LoraDashCallback(3)


def test_an_optimizer_of_ones_own(tmp_path):
    model = wrapped()
    lk.LoraDash(k=3, pre_launch=2).attach(model)  # again by the callback
    arguments = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
    callback = lk.api.LoraDashCallback(lk.LoraDash(k=3, pre_launch=2))
    made = Trainer(model, arguments, train_dataset=Data(), callbacks=[callback], optimizers=(adam(model), None))
    made.train()
    assert all(bool(each.any()) for each in callback.run.coordinates())


def test_importing_the_package_imports_no_transformers():
    code = "import sys, lora_kernels as lk; lk.api.LandscapeMonitor; "
    code += "assert 'transformers' not in sys.modules and 'peft' not in sys.modules; "
    code += "lk.LoraDash(); assert 'peft' not in sys.modules; assert issubclass(lk.api.LoraDashCallback, object)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lk.nothing
