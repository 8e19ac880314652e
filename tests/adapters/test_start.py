"""Starts away from zero: a frozen part of the adapter keeps the function, and both leave as one stock adapter."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_kernels as lk
from lora_kernels.adapters.export import compress
from lora_kernels.init import LayerFactors, LoraFactors
from lora_kernels.init.method import LayerwiseMethod
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama
from tests.statistics.test_models import quantized

BATCH = padded(samples(4), 4)[0]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Principal(LayerwiseMethod):
    """The leading triplets of W, split evenly: the simplest method that starts away from zero."""

    wants: ClassVar[dict] = {}
    offsets_base: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True

    def solve(self, layers):
        for layer in layers:
            u, s, vh = torch.linalg.svd(layer.weight(), full_matrices=False)
            root = (s[: layer.rank] / layer.scaling).sqrt()
            factors = LoraFactors(
                (root.unsqueeze(1) * vh[: layer.rank]).contiguous(), (u[:, : layer.rank] * root).contiguous()
            )
            yield LayerFactors(factors, float("nan"), 0.0, "svd")


Principal.name = "principal"  # set after the class is made, so that the registry does not learn it


def wrapped(base=None, **changes):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "lora_dropout": 0.3, **changes}
    return get_peft_model(tiny_llama() if base is None else base, LoraConfig(**settings))


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**{key: BATCH[key] for key in ("input_ids", "attention_mask")}).logits


def train(model, steps=3):
    model.train()
    optimizer = torch.optim.AdamW(
        (each for each in model.parameters() if each.requires_grad), lr=1e-2, weight_decay=0.1
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rslora", [False, True])
def test_the_function_and_the_base_are_kept_and_the_start_stays_frozen(rslora):
    base = tiny_llama()
    before, weights = logits(base), {name: value.clone() for name, value in base.state_dict().items()}
    model = wrapped(base, use_rslora=rslora)
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    report = lk.initialize(model, method=Principal())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
    frozen = {name: each.clone() for name, each in model.named_buffers() if ".lora_start." in name}
    assert len(frozen) == 2 * len(report.layers) and all(each.status == "initialised" for each in report.layers)
    assert all(0.1 < each.start_share < 1 for each in report.layers)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    train(model)
    assert relative_error(logits(model), before) > 1e-3
    for name, each in model.named_buffers():
        if name in frozen:
            assert torch.equal(each, frozen[name])
    for name, value in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain in weights:
            assert torch.equal(value, weights[plain]), name


def test_export_is_a_stock_adapter_for_the_untouched_base(tmp_path):
    model = wrapped()
    lk.initialize(model, method=Principal())
    train(model)
    trained = logits(model)
    found = lk.export(model, tmp_path / "exact")
    assert {each.rank for each in found.values()} == {8} and {each.error for each in found.values()} == {0.0}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "exact")
    assert relative_error(logits(again), trained) < 1e-5
    assert relative_error(logits(wrapped()), trained) > 1e-3
    errors = []
    for rank in (6, 2):
        found = lk.export(model, tmp_path / str(rank), rank=rank)
        assert {each.rank for each in found.values()} == {rank}
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / str(rank))
        errors.append((relative_error(logits(again), trained), max(each.error for each in found.values())))
    assert 0 < errors[0][1] < errors[1][1] < 1 and errors[0][0] < errors[1][0]
    merged = copy.deepcopy(model).merge_and_unload()
    assert relative_error(logits(merged), trained) < 1e-5


def test_export_of_an_adapter_that_started_at_zero(tmp_path):
    model = wrapped(modules_to_save=["lm_head"])
    train(model)
    found = lk.export(model, tmp_path / "plain")
    assert {each.rank for each in found.values()} == {4}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rank is 'half'"):
        lk.export(model, tmp_path / "bad", rank="half")
    with pytest.raises(ValueError, match="rank"):
        lk.export(model, tmp_path / "bad", rank=0)
    with pytest.raises(ValueError, match="adapter_name"):
        lk.export(model, tmp_path / "bad", adapter_name="other")
    assert not (tmp_path / "bad").exists()


def test_mutate_changes_the_base_as_peft_does():
    before, model, stock = logits(tiny_llama()), wrapped(), wrapped(init_lora_weights="pissa")
    lk.initialize(model, method=Principal(), base="mutate")
    assert not any(".lora_start." in name for name, _ in model.named_buffers())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    theirs = dict(stock.named_parameters())
    for name, value in model.named_parameters():
        if "base_layer" in name:
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6)


def test_quantized_bases_are_kept_intact():
    base = quantized("nf4")

    def logits(model):  # in evaluation mode bitsandbytes may pack the weights, and no gradient would flow
        with torch.no_grad():
            return model(**{key: BATCH[key] for key in ("input_ids", "attention_mask")}).logits

    before, model = logits(base), wrapped(base, lora_dropout=0.0)
    with pytest.raises(ValueError, match='quantized base, or one .* only base="intact"'):
        lk.initialize(model, method=Principal(), base="mutate")
    lk.initialize(model, method=Principal())
    assert relative_error(logits(model), before) < 1e-5
    train(model)
    assert relative_error(logits(model), before) > 1e-3


def test_starting_again_removes_the_old_start():
    model = wrapped()
    before = logits(model)
    lk.initialize(model, method=Principal())
    with pytest.raises(ValueError, match="lora_B that is not zero"):
        lk.initialize(model, method=Principal())
    lk.initialize(model, method=Principal(), force=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)
    lk.initialize(model, [BATCH], "eva", force=True, progress=False)
    assert (
        type(model.peft_config["default"]) is LoraConfig and model.state_dict().keys() == wrapped().state_dict().keys()
    )
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_several_adapters_with_starts_of_their_own():
    model = wrapped()
    before = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    lk.initialize(model, method=Principal())
    lk.initialize(model, method=Principal(), adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_dora_is_refused_before_anything_is_read():
    model = wrapped(use_dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        lk.initialize(model, method=Principal())
    assert list(model.peft_config) == ["default"]


def test_compress_is_the_best_of_its_rank():
    torch.manual_seed(0)
    a, b = torch.randn(6, 30).double(), torch.randn(20, 6).double()
    u, s, vh = torch.linalg.svd(b @ a)
    small_a, small_b, error = compress(a, b, 3)
    torch.testing.assert_close(small_b @ small_a, u[:, :3] * s[:3] @ vh[:3])
    torch.testing.assert_close(small_a @ small_a.mT, small_b.mT @ small_b)
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-9)
    assert compress(a * 0, b, 2)[2] == 0.0


def test_a_classifier_keeps_its_one_trained_head(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=61, pad_token_id=0
    )
    base = LlamaForSequenceClassification(config).eval()
    plain = copy.deepcopy(base)
    inputs = {key: BATCH[key] for key in ("input_ids", "attention_mask")}
    before = base(**inputs).logits.detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS"))
    for _ in range(2):  # a second time replaces the start
        lk.initialize(model, method=Principal(), force=True)
        torch.testing.assert_close(model.eval()(**inputs).logits.detach(), before, rtol=1e-4, atol=1e-5)
    heads = [name for name, each in model.named_parameters() if "score" in name and each.requires_grad]
    assert heads == ["base_model.model.score.modules_to_save.default.weight"]
    train_labels = {**inputs, "labels": torch.zeros(len(BATCH["input_ids"]), dtype=torch.long)}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model(**train_labels).loss.backward()
    optimizer.step()
    trained = model(**inputs).logits.detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    model.save_pretrained(tmp_path / "both")
    lk.export(model, tmp_path / "stock")
    for loaded in (
        lk.load(copy.deepcopy(plain), tmp_path / "both"),
        PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "stock"),
    ):
        torch.testing.assert_close(loaded.eval()(**inputs).logits.detach(), trained, rtol=1e-4, atol=1e-5)


def test_a_named_adapter_loads_with_its_start(tmp_path):
    base = tiny_llama()
    before = logits(copy.deepcopy(base))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=TARGETS), adapter_name="mine")
    lk.initialize(model, method=Principal(), adapter_name="mine")
    model.save_pretrained(tmp_path)
    loaded = lk.load(base, tmp_path / "mine", adapter_name="mine")
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)
    assert sum(".lora_start.mine." in name for name, _ in loaded.named_buffers()) == 2 * len(TARGETS) * 2
