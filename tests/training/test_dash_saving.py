"""LoRA-Dash on disk: saved and loaded, told from stock adapters, exported as one."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

import lora_kernels as lk
from tests.conftest import relative_error
from tests.statistics.models import tiny_llama
from tests.training.dash_models import BATCHES, adam, dashed, linear, wrapped

BATCH = BATCHES[0]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("after", [False, True])
def test_saved_and_loaded_bit_by_bit(tmp_path, after, adapter):
    model = wrapped()
    if adapter != "default":
        model.add_adapter(adapter, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter(adapter)
    run = lk.LoraDash(k=3, pre_launch=2).attach(model)
    optimizer = adam(model)
    for _ in range(4 if after else 1):
        model(**BATCH).loss.backward()
        optimizer.step()
        run.step(optimizer)
    model.save_pretrained(tmp_path, selected_adapters=[adapter])
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    kept = load_file(str(folder / "adapter_model.safetensors"))
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_dash"
    assert {f"{q}.coordinates", f"{q}.left", f"{q}._extra_state"} <= kept.keys()
    rank = model.get_submodule(q.removesuffix(".lora_dash")).r[adapter]
    assert kept[q.replace("lora_dash", "lora_A.weight")].shape[0] == rank + (3 if after else 0)
    assert not any(adapter in name for name in kept)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = lk.load(tiny_llama(), folder, adapter_name=adapter)
    assert not [each for each in said if issubclass(each.category, UserWarning)]
    own = {name: value for name, value in state(model).items() if f".{adapter}" in name}
    assert_equal(state(loaded), own)
    taken = lk.LoraDash(k=3, pre_launch=2).attach(loaded)
    assert taken.launched is after and taken.steps == run.steps == (2 if after else 1)
    assert torch.equal(logits(loaded), logits(model))
    assert all(each.requires_grad for each in taken.coordinates())
    frozen = lk.load(tiny_llama(), folder, adapter_name=adapter, is_trainable=False)
    assert not any(each.requires_grad for each in frozen.parameters())

    attached = wrapped()  # into an adapter that is there, as a Trainer does
    if adapter != "default":
        attached.add_adapter(adapter, LoraConfig(r=2, target_modules=["q_proj"]))
        attached.set_adapter(adapter)
    again = lk.LoraDash(k=3, pre_launch=2).attach(attached)
    attached.load_adapter(str(folder), adapter, is_trainable=True)
    assert again.launched is after and again.steps == run.steps
    assert_equal({name: value for name, value in state(attached).items() if f".{adapter}" in name}, own)


def test_a_plain_state_dict_has_everything():
    model, run = dashed()
    run.directions()["base_model.model.model.layers.0.self_attn.q_proj"].steps = 7
    other = wrapped()
    taken = lk.LoraDash(k=3).attach(other)
    other.load_state_dict(model.state_dict())
    assert taken.launched and taken.steps == 7
    assert torch.equal(logits(other), logits(model))
    before = lk.LoraDash(k=3).attach(wrapped())
    other.load_state_dict(before.model.state_dict())  # back to before the switch
    assert not taken.launched and taken.steps == 0


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 8}, {"rank_pattern": {"q_proj": 2}}])
def test_stock_peft_reads_the_coordinates_as_rank(tmp_path, settings):
    model, _run = dashed(wrapped(**settings))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["lora_kernels"]["dash"] == {"k": 3, "pre_launch": 100, "epsilon": 1e-6}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert type(stock.peft_config["default"]) is LoraConfig
    assert relative_error(logits(stock), logits(model)) < 1e-5
    assert relative_error(logits(wrapped(**settings)), logits(model)) > 1e-3
    again = lk.load(tiny_llama(), tmp_path)
    assert_equal(state(again), state(model))
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert getattr(again.peft_config["default"], name) == getattr(model.peft_config["default"], name)
    with pytest.raises(ValueError, match="3 coordinates already"):
        lk.LoraDash(k=2).attach(lk.load(tiny_llama(), tmp_path))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 8}, {"rank_pattern": {"q_proj": 2}}])
def test_exported_as_a_stock_adapter(tmp_path, settings):
    model, _run = dashed(wrapped(**settings))
    rank = settings.get("r", 4)
    found = lk.export(model, tmp_path)
    for name, each in found.items():
        expected = 3 + (2 if "q_proj" in name and "rank_pattern" in settings else rank)
        assert (each.rank, each.error) == (expected, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert not any("dash" in name for name in loaded.state_dict())
    assert not any("dash" in name for name in load_file(str(tmp_path / "adapter_model.safetensors")))
    assert "lora_dash" not in json.loads((tmp_path / "adapter_config.json").read_text())
    scalings = {module.scaling["default"] for module in loaded.modules() if isinstance(module, LoraLayer)}
    assert len(scalings) == 1  # the rest of each layer's own is in B
    expected = logits(model)
    assert relative_error(logits(loaded), expected) < 1e-5
    assert relative_error(logits(loaded.merge_and_unload()), expected) < 1e-5
    assert relative_error(logits(wrapped(**settings)), expected) > 1e-3
    assert type(model.peft_config["default"]).__name__ == "PartsLoraConfig"  # the run goes on
    lk.export(model, tmp_path / "cut", rank=5)
    cut = load_file(str(tmp_path / "cut" / "adapter_model.safetensors"))
    assert {value.shape[0] for name, value in cut.items() if "lora_A" in name} <= {5}


def test_before_the_switch_an_export_is_the_adapter(tmp_path):
    model = wrapped()
    lk.LoraDash(k=3).attach(model)
    assert {each.rank for each in lk.export(model, tmp_path).values()} == {4}
    assert relative_error(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model)) < 1e-6


def test_a_scaling_of_zero_cannot_be_exported(tmp_path):
    model, layer = linear()
    dashed(model)
    layer.scaling["default"] = 0.0
    with pytest.raises(ValueError, match="scaling 0"):
        lk.export(model, tmp_path)


def test_task_specific_directions_from_start_to_file(tmp_path):
    """LoRA-Init, its frozen start, training, the switch, more training, on disk and exported."""
    model = wrapped()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.zero_()
    batches = BATCHES
    before = logits(model)
    report = lk.initialize(model, batches, lk.init.TaskDirections(cache=str(tmp_path / "bases")), progress=False)
    run = lk.LoraDash(k=3, pre_launch=2, cache_dir=str(tmp_path / "bases")).attach(model)
    assert all(each.status == "initialised" for each in report.layers) and run.adapter == "default"
    files = {each.name for each in (tmp_path / "bases").iterdir()}
    assert len(files) == 6
    assert relative_error(logits(model), before) < 1e-5
    model.train()
    optimizer = adam(model)
    losses = []
    for number in range(6):
        optimizer.zero_grad()
        loss = model(**batches[number % 2]).loss
        loss.backward()
        optimizer.step()
        run.step(optimizer)
        losses.append(float(loss.detach()))
    assert run.launched and losses[-1] < losses[1]
    assert {each.name for each in (tmp_path / "bases").iterdir()} == files  # decomposed once
    assert list(model.peft_config) == ["default"]
    expected = logits(model)
    ranks = {each.rank for each in lk.export(model, tmp_path / "stock").values()}
    assert ranks == {4 + 4 + 3}
    assert relative_error(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "stock")), expected) < 1e-5
    model.save_pretrained(tmp_path / "run")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "run")
    assert stock.peft_config["default"].r == 4 + 4 + 3 and relative_error(logits(stock), expected) < 1e-5
    assert torch.equal(logits(lk.load(tiny_llama(), tmp_path / "run")), expected)
    fused = lk.load(tiny_llama(), tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        lk.accelerate(fused)
    assert relative_error(logits(fused), expected) < 1e-5
