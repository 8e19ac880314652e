"""Whatever happens during a collection, the model is left as it was, and the message says what happened."""

import os
import signal
import threading

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.statistics import STATISTICS
from tests.statistics.models import padded, samples, tiny_llama

NAN = float("nan")


def state(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: each.requires_grad for name, each in model.named_parameters()},
        {
            name: (each.training, len(each._forward_hooks), len(each._forward_pre_hooks))
            for name, each in model.named_modules()
        },
        {name: None if each.grad is None else each.grad.clone() for name, each in model.named_parameters()},
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        getattr(model.config, "use_cache", None),
    )


def check_untouched(model, before):
    after = state(model)
    for name, value in before[0].items():
        assert torch.equal(
            value,
            after[0][name],
        ) or bool(value.isnan().any()), name
    assert before[1] == after[1] and before[2] == after[2]
    for name, value in before[3].items():
        assert (value is None) == (after[3][name] is None)
    assert torch.equal(before[4], after[4]) and before[5:] == after[5:]


def fail(error, pattern, data, *, model=None, **options):
    model = tiny_llama().train() if model is None else model
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    with pytest.raises(error, match=pattern):
        lk.collect(model, data, STATISTICS, progress=False, **options)
    check_untouched(model, before)
    if all(bool(each.isfinite().all()) for each in model.parameters()) and not any(
        m._forward_hooks for m in model.modules()
    ):
        stats = lk.collect(model, padded(samples(2), 2), STATISTICS, progress=False)  # and it can be tried again
        assert stats.batches == 1


def test_an_exception_inside_a_forward():
    batches = padded(samples(4), 2)
    batches[1]["input_ids"] = batches[1]["input_ids"] + 1000
    fail(IndexError, "index out of range", batches)


def test_an_exception_of_the_loader_and_of_the_loss():
    def loader():
        yield padded(samples(2), 2)[0]
        raise OSError("disk gone")

    fail(OSError, "disk gone", loader())

    def loss(outputs, _batch):
        raise KeyError("nothing here")

    fail(KeyError, "nothing here", padded(samples(2), 2), loss=loss)


def test_ctrl_c():
    batches = padded(samples(4), 2)
    # A process that a shell starts in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupting(list):
        def __iter__(self):
            yield batches[0]
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()
            signal.pause()
            yield batches[1]

    try:
        fail(KeyboardInterrupt, None, Interrupting())
    finally:
        signal.signal(signal.SIGINT, before)


def test_nan_in_one_layers_weights_names_the_first_layer_that_reads_it():
    model = tiny_llama().train()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = NAN
    fail(
        ValueError, r"non-finite input .* model.layers.0.mlp.gate_proj.* in batch 0", padded(samples(2), 2), model=model
    )


def test_nan_that_only_gradients_have():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, g):
            return g * NAN

    model = tiny_llama().train()
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: Root.apply(out))
    fail(
        ValueError,
        r"non-finite gradient .* in layer model.layers.0.self_attn.q_proj in batch 0",
        padded(samples(2), 2),
        model=model,
    )
    handle.remove()


def test_skipped_rows_are_counted_and_the_rest_is_right():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x).square().sum(1).nan_to_num().sum()  # a bad row adds nothing

    torch.manual_seed(0)
    model, x = Poisoned().double(), torch.randn(6, 4).double()
    clean = lk.collect(model, [x[1:]], STATISTICS, reduction="sum", dtype=torch.float64, progress=False)
    bad = x.clone()
    bad[0, 0] = NAN
    with pytest.raises(ValueError, match="non-finite input"):
        lk.collect(model, [bad], STATISTICS, progress=False)
    found = lk.collect(model, [bad], STATISTICS, nonfinite="skip", reduction="sum", dtype=torch.float64, progress=False)
    assert found.skipped_rows["a"] >= 1
    assert found["a"].input.tokens == found["a"].sums["fisher"].tokens == 5
    torch.testing.assert_close(found["a"].sums["gradient"].total, clean["a"].sums["gradient"].total)
    torch.testing.assert_close(found["a"].sums["fisher"].total, clean["a"].sums["fisher"].total)
    torch.testing.assert_close(found["a"].input.covariance(), clean["a"].input.covariance())


def test_a_loss_that_is_not_finite_or_not_there():
    fail(ValueError, "the loss is nan in batch 0", padded(samples(2), 2), loss=lambda outputs, _: outputs.loss * NAN)
    fail(ValueError, "does not depend on any observed layer", padded(samples(2), 2), loss=lambda *_: torch.ones(()))
    without = [{key: value for key, value in batch.items() if key != "labels"} for batch in padded(samples(2), 2)]
    fail(ValueError, "from a batch without labels", without)


def test_an_empty_loader():
    fail(ValueError, "loader is empty", [])
    fail(ValueError, "loader is empty", iter(()))


def test_an_all_masked_batch_among_others_and_alone():
    batches = padded(samples(4), 2)
    masked = {
        **batches[1],
        "attention_mask": batches[1]["attention_mask"] * 0,
        "labels": batches[1]["labels"] * 0 - 100,
    }
    fail(ValueError, "no token was counted in 1 batches", [masked])
    stats = lk.collect(tiny_llama(), [batches[0], masked], STATISTICS, progress=False)
    alone = lk.collect(tiny_llama(), [batches[0]], STATISTICS, progress=False)
    name = "model.layers.0.mlp.down_proj"
    assert stats.batches == 2 and stats[name].tokens == alone[name].tokens and stats.loss_items == alone.loss_items
    torch.testing.assert_close(stats[name].sums["gradient"].total, alone[name].sums["gradient"].total)
    torch.testing.assert_close(stats[name].input.second.tril(), alone[name].input.second.tril())


def test_all_labels_ignored():
    batches = [{**batch, "labels": batch["labels"] * 0 - 100} for batch in padded(samples(4), 2)]
    fail(ValueError, "every label is -100", batches)
    assert lk.collect(tiny_llama(), batches, "input_second", progress=False).tokens > 0


def test_bad_options():
    batches = padded(samples(2), 2)
    for options, pattern in (
        ({"wants": "hessian"}, "wants"),
        ({"wants": "pissa"}, "needs no statistics"),
        ({"weighting": "epoch"}, "weighting"),
        ({"reduction": "median"}, "reduction"),
        ({"form": "rough"}, "form"),
        ({"sketch_size": 0}, "sketch_size"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"dtype": torch.float16}, "dtype"),
        ({"budget": "lots"}, "budget"),
        ({"budget": 100}, "alone takes"),
    ):
        with pytest.raises(ValueError, match=pattern):
            lk.collect(tiny_llama(), batches, progress=False, **options)
    with pytest.raises(TypeError, match="unknown option speed"):
        lk.collect(tiny_llama(), batches, speed=3)
