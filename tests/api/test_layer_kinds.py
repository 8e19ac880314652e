"""Adapters that are not `get_peft_model` on linear layers with a scaling that is a float."""

import json

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import lora_kernels as lk
from lora_kernels.api import start
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama

BATCHES = padded(samples(), 4)
INPUTS = {key: BATCHES[0][key] for key in ("input_ids", "attention_mask")}
TARGETS = ["q_proj", "v_proj"]


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def nudge(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value += 0.05 * torch.randn_like(value)


def config(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changes})


def wrapped(scaling, **changes):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), config(**changes))
    if scaling == "tensor":
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        assert all(isinstance(each.scaling["default"], torch.Tensor) for each in lora_layers(model))
    elif scaling == "numpy":
        for layer in lora_layers(model):
            layer.scaling["default"] = numpy.float32(layer.scaling["default"])
            layer.lora_alpha["default"] = numpy.float32(layer.lora_alpha["default"])
    return model


def lora_layers(model):
    return [each for each in model.modules() if hasattr(each, "lora_A")]


@pytest.mark.parametrize("scaling", ["tensor", "numpy"])
@pytest.mark.parametrize("method", ["eva", "pissa", "lora_ga", "task_directions"])
def test_scalings_that_are_tensors_or_numpy_numbers(method, scaling, tmp_path):
    made = []
    for kind in ("number", scaling):
        model = wrapped(kind)
        tensors = [layer.scaling["default"] for layer in lora_layers(model)]
        lk.initialize(model, BATCHES, method, progress=False)
        if kind == "tensor":  # the very tensors that compiled code reads, also where ranks have changed
            assert all(
                layer.scaling["default"] is each for layer, each in zip(lora_layers(model), tensors, strict=True)
            )
        nudge(model)
        found = lk.diagnose(model, BATCHES, weight_decay=0.1, progress=False)
        folder = tmp_path / kind
        lk.export(model, folder)
        json.loads((folder / "adapter_config.json").read_text())
        loaded = PeftModel.from_pretrained(tiny_llama(), folder)
        assert relative_error(logits(loaded), logits(model)) < 1e-5
        made.append((logits(model), [layer.spectrum.frobenius for layer in found]))
    assert relative_error(made[0][0], made[1][0]) < 1e-5 and made[0][1] == pytest.approx(made[1][1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 3)

    def forward(self, x, memory):
        return self.head(self.attn(x, memory, memory)[0]).pow(2).mean()


@pytest.mark.parametrize("method", ["eva", "lora_ga", "corda", "pissa"])
def test_an_attention_module_is_no_linear_layer(method):
    torch.manual_seed(0)
    model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attn", "head"]))
    batch = {"x": torch.randn(5, 7, 32), "memory": torch.randn(5, 11, 32)}
    report = lk.initialize(model, [batch], method=method, progress=False)
    found = {layer.name.removeprefix("base_model.model."): layer for layer in report}
    assert found["head"].status == "initialised" and found["attn"].status == "unsupported"
    assert "MultiheadAttention" in found["attn"].notes[0]


METHODS = ["eva", "lora_da", "lora_ga", "corda", "pissa", "task_directions"]


@pytest.mark.parametrize("method", METHODS)
def test_a_head_narrower_than_the_rank_keeps_its_values(method, monkeypatch):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    head = model.base_model.model.classifier
    before = head.lora_A["default"].weight.clone()
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
    observed = []

    def collect(model, loader, targets, *rest, **options):
        observed.extend(target.name for target in targets)
        return collect_targets(model, loader, targets, *rest, **options)

    collect_targets = start.collect_targets
    monkeypatch.setattr(start, "collect_targets", collect)
    report = lk.initialize(model, [batch], method, progress=False)
    *others, last = report
    assert {layer.status for layer in others} == {"initialised"} and len(others) == 12
    assert (last.name, last.status, last.rank) == ("base_model.model.classifier", "unsupported", 8)
    assert "rank 8 exceeds min(m, n) = 3" in last.notes[0] and "rank 8 exceeds" in str(report)
    assert torch.equal(head.lora_A["default"].weight, before) and not head.lora_B["default"].weight.any()
    assert observed == ([] if method == "pissa" else [layer.name for layer in others])


def test_ranks_that_no_layer_has_room_for_are_refused_before_the_data():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 3), nn.Linear(16, 2)

        def forward(self, x):
            return self.one(x).sum() + self.two(x).sum()

    def batches():
        raise AssertionError("the data was read")
        yield

    model = get_peft_model(Heads(), LoraConfig(r=4, target_modules=["one", "two"]))
    for method in METHODS:
        with pytest.raises(
            ValueError, match=r"rank_pattern.*exclude_modules: base.*one \(r = 4, min.* = 3\), base.*two"
        ):
            lk.initialize(model, batches(), method, progress=False)


def added():
    torch.manual_seed(3)
    model = tiny_llama()
    try:
        model.add_adapter(config())
    except ValueError as error:  # transformers 5 asks for PEFT 0.20
        pytest.skip(str(error))
    return model


def injected():
    torch.manual_seed(3)
    return inject_adapter_in_model(config(), tiny_llama())


@pytest.mark.parametrize("make", [added, injected])
def test_adapters_put_into_a_model(make, tmp_path):
    model = make()
    assert {each.path for each in lk.accelerate(model, strict=True)} == {"fused"}
    assert lk.verify(model, BATCHES[0]).ok
    base = logits(tiny_llama())
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    statistics = lk.collect(model, BATCHES, "lora_ga", progress=False)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == flags
    assert not any(layer.disable_adapters for layer in lora_layers(model))
    report = lk.initialize(model, BATCHES, "eva", progress=False)
    assert [layer.status for layer in report] == ["initialised"] * 4 and len(statistics) == 4
    assert relative_error(logits(model), base) < 1e-5
    nudge(model)
    assert relative_error(logits(model), base) > 1e-3
    assert lk.verify(model, BATCHES[0]).ok
    assert len(lk.diagnose(model, BATCHES, weight_decay=0.1, progress=False).layers) == 4
    lk.export(model, tmp_path / "exported")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "exported")
    assert relative_error(logits(loaded), logits(model)) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    if make is added:  # transformers writes the adapter, with the ranks that EVA gave it
        again = tiny_llama()
        again.load_adapter(str(tmp_path / "saved"))
        assert relative_error(logits(again), logits(model)) < 1e-5


@pytest.mark.parametrize("base", ["intact", "mutate"])
@pytest.mark.parametrize("make", [added, injected])
def test_starts_away_from_zero_keep_the_function(make, base, tmp_path):
    model, before = make(), logits(tiny_llama())
    lk.initialize(model, BATCHES, "lora_ga", base=base, progress=False)
    assert relative_error(logits(model), before) < 1e-4
    if base == "intact" and make is added:
        model.save_pretrained(tmp_path)
        again = tiny_llama()
        again.load_adapter(str(tmp_path))
        assert relative_error(logits(again), logits(model)) < 1e-5


class Windows(nn.Module):
    """The rows of `window` are not those of samples."""

    def __init__(self):
        super().__init__()
        self.plain, self.window = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        hidden = self.plain(x)
        return self.window(hidden.reshape(-1, 2, 12)[:3]).square().mean() + hidden.square().mean()


@pytest.mark.parametrize("method", ["lora_da", "task_directions"])
def test_a_layer_whose_rows_are_no_samples_keeps_its_values_and_the_others_start(method):
    model = get_peft_model(Windows(), LoraConfig(r=3, target_modules=["plain", "window"]))
    before = model.base_model.model.window.lora_A["default"].weight.detach().clone()
    batches = [torch.randn(4, 6, 12) for _ in range(3)]
    call = {"forward": lambda model, batch: model(batch), "loss": lambda output, batch: output, "progress": False}
    with (
        pytest.warns(RuntimeWarning, match="does not reach 1 LoRA layers"),
        pytest.warns(RuntimeWarning, match="no gradients of 1 layers .*window"),
    ):
        report = lk.initialize(model, batches, method, **call)
    plain, window = report.layers
    assert plain.status == "initialised" and window.status == "not_reached"
    assert "rows (3, 2) cannot be assigned to the 4 samples of a batch" in " ".join(window.notes)
    assert torch.equal(model.base_model.model.window.lora_A["default"].weight, before)


def unread():
    raise AssertionError("the data must not be read")
    yield


@pytest.mark.parametrize("method", ["pissa", "corda", "task_directions"])
def test_base_weights_that_cannot_be_read_are_refused_before_the_data_and_all_named(method):
    model = get_peft_model(Windows(), LoraConfig(r=3, target_modules=["plain", "window"]))
    for name in ("plain", "window"):
        base = model.get_submodule(f"base_model.model.{name}").base_layer
        base.__class__ = type("OtherLinear", (nn.Linear,), {})
        base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    loader = None if method == "pissa" else unread()
    with pytest.raises(
        ValueError, match="layer base_model.model.plain, base_model.model.window cannot be read: OtherLinear"
    ):
        lk.initialize(model, loader, method, progress=False)


def test_a_layer_that_keeps_its_values_keeps_its_start():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.window = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x, *, both=True):
            return self.plain(x) + (self.window(x) if both else 0)

    model = get_peft_model(Two(), LoraConfig(r=3, target_modules=["plain", "window"]))
    x = torch.randn(8, 12)
    before = model(x).detach()
    lk.initialize(model, method="pissa", progress=False)
    with pytest.warns(RuntimeWarning, match="does not reach 1 LoRA layers"):
        lk.initialize(model, [x], "eva", forward=lambda model, x: model(x, both=False), force=True, progress=False)
    torch.testing.assert_close(model(x), before)
