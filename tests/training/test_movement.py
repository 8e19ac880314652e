"""Steps that rounding swallows: they are named, and stochastic rounding lets them through."""

import copy
import gc
import warnings

import pytest
import torch

import lora_kernels as lk
from lora_kernels.training.guard import STEPS, Movement, trained_names
from lora_kernels.training.lora_pro import lora_pro_cls_and_kwargs
from lora_kernels.training.lora_pro.update import Rounding
from tests.statistics.models import padded, samples
from tests.training.test_accelerate import wrapped

BATCH = padded(samples(), 4)[0]


def half(**changes):
    torch.manual_seed(0)
    return wrapped(**changes).to(torch.bfloat16)


def swallowed(model, optimizer, rates):
    """The warnings of steps at these rates that name rounding."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            model(**BATCH).loss.backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if "swallows" in str(warning.message)]


def magnitudes(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "magnitude" in name}


@pytest.fixture(autouse=True)
def _nothing_awaited():
    Movement.awaited.clear()


def parts(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_lora_pro_names_what_does_not_move():
    model = half(use_dora=True)
    before = magnitudes(model)
    messages = swallowed(model, lk.create_lora_pro_optimizer(model, lr=1e-5), [1e-5] * 20)
    assert len(messages) == 1 and "bfloat16" in messages[0] and 'rounding="stochastic"' in messages[0]
    assert " 0 %" in messages[0]
    assert all(torch.equal(value, before[name]) for name, value in magnitudes(model).items())


def test_any_optimizer_of_an_accelerated_model_is_watched():
    model = half()
    lk.accelerate(model)
    optimizer = torch.optim.AdamW(parts(model), lr=1e-6)
    messages = swallowed(model, optimizer, [1e-6] * 20)
    assert len(messages) == 1 and (" A of " in messages[0] or " B of " in messages[0])
    assert Movement.watched[optimizer] is None and not Movement.awaited  # it has judged, and holds no copies
    strict = half()
    lk.accelerate(strict, strict=True)
    with pytest.raises(RuntimeError, match="swallows"):
        swallowed(strict, torch.optim.AdamW(parts(strict), lr=1e-6), [1e-6] * 20)


@pytest.mark.parametrize("rate", [1e-2, 0.0])
def test_nothing_is_said_where_all_moves_or_no_rate_is_set(rate):
    model = half()
    assert not swallowed(model, lk.create_lora_pro_optimizer(model, lr=1e-2), [rate] * 2 * STEPS)


def test_warm_up_is_waited_for():
    model = half()
    optimizer = torch.optim.AdamW(parts(model))
    lk.accelerate(model)
    rising = [1e-7 * 2**step for step in range(18)]  # up to 0.013
    assert not swallowed(model, optimizer, rising + [rising[-1]] * STEPS)
    assert Movement.watched[optimizer] is None  # it has judged


def test_float32_is_not_watched_and_unused_entries_do_not_count():
    model = wrapped()
    assert lk.create_lora_pro_optimizer(model, lr=1e-9) not in Movement.watched
    embedding = half(target_modules=["embed_tokens"])  # most tokens are not in the batch
    assert not swallowed(embedding, lk.create_lora_pro_optimizer(embedding, lr=1e-2), [1e-2] * STEPS)


def test_another_optimizer_is_left_alone():
    model = half()
    lk.accelerate(model)
    model(**BATCH).loss.backward()
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    other.grad = torch.ones_like(other)
    optimizer = torch.optim.SGD([other], lr=1e-9)
    for _ in range(2 * STEPS):
        optimizer.step()
    assert optimizer not in Movement.watched and len(Movement.awaited) == 1
    del model
    gc.collect()
    optimizer.step()
    assert not Movement.awaited  # the model is gone


def test_hooks_that_others_set_later_run_as_well():
    model, ran = half(), []
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-6)
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    assert len(swallowed(model, optimizer, [1e-6] * (STEPS + 2))) == 1
    assert ran == ["before", "after"] * (STEPS + 2)


def test_models_that_are_accelerated_again_and_again_leave_no_hooks_behind():
    model = half()
    for _ in range(3):
        lk.accelerate(model)
        swallowed(model, torch.optim.AdamW(parts(model), lr=1e-2), [1e-2] * 2)
        assert not Movement.awaited
    assert len(Movement._handles) == 2


def test_stochastic_rounding_keeps_the_mean_and_special_numbers():
    low, high = torch.tensor(1.0), torch.tensor(1.0 + 2.0**-7)  # neighbours in bfloat16
    value = (low + 0.25 * (high - low)).expand(200_000).contiguous()
    rounded = Rounding(7)(value)
    assert torch.equal(rounded, rounded.to(torch.bfloat16).float())
    share = (rounded == high).double().mean().item()
    assert ((rounded == low) | (rounded == high)).all() and abs(share - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5
    assert torch.equal(Rounding(7)(-value), -rounded)
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1.5])
    assert torch.equal(Rounding(1)(special), special)
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # of any bits
    assert nan.isnan().all() and Rounding(1)(nan).isnan().all()
    assert not torch.equal(Rounding(8)(value), rounded) and torch.equal(Rounding(7)(value), rounded)


@pytest.mark.parametrize("mode", ["efficient", "full"])
def test_stochastic_rounding_follows_float32(mode):
    rate, steps, moved = 1e-4, 40, {}
    for name in ("float32", "nearest", "stochastic"):
        torch.manual_seed(0)
        model = wrapped(use_dora=True)
        model = model if name == "float32" else model.to(torch.bfloat16)
        before = magnitudes(model)
        rounding = "stochastic" if name == "stochastic" else "nearest"
        optimizer = lk.create_lora_pro_optimizer(model, lr=rate, mode=mode, rounding=rounding)
        swallowed(model, optimizer, [rate] * steps)
        moved[name] = torch.cat([(value - before[key]).float().flatten() for key, value in magnitudes(model).items()])
    reference = moved["float32"]
    direction = reference.sign()
    along = {name: ((value * direction).mean() / reference.abs().mean()).item() for name, value in moved.items()}
    assert abs(along["nearest"]) < 0.05 and 0.6 < along["stochastic"] < 1.4, along


def test_a_resumed_run_rounds_to_the_same_bits():
    def run(model, optimizer, steps):
        swallowed(model, optimizer, [1e-3] * steps)

    torch.manual_seed(3)
    model = half()
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-3, rounding="stochastic")
    run(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(model)
    run(model, optimizer, 3)
    resumed = lk.create_lora_pro_optimizer(twin, lr=1e-3, rounding="stochastic")
    resumed.load_state_dict(saved)
    run(twin, resumed, 3)
    assert all(torch.equal(one, other) for one, other in zip(parts(model), parts(twin), strict=True))


def test_every_step_rounds_by_bits_of_its_own():
    optimizer = lk.create_lora_pro_optimizer(half(), lr=1e-3, rounding="stochastic")
    seeds = [optimizer._next_rounding().seed for _ in range(4)]
    assert len(set(seeds)) == 4 and optimizer.state_dict()["param_groups"][0]["steps"] == 4


class Decay(torch.optim.SGD):
    """Moves the entries without a gradient alone."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(torch.where(parameter.grad == 0, 0.5, 1.0))


def test_entries_without_a_gradient_that_move_do_not_count():
    model = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    model.weight.grad = torch.zeros_like(model.weight)
    model.weight.grad[0] = 1.0
    optimizer = Decay(model.parameters(), lr=0.1)
    Movement.watch(trained_names(model))
    with pytest.warns(RuntimeWarning, match="weight, 0 %"):
        for _ in range(STEPS):
            optimizer.step()


def test_rounding_is_checked():
    with pytest.raises(ValueError, match="rounding"):
        lk.create_lora_pro_optimizer(half(), lr=1e-3, rounding="up")
    assert lora_pro_cls_and_kwargs(half(), lr=1e-3, rounding="stochastic")[1]["rounding"] == "stochastic"
