"""LoRA-Pro for PEFT models: which pairs are found, with which scaling, and under transformers' Trainer."""

import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import lora_kernels as lk
from lora_kernels.training.lora_pro.model import find_pairs
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama
from tests.training.test_accelerate import wrapped

BATCH = padded(samples(), 4)[0]


def train(model, optimizer, steps=3):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model):
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("mode", ["efficient", "full"])
def test_a_model_learns_and_every_trained_parameter_moves(mode):
    model = wrapped(modules_to_save=["lm_head", "norm"], target_modules=["q_proj", "embed_tokens"])
    before = trained(model)
    optimizer = lk.create_lora_pro_optimizer(model, lr=5e-3, mode=mode, weight_decay=0.1)
    losses = train(model, optimizer, 12)
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(before[name], each) for name, each in trained(model).items())
    pairs, matrices, vectors = optimizer.param_groups
    names = {id(each): name for name, each in model.named_parameters()}
    of = [[names[id(each)] for each in group["params"]] for group in (pairs, matrices, vectors)]
    assert len(of[0]) == 6 and sum("lora_embedding" in name for name in of[0]) == 2
    assert len(of[1]) == 1 and "lm_head" in of[1][0]
    assert len(of[2]) == 5 and all("norm" in name for name in of[2])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    embedding = next(each for each in pairs["params"] if "lora_embedding_B" in names[id(each)])
    shape = (24, 61) if mode == "full" else (24, 4)
    assert optimizer.state[embedding]["exp_avg"].shape == shape


def test_scaling_is_that_of_each_layer_and_adapter_now():
    model = wrapped(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5})
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj"]))
    for name, each in model.named_parameters():
        each.requires_grad_("lora_" in name)
    found = {}
    for a, b, scaling, _ in find_pairs(model):
        found.setdefault((len(a), b.shape[1]), set()).add(round(scaling(), 6))
    assert found == {(2, 2): {3.0}, (4, 4): {1.5, 1.25}, (3, 3): {round(7 / 3**0.5, 6)}}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    scaling = next(s for a, _, s, _ in find_pairs(model) if a is layer.lora_A["default"].weight)
    layer.scale_layer(2.0)
    assert scaling() == 6.0


def test_the_step_uses_the_scaling_of_the_moment():
    results, gradients = [], {}
    for factor in (1.0, 3.0):
        model = wrapped()
        optimizer = lk.create_lora_pro_optimizer(model, lr=1e-3, mode="full")
        for name, layer in model.named_modules():
            if name.endswith(("q_proj", "v_proj", "down_proj")):
                layer.scale_layer(factor)
        model(**BATCH).loss.backward()
        for name in trained(model):  # the same gradients, so that the scaling alone differs
            each = model.get_parameter(name)
            each.grad.copy_(gradients.setdefault(name, each.grad.clone()))
        optimizer.step()
        results.append(trained(model))
    moved = [results[k]["base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"] for k in range(2)]
    start = trained(wrapped())["base_model.model.model.layers.0.mlp.down_proj.lora_B.default.weight"]
    # H does not depend on s here (Adam's first step is a sign), so that the adjusted step goes with 1/s.
    assert relative_error(moved[0] - start, 3 * (moved[1] - start)) < 1e-2


def test_dora_magnitudes_get_adamw_and_factors_are_pairs():
    model = wrapped(use_dora=True)
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-3)
    assert len(optimizer.param_groups[0]["params"]) == 12 and len(optimizer.param_groups[1]["params"]) == 6
    train(model, optimizer, 1)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


def test_factors_that_are_no_pair_get_adamw_and_a_warning():
    model = get_peft_model(Convolutions(), LoraConfig(r=2, target_modules=["conv", "linear"]))
    with pytest.warns(RuntimeWarning, match=r"1 LoRA layers get plain AdamW: .*convolution.* \(1\)"):
        optimizer = lk.create_lora_pro_optimizer(model, lr=1e-2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    model = wrapped()
    for name, each in model.named_parameters():
        if "lora_A" in name and "v_proj" in name:
            each.requires_grad_(False)
    with pytest.warns(RuntimeWarning, match=r"2 LoRA layers get plain AdamW: one factor is frozen \(2\)"):
        optimizer = lk.create_lora_pro_optimizer(model, lr=1e-2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 2]
    train(model, optimizer, 1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(3, 6, 5)), nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(torch.einsum("eoi,bi->bo", self.weight, x))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


def test_factors_of_several_experts_in_one_matrix_are_a_pair_each():
    config = LoraConfig(r=2, target_modules=["linear"], target_parameters=["experts.weight"])
    model = get_peft_model(Mixture(), config)
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-2)
    (group,) = optimizer.param_groups
    shapes = [tuple(value.shape) for value in group["params"]]
    assert sorted(shapes) == [(2, 6), (4, 2), (6, 5), (6, 6)]
    assert sorted(pair.experts for pair in optimizer._pairs) == [1, 3]


def test_models_without_pairs_are_refused():
    for model in (tiny_llama(), wrapped()):
        model.requires_grad_(False)
        for make in (
            partial(lk.create_lora_pro_optimizer, lr=1e-3),
            partial(lk.training.lora_pro_cls_and_kwargs, lr=1e-3),
        ):
            with warnings.catch_warnings(), pytest.raises(ValueError, match="trains no LoRA pair"):
                warnings.simplefilter("error")
                make(model)
    with pytest.raises(TypeError, match="got weight_decay"):
        lk.training.lora_pro_cls_and_kwargs(wrapped(), lr=1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="mode is 'fast'"):
        lk.create_lora_pro_optimizer(wrapped(), lr=1e-3, mode="fast")


# -- transformers' Trainer ---------------------------------------------------------------------------------------------


def trainer(folder, way, mode, steps, **options):
    model = wrapped(modules_to_save=["lm_head"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=7e-3,
        weight_decay=0.05,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    rows = [{"input_ids": ids[:4], "labels": labels[:4]} for ids, labels in samples(12)]
    options = {"mode": mode, **({"state_dtype": torch.bfloat16} if mode == "full" else {})}
    if way == "optimizers":
        optimizer = lk.create_lora_pro_optimizer(model, lr=7e-3, weight_decay=0.05, **options)
        return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    found = lk.training.lora_pro_cls_and_kwargs(model, lr=7e-3, **options)
    return Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=found)


@pytest.mark.parametrize("mode", ["efficient", "full"])
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_trainer_trains_and_resumes_to_the_same_bits(tmp_path, way, mode):
    torch.manual_seed(1)
    through = trainer(tmp_path / "one", way, mode, 4)
    start = trained(through.model)
    through.train()
    assert through.optimizer.optimizer.mode == mode and len(through.optimizer.optimizer._pairs) == 6
    assert all(not torch.equal(start[name], each) for name, each in trained(through.model).items())
    torch.manual_seed(2)
    second = trainer(tmp_path / "two", way, mode, 4)
    second.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    resumed = trained(second.model)
    for name, each in trained(through.model).items():
        assert torch.equal(each, resumed[name]), name


def test_both_ways_into_the_trainer_are_one(tmp_path):
    results = []
    for way in ("optimizers", "optimizer_cls_and_kwargs"):
        torch.manual_seed(1)
        made = trainer(tmp_path / way, way, "efficient", 3)
        made.train()
        results.append(trained(made.model))
    assert all(torch.equal(each, results[1][name]) for name, each in results[0].items())
