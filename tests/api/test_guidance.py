"""The report's predictions against what training does."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from lora_kernels.api.guidance import WARNING, advice, outlook
from lora_kernels.init.problem import LoraFactors
from lora_kernels.statistics import Statistics
from tests.statistics.models import padded, samples, tiny_llama

EMPTY = Statistics()


def wrapped(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes}
    return get_peft_model(tiny_llama(torch.float64, hidden_size=48, intermediate_size=80), LoraConfig(**settings))


def loss_of(model, batches):
    """Mean loss over items, as the statistics take it."""
    total = items = 0.0
    for batch in batches:
        count = int((batch["labels"][:, 1:] != -100).sum())
        logits = model(**{**batch, "labels": None}).logits[:, :-1]  # the model's own loss is float32
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()) * count
        items += count
    return total / items


@pytest.mark.parametrize("method", ["lora_ga", "pissa", "eva"])
def test_first_step_is_what_adam_does(method):
    model, batches = wrapped(), padded(samples(), 4)
    stats = lk.collect(model, batches, ("input_second", "gradient"), dtype=torch.float64, progress=False)
    report = lk.initialize(model, statistics=stats, method=method, progress=False)
    model.eval()
    rate = 1e-6
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-30)
    before = loss_of(model, batches)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        change = float(loss_of(model, batches) - before) / rate
    predicted = sum(each.first_step for each in report if each.rank)
    assert change < 0 and abs(predicted / change - 1) < 0.02


def test_start_change_is_what_the_start_does():
    model, batches = wrapped(), padded(samples(), 4)
    stats = lk.collect(model, batches, lk.init.LoraDA(), dtype=torch.float64, weighting="token", progress=False)
    with torch.no_grad():
        before = float(loss_of(model.eval(), batches))
    with pytest.warns(RuntimeWarning, match="collected with"):
        report = lk.initialize(
            model, statistics=stats, method=lk.init.LoraDA(gamma=3e4, population_size=8), progress=False
        )
    with torch.no_grad():
        change = float(loss_of(model.eval(), batches)) - before
    predicted = sum(each.start_change for each in report)
    assert change < 0 and abs(predicted / change - 1) < 0.05


def test_a_kept_function_does_not_change_the_loss():
    model, batches = wrapped(), padded(samples(), 4)
    assert {each.start_change for each in lk.initialize(model, batches, "lora_ga", progress=False)} == {0.0}


def test_step_ratio_of_stock_lora_is_one_and_follows_the_factors():
    module = wrapped(r=16, target_modules=["down_proj"]).base_model.model.model.layers[0].mlp.down_proj
    a, b = (getattr(module, name)["default"].weight.detach() for name in ("lora_A", "lora_B"))
    assert outlook(LoraFactors(a, b), 2.0, EMPTY, "l", offset=False)["step_ratio"] == pytest.approx(1.0, abs=0.05)
    generator = torch.Generator().manual_seed(0)
    big = LoraFactors(3 * a, torch.randn(b.shape, generator=generator, dtype=b.dtype) / 8)
    signs = [torch.randn(each.shape, generator=generator, dtype=b.dtype).sign() for each in (a, b)]
    moved = torch.linalg.norm(big.B @ signs[0] + signs[1] @ big.A) / torch.linalg.norm(signs[1] @ a)
    assert outlook(big, 2.0, EMPTY, "l", offset=True)["step_ratio"] == pytest.approx(float(moved), rel=0.1)


def test_first_step_from_a_sketch():
    batches = padded(samples(), 4)
    reports = []
    for form in ("exact", "sketch"):
        model = get_peft_model(
            tiny_llama(hidden_size=160, intermediate_size=512), LoraConfig(r=2, target_modules=["down_proj"])
        )
        reports.append(lk.initialize(model, batches, "lora_ga", form=form, sketch_size=24, progress=False))
    for exact, sketched in zip(*reports, strict=True):
        assert sketched.solver == "two_sided"
        assert sketched.first_step == pytest.approx(exact.first_step, rel=0.3)


def test_warns_where_a_lora_rate_meets_a_start_away_from_zero():
    batches, model = padded(samples(), 4), wrapped()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "base_layer" in name:
                value *= 50  # to the singular values of a trained model
    with pytest.warns(RuntimeWarning, match=r"pissa starts at B != 0, and learning_rate=0.001"):
        report = lk.initialize(model, method=lk.init.PiSSA(), learning_rate=1e-3, progress=False)
    assert any("full fine-tuning" in each for each in report.advice) and report.advice[-1] in str(report).replace(
        "\n", " "
    )
    json.loads(report.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        lk.initialize(wrapped(), method=lk.init.PiSSA(), learning_rate=2e-5, progress=False)
        lk.initialize(wrapped(), batches, "eva", learning_rate=1e-3, progress=False)
    with pytest.raises(ValueError, match="learning_rate"):
        lk.initialize(wrapped(), method=lk.init.PiSSA(), learning_rate=-1.0)


def test_advice():
    assert advice("m", [], starts_away=True, full_rate=False, learning_rate=1e-3) == ()
    assert advice("m", [1.0, 1.2], starts_away=True, full_rate=False, learning_rate=1e-3) == ()
    (slower,) = advice("m", [5.0], starts_away=False, full_rate=False, learning_rate=1e-3)
    assert "5.0 times smaller" in slower and not slower.startswith(WARNING)
    assert advice("m", [0.1], starts_away=True, full_rate=False, learning_rate=1e-3) == ()
    assert advice("m", [5.0], starts_away=True, full_rate=False, learning_rate=1e-3)[-1].startswith(WARNING)
    calm = advice("m", [5.0], starts_away=True, full_rate=False, learning_rate=5e-5)
    assert not any(sentence.startswith(WARNING) for sentence in calm)


def test_step_ratio_is_measured_by_steps_of_random_sign():
    torch.manual_seed(0)
    m, n, rank = 40, 400, 6
    stock = LoraFactors((torch.rand(rank, n) * 2 - 1) / n**0.5, torch.zeros(m, rank))
    start = LoraFactors(torch.randn(rank, n) / 5, torch.randn(m, rank))

    def moved(factors):
        def sign(like):
            return torch.randint(0, 2, like.shape) * 2.0 - 1.0

        steps = [sign(factors.B) @ factors.A + factors.B @ sign(factors.A) for _ in range(50)]
        return sum(float(each.square().sum()) for each in steps) ** 0.5

    ratio = outlook(start, 1.0, EMPTY, "layer", offset=True)["step_ratio"]
    assert abs(ratio / (moved(start) / moved(stock)) - 1) < 0.05


@pytest.mark.parametrize("alpha", [8, -8])
def test_a_first_step_goes_down_whatever_the_sign_of_the_scaling(alpha):
    model, batches = wrapped(lora_alpha=alpha), padded(samples(), 4)
    stats = lk.collect(model, batches, ("input_second", "gradient"), progress=False)
    found = lk.initialize(model, statistics=stats, method="eva", progress=False)
    assert all(each.first_step < 0 for each in found if each.rank)
