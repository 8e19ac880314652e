import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.statistics import STATISTICS
from lora_kernels.statistics.masks import BatchWeights, UnassignedRowsError
from lora_kernels.statistics.sums import Accumulator
from tests.conftest import relative_error
from tests.statistics.models import Experts, account, padded, samples, tiny_llama

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.k_proj",
    "lm_head",
]


def gather(model, batches, wants=STATISTICS, **options):
    options = {"dtype": torch.float64, "targets": NAMES, **options}
    return lk.collect(model, batches, wants, progress=False, **options)


def compare(stats, truth, tolerance):
    for name in truth:
        layer, sums = stats[name], truth[name]
        n = layer.sums["fisher"].tokens
        assert n == layer.input.tokens == sums["rows"]
        assert relative_error(layer.sums["gradient"].total, sums["gradient"]) < tolerance
        assert relative_error(layer.sums["fisher"].total, sums["fisher"]) < tolerance
        assert relative_error(layer.input.covariance(center=False) * n, sums["input"]) < tolerance
        assert relative_error(layer.sums["output_second"].covariance(center=False) * n, sums["output"]) < tolerance


@pytest.mark.parametrize("size", [1, 4, 3])
def test_every_statistic_equals_single_sample_autograd_whatever_the_batch_size(size):
    made = samples()
    truth, items = account(tiny_llama(torch.float64), made, NAMES)
    stats = gather(tiny_llama(torch.float64), padded(made, size))
    compare(stats, truth, 1e-12)
    assert stats.loss_items == items and stats.samples == len(made)
    expected = truth["lm_head"]["gradient"] / items
    torch.testing.assert_close(stats["lm_head"].gradient(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [1, 4])
def test_sample_weighting_is_the_loop_over_single_samples(size):
    made = samples()
    truth, items = account(tiny_llama(torch.float64), made, NAMES, per_sample=True)
    stats = gather(tiny_llama(torch.float64), padded(made, size), weighting="sample")
    compare(stats, truth, 1e-6)  # transformers computes the loss in float32
    assert stats.loss_items == items == len(made)
    token = gather(tiny_llama(torch.float64), padded(made, size))
    assert relative_error(token["lm_head"].sums["fisher"].total, stats["lm_head"].sums["fisher"].total) > 0.1


def test_float32_sums_of_a_float32_model():
    made = samples(16)
    truth, _ = account(tiny_llama(torch.float64), made, NAMES)
    compare(gather(tiny_llama(), padded(made, 4), dtype=torch.float32), truth, 2e-5)


def test_the_mean_over_items_is_what_accumulated_training_steps_see():
    """Four micro-batches of four, divided as transformers' Trainer does (by all items), give the mean gradient."""
    made = samples(16)
    model = tiny_llama(torch.float64)
    batches = padded(made, 4)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    stats = gather(tiny_llama(torch.float64), batches, "gradient")
    for name, module in model.named_modules():
        if name in NAMES:
            assert relative_error(stats[name].gradient(), module.weight.grad) < 1e-6  # a loss in float32


def test_labels_mask_changes_the_fisher_and_second_moments_but_not_the_gradient():
    made = samples()
    batches = padded(made, 4)
    everything, masked = (
        gather(tiny_llama(torch.float64), batches),
        gather(tiny_llama(torch.float64), batches, mask="next_labels"),
    )
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(masked[name].sums["gradient"].total, everything[name].sums["gradient"].total)
    assert masked[name].sums["fisher"].tokens < everything[name].sums["fisher"].tokens
    assert (masked[name].sums["fisher"].total <= everything[name].sums["fisher"].total * (1 + 1e-12)).all()
    assert relative_error(masked[name].sums["fisher"].total, everything[name].sums["fisher"].total) > 1e-3
    # The head's gradient is zero where there is no label: there the mask removes nothing.
    torch.testing.assert_close(masked["lm_head"].sums["fisher"].total, everything["lm_head"].sums["fisher"].total)


def test_model_is_left_as_it_was():
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    kept = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    gather(model, padded(samples(), 4), dtype=torch.float32)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
    assert all(module.training for module in model.modules())
    assert model.lm_head.weight.grad is kept and bool((kept == 1).all())
    assert [name for name, each in model.named_parameters() if each.grad is not None] == ["lm_head.weight"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_weight_gradient_is_ever_computed(monkeypatch):
    model = tiny_llama()
    seen = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: seen.append(name))
    gather(model, padded(samples(), 4), dtype=torch.float32)
    assert seen == []


def test_a_loss_and_a_forward_of_the_users_own():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    data = [(torch.randn(5, 6).double(), torch.randn(5, 4).double()) for _ in range(3)]
    stats = lk.collect(
        model,
        data,
        ("gradient", "fisher"),
        forward=lambda model, batch: model(batch[0]),
        loss=lambda outputs, batch: (outputs - batch[1]).square().mean(),
        dtype=torch.float64,
        progress=False,
    )
    mirror = copy.deepcopy(model)
    total = sum(5 * (mirror(x) - y).square().mean() for x, y in data)  # a mean over samples, undone
    total.backward()
    assert relative_error(stats["0"].sums["gradient"].total, mirror[0].weight.grad) < 1e-12
    assert relative_error(stats["2"].sums["gradient"].total, mirror[2].weight.grad) < 1e-12
    assert stats.loss_items == 15


def test_reduction_can_be_a_sum_a_name_or_a_function():
    torch.manual_seed(1)
    model = nn.Linear(6, 4).double()
    data = [(torch.randn(rows, 6).double(), torch.randn(rows, 4).double()) for rows in (5, 2)]

    def run(reduction, loss):
        settings = {"forward": lambda model, batch: model(batch[0]), "loss": loss, "reduction": reduction}
        stats = lk.collect(model, data, "gradient", dtype=torch.float64, progress=False, **settings)
        return stats[""].sums["gradient"].total, stats.loss_items

    def squares(outputs, batch):
        return (outputs - batch[1]).square().sum(1)

    by_sum, _ = run("sum", lambda outputs, batch: squares(outputs, batch).sum())
    by_name, items = run("samples", lambda outputs, batch: squares(outputs, batch).mean())
    by_function, weighed = run(
        lambda batch: torch.full((len(batch[0]),), 3.0), lambda outputs, batch: squares(outputs, batch).mean() / 3
    )
    assert relative_error(by_name, by_sum) < 1e-12 and items == 7
    assert relative_error(by_function, by_sum) < 1e-12 and weighed == 21
    with pytest.raises(ValueError, match=r"reduction\(batch\) has shape \(2,\)"):
        run(lambda batch: torch.ones(2), lambda outputs, batch: squares(outputs, batch).mean())
    with pytest.raises(ValueError, match="needs integer batch"):
        run("tokens", lambda outputs, batch: squares(outputs, batch).mean())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_counted_once(reentrant):
    made = samples()
    truth, _ = account(tiny_llama(torch.float64), made, NAMES)
    model = tiny_llama(torch.float64)
    for layer in model.model.layers:
        plain = layer.forward

        def again(hidden, *args, plain=plain, **kwargs):
            # The input must require a gradient for reentrant checkpoints, as `enable_input_require_grads` does it.
            hidden = hidden if hidden.requires_grad else hidden.clone().requires_grad_(True)
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: plain(hidden, *args, **kwargs), hidden, use_reentrant=reentrant
            )

        layer.forward = again
    compare(gather(model, padded(made, 4)), truth, 1e-12)


def test_experts_with_few_or_no_tokens():
    torch.manual_seed(3)
    model = Experts().double()
    batches = [{"input_ids": torch.randint(0, 50, (2, 6)), "labels": torch.randint(0, 5, (2, 6))} for _ in range(4)]
    stats = lk.collect(model, batches, STATISTICS, dtype=torch.float64, progress=False, mask=None)
    assert not stats["experts.3.0"].sums and "never called" in stats["experts.3.0"].notes[0]
    mirror = copy.deepcopy(model)
    sum(12 * mirror(**batch)[0] for batch in batches).backward()
    route = torch.cat(
        [torch.where(b["input_ids"].flatten() % 50 < 1, 2, b["input_ids"].flatten() % 2) for b in batches]
    )
    for number in range(3):
        layer = stats[f"experts.{number}.0"]
        assert layer.input.tokens == layer.sums["fisher"].tokens == int((route == number).sum())
        if layer.tokens:
            assert relative_error(layer.sums["gradient"].total, mirror.experts[number][0].weight.grad) < 1e-12
    assert stats["head"].tokens == 48


def test_a_layer_that_the_loss_does_not_reach_says_so():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            self.idle(x)
            return self.used(x).square().mean()

    stats = lk.collect(Two(), [torch.randn(5, 4)], "gradient", progress=False)
    assert any("no gradient was counted" in note for note in stats["idle"].notes)
    assert not stats["used"].notes
    assert float(stats["idle"].sums["gradient"].total.abs().max()) == 0.0


def test_outputs_changed_in_place_and_inputs_changed_in_place():
    class InPlace(nn.Module):
        def __init__(self, spoil):
            super().__init__()
            self.a, self.b, self.spoil = nn.Linear(4, 4), nn.Linear(4, 4), spoil

        def forward(self, x):
            y = self.a(x)
            y += 1.0
            if self.spoil:
                x.mul_(2.0)
            return self.b(y.relu_()).square().mean()

    x = torch.randn(5, 4).double()
    model = InPlace(False).double()
    stats = lk.collect(model, [x.clone()], ("gradient", "fisher"), dtype=torch.float64, progress=False)
    mirror = copy.deepcopy(model)
    (5 * mirror(x)).backward()
    assert relative_error(stats["a"].sums["gradient"].total, mirror.a.weight.grad) < 1e-12
    with pytest.raises(RuntimeError, match="layer a was changed in place after"):
        lk.collect(InPlace(True).double(), [x.clone()], "gradient", dtype=torch.float64, progress=False)


def test_sums_of_two_halves_add_to_the_whole():
    made = samples(8)
    whole = gather(tiny_llama(torch.float64), padded(made, 4))
    parts = [gather(tiny_llama(torch.float64), padded(half, 4)) for half in (made[:4], made[4:])]
    for name in NAMES:
        total = sum(part[name].sums["gradient"].total for part in parts)
        assert relative_error(total, whole[name].sums["gradient"].total) < 1e-12
    assert sum(part.loss_items for part in parts) == whole.loss_items


def test_factors_of_samples_follow_the_layout_of_rows():
    weights = BatchWeights(tokens=torch.ones(3, 5, dtype=torch.bool), factors=torch.tensor([1.0, 2.0, 4.0]))
    by_sample = torch.tensor([1.0, 2.0, 4.0]).unsqueeze(1).expand(3, 5)
    assert torch.equal(weights.row_factors(torch.Size([3, 5])), by_sample)
    assert torch.equal(weights.row_factors(torch.Size([15])), by_sample.reshape(-1))
    assert torch.equal(weights.row_factors(torch.Size([5, 3])), by_sample.mT)  # (tokens, batch)
    assert torch.equal(weights.row_factors(torch.Size([5, 3, 2])), by_sample.mT.unsqueeze(-1).expand(5, 3, 2))
    with pytest.raises(UnassignedRowsError):
        weights.row_factors(torch.Size([7]))


def test_a_statistic_is_one_class():
    class OutputSum(Accumulator):
        kind = statistic = "output_sum"
        words = "sum of the output gradients"
        features_of = "out_features"

        def __init__(self, features, device, dtype=torch.float32):
            self.features, self.count = features, torch.zeros((), dtype=torch.float64, device=device)
            self.total = torch.zeros(features, dtype=dtype, device=device)

        def add(self, call):
            self.total += call.g.flatten(0, -2).sum(0)

        def mean_over(self, loss_items):
            return self.total / loss_items

    try:
        model, batches = (
            nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
            torch.randn(2, 6, 5).double(),
        )
        loss = {"loss": lambda outputs, _: outputs.square().mean(), "reduction": lambda batch: torch.full((6,), 3.0)}
        stats = gather(model, batches, ("output_sum", "fisher"), targets=["2"], mask=None, **loss)
        expected = (2 * model(batches.flatten(0, 1))).sum(0) / stats.loss_items
        torch.testing.assert_close(stats["2"].mean("output_sum"), expected.detach())
        assert torch.equal(stats["2"].mean("fisher"), stats["2"].fisher())
        with pytest.raises(ValueError, match="no gradient: collect it with wants"):
            stats["2"].mean("gradient")
    finally:
        del Accumulator.statistics["output_sum"], Accumulator.kinds["output_sum"]
