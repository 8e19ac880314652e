"""transformers' Trainer resumes to the bit: every start, every optimizer, before LoRA-Dash's switch and after it."""

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import lora_kernels as lk
from tests.adapters.resume_runs import KINDS, METHODS, STEPS, Data, begun, resumed, trainer
from tests.adapters.start_models import BATCH, assert_same_bits, started, tensors, wrapped
from tests.helpers.warm import Warm
from tests.statistics.models import tiny_llama


@pytest.fixture(autouse=True)
def no_model_cards(monkeypatch):
    """PEFT compiles the template of the card anew for each checkpoint: half the time of saving one."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)


def logits(model):
    with torch.no_grad():
        return model.eval()(**{key: BATCH[key] for key in ("input_ids", "attention_mask")}).logits


def run_of(method, kind):
    slow = method not in ("eva", "lora_ga") and kind not in ("adamw", "own lora_pro dash")
    return pytest.param(method, kind, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("method", "kind"), [run_of(method, kind) for method in METHODS for kind in KINDS])
def test_the_trainer_resumes_to_the_bit(tmp_path, method, kind):
    whole = begun(method)
    trainer(whole, tmp_path / "whole", kind).train()
    saved = tmp_path / "whole" / f"checkpoint-{STEPS}"
    stock = PeftModel.from_pretrained(tiny_llama(), saved)
    torch.testing.assert_close(logits(stock), logits(whole), rtol=1e-5, atol=2e-6)
    for step in (2, 4):  # before LoRA-Dash's switch, and after it
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        for fresh in (begun(method), lk.load(tiny_llama(), checkpoint)):
            again = resumed(fresh, tmp_path / "again", kind, checkpoint)
            assert_same_bits(again, whole)
            assert torch.equal(logits(again), logits(whole))


@pytest.fixture(scope="module")
def processes():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with Warm(("torch", "peft", "transformers"), environment) as made:
        yield made


@pytest.mark.parametrize("method", ["lora_ga", pytest.param("eva", marks=pytest.mark.slow)])
def test_another_process_resumes_to_the_bit(tmp_path, method, processes):
    whole = begun(method)
    trainer(whole, tmp_path / "whole", "own lora_pro dash").train()
    for again in (method, ""):
        out = tmp_path / f"again {again}"
        out.mkdir()
        arguments = [again, "own lora_pro dash", str(tmp_path / "whole" / "checkpoint-2"), str(out)]
        done = processes.run("tests.adapters.resume_runs", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
        found, expected = torch.load(out / "tensors.pt"), tensors(whole)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_models_that_a_checkpoint_is_loaded_into(tmp_path):
    """A model of another start takes the checkpoint's; one without a start is told of `lk.load`."""
    whole = begun("lora_ga")
    trainer(whole, tmp_path / "whole", "adamw").train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for fresh in (begun("pissa"), lk.load(wrapped(lora_dropout=0.1), checkpoint)):
        assert_same_bits(resumed(fresh, tmp_path / "again", "adamw", checkpoint), whole)
    bare = wrapped(lora_dropout=0.1)
    with pytest.raises(RuntimeError, match="size mismatch"):
        resumed(bare, tmp_path / "again", "adamw", checkpoint)
    lk.accelerate(bare)
    before = tensors(bare)
    with pytest.raises(RuntimeError, match=r"rank 8 but is of rank 4 .* lora_kernels\.load\(model, folder\)"):
        resumed(bare, tmp_path / "again", "adamw", checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in tensors(bare).items())
    lk.load(bare, checkpoint)
    assert all(type(each).__mro__[1].__name__ == "FusedForward" for each in bare.modules() if hasattr(each, "lora_A"))
    twin = lk.load(tiny_llama(), checkpoint)
    lk.accelerate(twin)
    one = resumed(bare, tmp_path / "again", "adamw", checkpoint)
    assert_same_bits(one, resumed(twin, tmp_path / "twin", "adamw", checkpoint))


@pytest.mark.parametrize("kind", ["late adamw dash", "late lora_pro dash"])
def test_an_optimizer_that_was_made_without_coordinates_gets_them(tmp_path, kind):
    whole = wrapped()
    made = trainer(whole, tmp_path / "whole", kind)
    coordinates = [each for name, each in whole.named_parameters() if name.endswith(".coordinates")]
    held = made.optimizer.param_groups[0]["params"]
    assert len(coordinates) == 6 and all(any(each is other for other in held[-6:]) for each in coordinates)
    made.train()
    assert all(bool(each.any()) for each in coordinates)
    for step in (2, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert_same_bits(resumed(wrapped(), tmp_path / "again", kind, checkpoint), whole)
        loaded = lk.load(tiny_llama(), checkpoint)  # whose coordinates come before the optimizer
        with pytest.raises((RuntimeError, ValueError), match="another order|different number of parameter groups"):
            resumed(loaded, tmp_path / "again", kind, checkpoint)


def test_an_optimizer_without_the_factors_is_refused_before_training(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    model, other = started(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="holds no factor of the adapter"):
        Trainer(model, arguments, train_dataset=Data(), optimizers=(other, None), callbacks=[lk.api.LoraDashCallback()])

    class Forgetful(Trainer):
        def create_optimizer(self, model=None):
            trained = [each for name, each in self.model.named_parameters() if ".lora_A." in name]
            self.optimizer = torch.optim.SGD(trained, lr=0.1)
            return self.optimizer

    made = Forgetful(wrapped(), arguments, train_dataset=Data(), callbacks=[lk.api.LoraDashCallback()])
    with pytest.raises(RuntimeError, match="optimizer does not hold the coordinates"):
        made.train()
    assert made.state.global_step == 0
