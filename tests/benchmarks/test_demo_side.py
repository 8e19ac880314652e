import itertools
import math

import pytest
import torch

pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo.side import DivergedError, Recipe, mean_loss, prepare
from benchmarks.demo.texts import IGNORED, Encoder, word_problems


@pytest.fixture(scope="module")
def base(tiny_decoder):
    return AutoModelForCausalLM.from_pretrained(tiny_decoder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches(tiny_decoder):
    """The first batches of word problems."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.pad_token = tokenizer.eos_token
    return list(itertools.islice(Encoder(tokenizer, 96).shuffled(word_problems(4).train, 4, 0), 6))


def trained(recipe, base, batches, rate=1e-2, **options):
    side = prepare("side", recipe, base, rate, batches[:2], steps=len(batches), rank=4, **options)
    for batch in batches:
        side.step(batch)
    return side


def test_accelerated_layers_train_as_stock_ones(base, batches):
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    stock, fused = (trained(Recipe(accelerate=accelerate), base, batches) for accelerate in (False, True))
    assert fused.train_loss == pytest.approx(stock.train_loss, rel=1e-4) and stock.train_loss[-1] < stock.train_loss[0]
    assert len(fused.step_seconds) == 6 and fused.seconds == fused.start_seconds + sum(fused.step_seconds)
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert not any("lora" in name for name, _ in base.named_modules())


RECIPES = {
    "eva": Recipe("eva", accelerate=True),
    "lora_ga": Recipe("lora_ga", accelerate=True),
    "pissa": Recipe("pissa"),
    "lora_pro": Recipe(optimizer="lora_pro"),
    "lora_pro_efficient": Recipe(optimizer="lora_pro_efficient"),
    "lora_dash": Recipe(dash=0.5),
    "dora": Recipe(use_dora=True),
    "rslora": Recipe(use_rslora=True),
}


def test_every_recipe_trains_in_its_own_way(base, batches):
    losses = {name: trained(recipe, base, batches, rate=3e-3).train_loss for name, recipe in RECIPES.items()}
    losses["random"] = trained(Recipe(), base, batches, rate=3e-3).train_loss
    assert len({round(loss[-1], 5) for loss in losses.values()}) == len(losses)
    # All but starts that move the function begin where the base model is.
    assert all(loss[0] == pytest.approx(losses["random"][0], rel=1e-4) for loss in losses.values())


def test_the_rate_is_warmed_up_and_stays(base, batches):
    side = prepare("side", Recipe(), base, 0.1, [], steps=30, rank=2)
    rates = []
    for _ in range(5):
        side.step(batches[0])
        rates.append(side.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.1])


def test_the_held_out_loss_is_a_mean_over_tokens(base, batches):
    logits = base(**{name: batches[0][name] for name in ("input_ids", "attention_mask")}).logits[:, :-1]
    labels = batches[0]["labels"][:, 1:]
    truth = torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED])
    halves = [{name: tensor[rows] for name, tensor in batches[0].items()} for rows in (slice(0, 1), slice(1, 4))]
    base.train()
    assert mean_loss(base, halves) == pytest.approx(float(truth), rel=1e-5)
    assert base.training
    base.eval()


def test_a_loss_that_is_not_finite_ends_the_run(base, batches):
    side = prepare("ours", Recipe(), base, 0.1, [], steps=2, rank=2)
    with torch.no_grad():
        side.parameters[0].fill_(math.nan)
    message = "loss of ours is nan after 0 steps, but must be finite; its learning rate is 0.1"
    with pytest.raises(DivergedError, match=f"training {message}"):
        side.step(batches[0])
    with pytest.raises(DivergedError, match=f"held-out {message}"):
        side.evaluate(batches)
