"""`lk.suggest_learning_rate`: lines of known turn, first steps against the optimizers' own, and what stays."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.api import learning_rate as rates
from lora_kernels.runtime.modes import observation_mode
from tests.api.rate_ranks import wrapped as two_layers
from tests.statistics.models import padded, samples, tiny_llama

RUN_BY_TWO = "tests.api.rate_ranks"


class Regression(nn.Module):
    """`0.5 mean |W x - y|^2`, quadratic in either factor."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(7, 9, bias=False, dtype=torch.float64)

    def forward(self, x, y):
        return SimpleNamespace(loss=0.5 * (self.lin(x) - y).square().sum(-1).mean())


def regression(alpha=4, freeze_a=True):
    torch.manual_seed(0)
    model = get_peft_model(Regression(), LoraConfig(r=3, lora_alpha=alpha, target_modules=["lin"]))
    model.base_model.model.lin.lora_A["default"].weight.requires_grad_(not freeze_a)
    x = torch.randn(6, 7, dtype=torch.float64)
    return model, {"x": x, "y": torch.randn(6, 9, dtype=torch.float64)}


def llama(**settings):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(tiny_llama(hidden_size=48, intermediate_size=80), LoraConfig(**options))


def batches():
    return 2 * padded(samples(8), 4)  # one half for the step, the same for the loss


@pytest.fixture
def any_fall(monkeypatch):
    """Rates from flat lines, too: those of models with random weights."""
    monkeypatch.setattr(rates, "_LEAST_FALL", 0.0)


def tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


def state(model):
    return {name: (value.data_ptr(), value.detach().clone()) for name, value in tensors(model)}


def assert_as_it_was(model, before):
    for name, value in tensors(model):
        place, bits = before[name]
        assert value.data_ptr() == place and torch.equal(value, bits) and value.grad is None, name


@pytest.mark.parametrize("turn", [3e-8, 2e-5, 3e-4, 1e-3, 1.3e-3, 0.02, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_lowest_point_of_a_parabola(turn, scale):
    calls = []

    def loss_at(rate):
        calls.append(rate)
        return scale * (2.0 - rate / turn + 0.5 * (rate / turn) ** 2)

    points, found, reason = rates.find_turn(loss_at, 2.0 * scale)
    assert reason is None and found == pytest.approx(turn, rel=0.05)
    assert set(points) == {0.0, *calls} and len(calls) == len(set(calls))
    assert len(calls) <= 7 + 2 * abs(math.log10(turn / 1e-3))


def test_losses_that_overflow_lie_above_the_turn():
    def loss_at(rate):
        return math.nan if rate > 5e-5 else 1.0 - rate / 1e-5 + 0.5 * (rate / 1e-5) ** 2

    points, found, _ = rates.find_turn(loss_at, 1.0)
    assert found == pytest.approx(1e-5, rel=0.05) and math.inf in points.values()


@pytest.mark.parametrize(
    ("loss_at", "why"),
    [
        (lambda rate: 1.0 + rate, "no rate lowers the loss"),
        (lambda _: 1.0, "no rate lowers the loss"),
        (lambda _: math.nan, "no rate lowers the loss"),
        (lambda rate: -rate, "lowest at the last rate tried, 10"),
        (lambda rate: (rate / 1e-12 - 1.0) ** 2, "no rate lowers the loss"),
    ],
)
def test_lines_that_tell_no_rate(loss_at, why):
    points, found, reason = rates.find_turn(loss_at, 1.0)
    assert found is None and why in reason and points[0.0] == 1.0


def exact_turn(model, batch):
    """Of the quadratic in B, along Adam's first step."""
    layer = model.base_model.model.lin
    a, s, w = layer.lora_A["default"].weight, layer.scaling["default"], layer.base_layer.weight
    x, y = batch["x"], batch["y"]
    gradient = s * ((x @ w.mT - y).mT @ x / len(x)) @ a.mT
    moved = -s * gradient.sign() @ a
    return float((gradient.abs().sum()) / ((x @ moved.mT).square().sum() / len(x)))


@pytest.mark.parametrize("alpha", [0.5, 4, 64])
def test_a_quadratic_loss(alpha):
    model, batch = regression(alpha)
    advice = lk.suggest_learning_rate(model, [batch])
    assert advice.turn == pytest.approx(exact_turn(model, batch), rel=0.05)
    share = rates.SHARES["adamw"]
    assert (advice.low, advice.rate, advice.high) == tuple(advice.turn * part for part in share)
    assert advice.line[0] == (0.0, pytest.approx(float(model(**batch).loss)))
    assert advice.forward_passes == len(advice.line) + 1 and advice.backward_passes == 1  # A is not trained
    weight = model.base_model.model.lin.lora_B["default"].weight
    gradient = torch.autograd.grad(model(**batch).loss, weight)[0]
    for rate, loss in advice.line[1:]:
        with torch.no_grad():
            weight.copy_(-rate * gradient.sign())
            assert float(model(**batch).loss) == pytest.approx(loss, rel=1e-4)  # Adam's eps beside |gradient|


def test_the_turn_follows_the_scaling():
    turns = [lk.suggest_learning_rate(model, [batch]).turn for model, batch in (regression(4), regression(16))]
    assert turns[0] / turns[1] == pytest.approx(4.0, rel=0.1)
    plain, rslora = (get_turn(use_rslora=flag) for flag in (False, True))
    assert plain / rslora == pytest.approx(math.sqrt(4), rel=0.1)


def get_turn(**settings):
    model = llama(target_modules=["down_proj"], **settings)
    for name, value in model.named_parameters():
        value.requires_grad_("lora_B" in name)
    return lk.suggest_learning_rate(model, batches()).turn


def make_optimizer(name, model, rate):
    trained = [value for value in model.parameters() if value.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    return lk.create_lora_pro_optimizer(model, lr=rate, mode="full" if name == "lora_pro_full" else "efficient")


@pytest.mark.parametrize("name", rates.OPTIMIZERS)
@pytest.mark.parametrize("method", ["lora_ga", "eva"])
def test_the_step_is_the_optimizers_own(name, method):
    model, data, rate = llama(), batches(), 1e-3
    lk.initialize(model, data, method, progress=False, suggest_rate=False)
    probe = rates._Probe(model, None, None, "auto")
    pairs = [] if name == "adamw" else rates.find_pairs(model)
    with observation_mode(model, gradients=True):
        steps = rates._first_step(probe, name, pairs, probe.gradients(data[:1]))
        moved = rates._direction(probe, name, pairs, data[:1])
    before = [value.detach().clone() for value in probe.parameters]
    optimizer = make_optimizer(name, model, rate)
    model.eval()(**data[0]).loss.backward()
    optimizer.step()
    for value, start, step, later in zip(probe.parameters, before, steps, moved, strict=True):
        # Adam divides the smallest gradients by little more than themselves, rounding errors included.
        assert torch.linalg.norm(start + rate * step - value) <= 1e-2 * torch.linalg.norm(value - start)
        assert torch.equal(step, later) or (method == "eva" and not step.any())
    if method == "eva":  # A has no gradient while B = 0; its first step is that of the gradient after B's
        idle = [index for index, step in enumerate(steps) if not step.any()]
        assert len(idle) == len(steps) // 2
        assert all(bool(moved[index].any()) == (name != "lora_pro_full") for index in idle)
        if name == "adamw":
            for value, start, step in zip(probe.parameters, before, steps, strict=True):
                value.data = start + rates._SECOND_STEP * step
            model.zero_grad()
            model(**data[0]).loss.backward()
            for index in idle:
                gradient = probe.parameters[index].grad
                torch.testing.assert_close(moved[index], -gradient / (gradient.abs() + 1e-8), rtol=1e-3, atol=1e-3)


def dora():
    return llama(use_dora=True)


def rslora():
    return llama(use_rslora=True)


def head():
    return llama(modules_to_save=["lm_head"])


def bfloat16():
    return llama().to(torch.bfloat16)


def quarter():
    model = llama()
    lk.initialize(model, batches(), lk.init.LoraDA(population_size=8), progress=False, suggest_rate=False)
    return model


def frozen_start():
    model = llama()
    lk.initialize(model, batches(), "lora_ga", progress=False, suggest_rate=False)
    return model


def accelerated():
    model = frozen_start()
    lk.accelerate(model, strict=True)
    return model


def with_coordinates():
    model = llama()
    lk.LoraDash(k=2).attach(model)
    return model


KINDS = [dora, rslora, head, bfloat16, quarter, frozen_start, accelerated, with_coordinates]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("optimizer", ["adamw", "lora_pro_full"])
@pytest.mark.usefixtures("any_fall")
def test_every_kind_of_adapter_gets_a_rate_and_keeps_its_bits(make, optimizer):
    model = make()
    model.train()
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    before, random_state = state(model), torch.get_rng_state()
    advice = lk.suggest_learning_rate(model, batches(), optimizer=optimizer)
    assert advice.reason is None and advice.low < advice.rate < advice.high
    assert min(loss for _, loss in advice.line) < advice.line[0][1]
    assert_as_it_was(model, before)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert model.training and torch.equal(torch.get_rng_state(), random_state)


def test_fused_layers_give_the_line_of_stock_layers():
    stock, fused = (lk.suggest_learning_rate(make(), batches()) for make in (frozen_start, accelerated))
    assert stock.turn == pytest.approx(fused.turn, rel=1e-3)
    for one, other in zip(stock.line, fused.line, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.usefixtures("any_fall")
def test_experts():
    experts = pytest.importorskip("tests.training.test_experts")
    model = experts.wrapped()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.zero_()
    data = [{"input_ids": experts.IDS, "labels": experts.IDS}]
    before = state(model)
    advice = lk.suggest_learning_rate(model, data)
    assert advice.rate is not None and advice.backward_passes == 2
    assert_as_it_was(model, before)


@pytest.mark.parametrize("call", [0, 1, 4, 6, 9])
def test_everything_is_put_back_after_an_exception(call):
    model, data, calls = llama(), batches(), []
    before = state(model)

    def forward(module, batch):
        calls.append(1)
        if len(calls) > call:
            raise KeyboardInterrupt if call == 6 else ArithmeticError
        return module(**batch)

    with pytest.raises((KeyboardInterrupt, ArithmeticError)):
        lk.suggest_learning_rate(model, data, forward=forward)
    assert_as_it_was(model, before)
    assert model.training and {value.requires_grad for name, value in model.named_parameters() if "lora" in name} == {
        True
    }


def test_the_loss_is_that_of_other_batches():
    model, data = llama(), padded(samples(8), 4)
    losses = [lk.suggest_learning_rate(model, [batch]).line[0][1] for batch in data]
    assert lk.suggest_learning_rate(model, data).line[0][1] == losses[1] != losses[0]


def test_which_batches_are_read():
    model, data = llama(), 8 * padded(samples(2), 2)
    read = []

    def loader():
        for index, batch in enumerate(data):
            read.append(index)
            yield batch

    advice = lk.suggest_learning_rate(model, loader(), batches=3)
    assert read == [0, 1, 2] and advice.batches == 1
    assert advice.backward_passes == 4 and advice.forward_passes == 4 + len(advice.line)
    assert [lk.suggest_learning_rate(model, data[:count]).batches for count in (1, 2, 5)] == [1, 1, 2]
    assert lk.suggest_learning_rate(model, data).batches == 4
    by_hand = lk.suggest_learning_rate(
        model,
        data,
        batches=3,
        loss=lambda outputs, batch: outputs.loss * (batch["labels"][:, 1:] != -100).sum(),
        reduction="sum",
    )
    ratios = [mine[1] / theirs[1] for mine, theirs in zip(by_hand.line, advice.line, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)


def test_what_is_refused():
    model, data = llama(), batches()
    with pytest.raises(ValueError, match="optimizer is 'sgd', but must be one of 'adamw'"):
        lk.suggest_learning_rate(model, data, optimizer="sgd")
    with pytest.raises(TypeError, match="data must be an iterable"):
        lk.suggest_learning_rate(model, 3)
    with pytest.raises(ValueError, match="batches is 0"):
        lk.suggest_learning_rate(model, data, batches=0)
    with pytest.raises(TypeError, match="batches must be an int"):
        lk.suggest_learning_rate(model, data, batches=1.5)
    with pytest.raises(ValueError, match="yielded no batch"):
        lk.suggest_learning_rate(model, [])
    with pytest.raises(ValueError, match="every label is -100"):
        lk.suggest_learning_rate(model, [{**data[0], "labels": torch.full_like(data[0]["labels"], -100)}])
    with pytest.raises(ValueError, match="no scalar loss"):
        lk.suggest_learning_rate(model, [{"input_ids": data[0]["input_ids"]}])
    with pytest.raises(ValueError, match="the loss is nan before any step"):
        lk.suggest_learning_rate(model, data, loss=lambda outputs, _: outputs.loss * math.nan)
    with pytest.raises(ValueError, match="gradient holds NaN"):
        lk.suggest_learning_rate(model, data, loss=lambda outputs, _: outputs.loss + (outputs.loss * 0).sqrt())
    with pytest.raises(ValueError, match="no parameter requires a gradient"), model.disable_adapter():
        lk.suggest_learning_rate(model, data)
    with pytest.raises(ValueError, match="depends on no trained parameter"):
        lk.suggest_learning_rate(model, data, forward=lambda module, _: module.get_base_model().lm_head.weight.mean())
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        lk.suggest_learning_rate(tiny_llama().requires_grad_(False), data)


def test_dora_caching_is_refused():
    helpers = pytest.importorskip("peft.helpers")
    if not hasattr(helpers, "DoraCaching"):
        pytest.skip("this PEFT has no cache of DoRA's norms")
    with helpers.DoraCaching(), pytest.raises(ValueError, match="DoraCaching"):
        lk.suggest_learning_rate(dora(), batches())


def test_a_start_at_a_minimum_gets_a_reason():
    model, batch = regression()
    batch["y"] = batch["x"] @ model.base_model.model.lin.base_layer.weight.detach().mT
    advice = lk.suggest_learning_rate(model, [batch])
    assert advice.rate is None and "no rate lowers the loss" in advice.reason, advice
    assert "none suggested" in str(advice) and advice.judge(1.0) is None
    assert json.loads(advice.to_json())["rate"] is None


def test_a_flat_line_gives_no_rate():
    model, data = llama(), batches()
    flat = lk.suggest_learning_rate(model, data, loss=lambda outputs, _: outputs.loss + 1000.0)
    assert flat.rate is None and flat.turn is not None and "% only" in flat.reason


@pytest.mark.usefixtures("any_fall")
def test_the_report_says_it():
    model, _ = llama(), None
    report = lk.initialize(model, batches(), "eva", progress=False, learning_rate=50.0, suggest_rate=True)
    advice = report.learning_rate
    assert advice.rate is not None and advice.summary().split(";")[0] in str(report).replace("\n", " ")
    assert any("learning_rate=50 is above the range measured for adamw" in sentence for sentence in report.advice)
    assert report.seconds["rate"] > 0 and json.loads(report.to_json())["learning_rate"]["rate"] == advice.rate
    without = llama()
    assert lk.initialize(without, batches(), "eva", progress=False, suggest_rate=False).learning_rate is None
    for one, other in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)
    once = lk.initialize(llama(), iter(batches()), "eva", progress=False, suggest_rate=True)
    assert once.learning_rate.rate is None and "read once" in once.learning_rate.reason
    no_labels = [{"input_ids": batch["input_ids"]} for batch in batches()]
    assert (
        "no scalar loss"
        in lk.initialize(llama(), no_labels, "eva", progress=False, suggest_rate=True).learning_rate.reason
    )
    statistics = lk.collect(llama(), batches(), "eva", progress=False)
    of_statistics = lk.initialize(llama(), statistics=statistics, method="eva", progress=False, suggest_rate=True)
    assert of_statistics.learning_rate.reason == "no data was given"
    full = lk.initialize(llama(), batches(), "eva", progress=False, optimizer="lora_pro_full", suggest_rate=True)
    assert full.learning_rate.optimizer == "lora_pro_full"
    with pytest.raises(ValueError, match="optimizer is 'lion'"):
        lk.initialize(llama(), batches(), "eva", optimizer="lion", suggest_rate=True)


def test_two_processes_measure_the_line_of_all_their_batches(two_processes_ran):
    found = [json.loads((two_processes_ran / RUN_BY_TWO / f"{rank}.json").read_text()) for rank in (0, 1)]
    alone = lk.suggest_learning_rate(two_layers(), 2 * padded(samples(8), 2))
    for one in found:
        assert one["turn"] == found[0]["turn"] == pytest.approx(alone.turn, rel=1e-3)
        assert one["batches"] == 4
        for (rate, loss), (expected_rate, expected) in zip(one["line"], alone.line, strict=True):
            assert rate == expected_rate and loss == pytest.approx(expected, rel=1e-4)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index % 2)
        ids = torch.randint(0, 61, (7,), generator=generator)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", ["adamw", "lora_pro"])
def test_the_callback_measures_and_changes_nothing(tmp_path, capsys, name):
    from transformers import Trainer, TrainingArguments

    trained = []
    for callback in (None, lk.api.LearningRateCallback()):
        model = llama(lora_dropout=0.3)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=20.0 if name == "adamw" else 1e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            seed=5,
        )
        optimizer = None if name == "adamw" else lk.create_lora_pro_optimizer(model, lr=1e-3)
        callbacks = [] if callback is None else [callback]
        trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=callbacks, optimizers=(optimizer, None))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        trained.append([value.detach().clone() for value in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    assert callback.advice.optimizer == name
    assert f"learning rate for {name}" in capsys.readouterr().out
    if name == "adamw":
        assert callback.advice.rate is not None and callback.advice.batches == 4
        assert any("learning_rate=20 is above" in str(warning.message) for warning in caught)
