"""An adapter with parts is one adapter: whatever PEFT does with it, they follow; every reader of its file is right."""

import copy
import io
import json
import warnings
from importlib import metadata

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import lora_kernels as lk
from lora_kernels.adapters import parts
from tests.adapters.start_models import (
    BATCH,
    TARGETS,
    assert_same_bits,
    layers,
    nudge,
    started,
    tensors,
    wrapped,
)
from tests.statistics.models import tiny_llama

# The weights of PEFT's svd combination before 0.21 have the scaling that the products have as well.
SCALES_TWICE = metadata.version("peft").startswith(("0.18.", "0.19.", "0.20."))


def logits(model, **more):
    model.eval()
    with torch.no_grad():
        return model(**{key: BATCH[key] for key in ("input_ids", "attention_mask")}, **more).logits


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def stock(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # PEFT before 0.20, of any head that is trained
        return PeftModel.from_pretrained(tiny_llama(), folder)


# The function that the adapter would have without its start, and without the adapter, are far from its own.
def test_the_parts_are_seen_by_these_tests():
    model = started()
    trained = logits(model)
    assert (logits(tiny_llama()) - trained).abs().max() > 0.05
    for layer in layers(model):
        parts.remove(layer, "default", parts.START)
    assert (logits(model) - trained).abs().max() > 0.01


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "bias": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": [3, 4]},
    "head": {"modules_to_save": ["lm_head"]},
    "task": {"task_type": "CAUSAL_LM"},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
}


@pytest.mark.parametrize("method", ["lora_ga", "pissa"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_saved_as_a_stock_adapter_and_taken_apart_again(tmp_path, settings, method):
    model = started(method, **SETTINGS[settings])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of embeddings that are saved whole
        model.save_pretrained(tmp_path)
        read = PeftModel.from_pretrained(tiny_llama(), tmp_path) if settings == "embedding" else stock(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert_close(logits(read), logits(model))
    assert type(read.peft_config["default"]) is LoraConfig
    kept = load_file(str(tmp_path / "adapter_model.safetensors"))
    assert not any("start" in name or "dash" in name for name in kept)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8 == max(value.shape[0] for name, value in kept.items() if ".lora_A." in name)
    for name, module in read.named_modules():
        if isinstance(module, LoraLayer):
            assert module.scaling["default"] == pytest.approx(model.get_submodule(name).scaling["default"])
    again = lk.load(tiny_llama(), tmp_path)
    assert_same_bits(again, model)
    assert torch.equal(logits(again), logits(model))
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert getattr(again.peft_config["default"], name) == getattr(model.peft_config["default"], name)
    assert "lora_kernels" not in (again.peft_config["default"].auto_mapping or {})
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name for name, each in again.named_parameters() if each.requires_grad} == trained
    assert not any(each.requires_grad for each in lk.load(tiny_llama(), tmp_path, is_trainable=False).parameters())


@pytest.mark.parametrize("name", ["default", "mine", "lora_start", "start"])
def test_another_name_and_a_folder_alone(tmp_path, name):
    model = started("pissa", adapter="first")
    model.save_pretrained(tmp_path, selected_adapters=["first"])
    folder = (tmp_path / "first").rename(tmp_path / "copied")
    for again in (lk.load(tiny_llama(), folder, adapter_name=name), lk.load(wrapped(name), folder, adapter_name=name)):
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
        inner = tmp_path / "again" if name == "default" else tmp_path / "again" / name
        assert_close(logits(stock(inner)), logits(model))


def test_loading_into_a_peft_model_checks_its_scaling(tmp_path):
    started().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has rank 4 and alpha 12, but the file was made for 4 and 6"):
        lk.load(wrapped(lora_alpha=12), tmp_path)
    with pytest.raises(ValueError, match="has rank 2"):
        lk.load(wrapped(r=2), tmp_path)
    with pytest.raises(TypeError, match="PEFT model already"):
        lk.load(wrapped(), tmp_path, low_cpu_mem_usage=True)
    plain = wrapped()
    nudge(plain)
    plain.save_pretrained(tmp_path / "plain")
    model = started()
    assert lk.load(model, tmp_path / "plain") is model
    assert torch.equal(logits(model), logits(plain)) and type(model.peft_config["default"]) is LoraConfig


def test_a_mark_that_is_malformed_is_refused(tmp_path):
    started().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for changes in ({"r": "4"}, {"dash": 3}, {"rank_pattern": None}, {"dash": {"k": 0}}):
        mark = {**config["auto_mapping"]["lora_kernels"], **changes}
        file.write_text(json.dumps({**config, "auto_mapping": {"lora_kernels": mark}}))
        with pytest.raises(ValueError, match=r"lora_kernels has|settings of LoRA-Dash"):
            lk.load(tiny_llama(), tmp_path)
    file.write_text(json.dumps({**config, "auto_mapping": {"lora_kernels": {**mark, "r": 3, "dash": None}}}))
    with pytest.raises(ValueError, match="cannot be loaded"):  # of another rank than the tensors have
        lk.load(tiny_llama(), tmp_path)


def test_scaling_reaches_all_of_it(tmp_path):
    model = started()
    for layer in layers(model):
        layer.set_scale("default", 0.0)
    assert torch.equal(logits(model), logits(tiny_llama()))
    for layer in layers(model):
        layer.set_scale("default", 1.0)
        layer.scale_layer(3.0)
    lk.export(model, tmp_path)
    assert_close(logits(stock(tmp_path)), logits(model))
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(logits(model), logits(started()))


def test_disabled_merged_and_unmerged():
    model = started()
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert_close(logits(model), expected)
        model.unmerge_adapter()
        assert_close(logits(model), expected)
    assert_close(logits(copy.deepcopy(model).unload()), logits(tiny_llama()))
    assert_close(logits(model.merge_and_unload()), expected)


def test_at_the_start_merging_changes_nothing():
    model = wrapped().bfloat16()
    lk.initialize(model, method="pissa", progress=False)
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert all(
        torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(layers(model), before, strict=True)
    )


def test_several_adapters(tmp_path):
    model = started()
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny_llama()))  # the first's start has gone with it
    lk.initialize(model, method="pissa", adapter_name="second", progress=False)
    nudge(model)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    size = len(BATCH["input_ids"])
    names = ["default", "second", "__base__", "default"][:size]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        alone = {"default": first, "second": second, "__base__": logits(tiny_llama())}[name]
        assert_close(mixed[row], alone[row])
    model.save_pretrained(tmp_path)
    assert_close(logits(stock(tmp_path)), first)
    assert_close(logits(stock(tmp_path / "second")), second)
    model.load_adapter(str(tmp_path), "third")  # what PEFT makes of the file
    model.set_adapter("third")
    assert_close(logits(model), first)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="svd", svd_rank=12)
    for kinds in (["default"], "svd"), (["default", "second"], "cat"), (["default", "second"], "linear"):
        with pytest.raises(ValueError, match="combination_type"):
            model.add_weighted_adapter(kinds[0], [1.0] * len(kinds[0]), "bad", combination_type=kinds[1])
    assert "bad" not in model.peft_config
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    again = [layer.scaling[name] if SCALES_TWICE else 1.0 for name in ("default", "second")]
    total = layer.get_delta_weight("default") * again[0] + layer.get_delta_weight("second") * again[1]
    assert_close(layer.get_delta_weight("both"), total)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name in tensors(model))
    model.add_adapter("default", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_deleted_alone():
    model = started()
    model.add_adapter("other", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not any(len(layer.lora_start) for layer in layers(model))
    assert not any(each.requires_grad for name, each in model.named_parameters() if ".other." not in name)


def test_copied_and_pickled(tmp_path):
    model = started()
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for number, twin in enumerate((copy.deepcopy(model), torch.load(file, weights_only=False))):
        assert torch.equal(logits(twin), expected)
        nudge(twin)
        for layer in layers(twin):
            layer.lora_start["default"].a.mul_(0.5)
        assert torch.equal(logits(model), expected)
        twin.save_pretrained(tmp_path / str(number))
        assert_close(logits(stock(tmp_path / str(number))), logits(twin))
        other = started("pissa")
        other.load_state_dict(twin.state_dict())
        assert_same_bits(other, twin)
    lone = copy.deepcopy(model.peft_config["default"])
    lone.save_pretrained(tmp_path / "lone")
    assert json.loads((tmp_path / "lone" / "adapter_config.json").read_text())["r"] == 8


def test_state_dicts():
    model, other = started(), started("pissa")
    whole = model.state_dict()
    assert not any(".lora_start." in name for name in whole)
    assert_close(torch.func.functional_call(model.eval(), whole, (), dict(BATCH)).logits, logits(model))
    set_model_state_dict(other, get_model_state_dict(model))
    assert_same_bits(other, model)
    plain = wrapped()
    nudge(plain)
    other.load_state_dict(plain.state_dict())  # which has no start
    assert torch.equal(logits(other), logits(plain))
    other.load_state_dict(whole)
    assert_same_bits(other, model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        plain.load_state_dict(whole)  # of a model that nobody has prepared
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(started(r=3).state_dict())


def test_tensors_that_were_gathered_elsewhere_are_joined_in_the_file(tmp_path):
    """DeepSpeed's ZeRO-3 gathers parameters and buffers without asking the layers."""
    model, _ = started(), None
    run = lk.LoraDash(k=3).attach(model)
    run.launch(torch.optim.SGD(model.parameters(), lr=0.1), progress=False)
    nudge(model)
    gathered = tensors(model)
    for name, directions in run.directions().items():
        gathered[f"{name}.lora_dash.default._extra_state"] = directions.get_extra_state()
    assert any(".lora_start." in name for name in gathered)
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert_close(logits(stock(tmp_path)), logits(model))
    assert_same_bits(lk.load(tiny_llama(), tmp_path), model)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    model = get_peft_model(
        tiny_llama().to(dtype), LoraConfig(r=4, target_modules=TARGETS), autocast_adapter_dtype=False
    )
    before = logits(model)
    lk.initialize(model, method="pissa", progress=False)
    torch.testing.assert_close(logits(model), before, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    nudge(model)
    model.save_pretrained(tmp_path)
    again = lk.load(tiny_llama().to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert_same_bits(again, model)


def test_gradients_are_those_of_the_factors():
    model = started()
    model.train()(**BATCH).loss.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    assert grads and all(".lora_A." in name or ".lora_B." in name for name in grads)
    twin = wrapped()
    with torch.no_grad():
        for layer, mine in zip(layers(twin), layers(model), strict=True):
            start = mine.lora_start["default"]
            layer.base_layer.weight.sub_(mine.scaling["default"] * start.b @ start.a)
            layer.lora_A["default"].weight.copy_(mine.lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(mine.lora_B["default"].weight)
    twin.train()(**BATCH).loss.backward()
    for name, each in twin.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(grads[name], each.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", ["eager", "accelerated"])
def test_accelerated_models_keep_it(path):
    model = started()
    expected = logits(model)
    if path == "accelerated":
        lk.accelerate(model, strict=True)
    assert_close(logits(model), expected)
    lk.restore(model)
    assert torch.equal(logits(model), expected)


def more_than_a_product(kind):
    simple = {"dora": {"use_dora": True}, "alora": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}}
    if kind in simple:
        return simple[kind]
    config = getattr(lora_config, {"kasa": "KasaConfig", "monteclora": "MontecloraConfig"}[kind], None)
    return {f"{kind}_config": config()} if config else pytest.skip(f"this PEFT has no {kind}")


@pytest.mark.parametrize("kind", ["dora", "kasa", "monteclora", "alora"])
def test_what_cannot_have_a_start_is_refused_before_anything_changes(kind):
    model = wrapped(**more_than_a_product(kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loader():
        raise AssertionError("data was read")
        yield

    with pytest.raises(ValueError, match="cannot start away from zero"):
        lk.initialize(model, loader(), method="lora_ga", progress=False)
    assert type(model.peft_config["default"]) is LoraConfig
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_base_that_a_start_has_changed_is_named(tmp_path):
    for model in (wrapped(), wrapped(init_lora_weights="pissa"), wrapped(init_lora_weights="olora")):
        if model.peft_config["default"].init_lora_weights is True:
            lk.initialize(model, method="pissa", base="mutate", progress=False)
        before = logits(model)
        with pytest.raises(ValueError, match="base weights"):
            lk.export(model, tmp_path / "stock")
        with pytest.raises(ValueError, match="cannot start again"):
            lk.initialize(model, method="pissa", force=True, progress=False)
        assert torch.equal(logits(model), before) and not (tmp_path / "stock").exists()
