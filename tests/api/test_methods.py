"""Methods that start away from zero, through `initialize`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_kernels as lk
from tests.conftest import relative_error
from tests.statistics.models import padded, samples, tiny_llama
from tests.statistics.test_models import quantized

TARGETS = ["q_proj", "v_proj", "down_proj"]


def base_model():
    return tiny_llama(hidden_size=48, intermediate_size=80)


def wrap(model, **changes):
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": TARGETS, **changes}))


def layers(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_lora_ga_from_a_sketch_and_on_a_quantized_base():
    batches = padded(samples(), 4)
    exact, sketched = (wrap(tiny_llama(hidden_size=160, intermediate_size=512), r=2) for _ in range(2))
    lk.initialize(exact, batches, "lora_ga", progress=False)
    report = lk.initialize(sketched, batches, "lora_ga", progress=False, form="sketch", sketch_size=24)
    assert "two_sided" in {layer.solver for layer in report.layers}
    for (name, one), (_, other) in zip(layers(exact), layers(sketched), strict=True):
        a, b = (each.lora_A["default"].weight.detach() for each in (one, other))
        assert float(torch.linalg.svdvals(a @ b.mT).max()) > 0.8, name
    base = quantized("nf4")  # in evaluation mode bitsandbytes may pack it, and no gradient would flow
    batch = {key: batches[0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():  # with gradients, bitsandbytes takes kernels that round otherwise
        before = base(**batch).logits
        model = wrap(base)
        lk.initialize(model, batches, "lora_ga", progress=False)
        assert relative_error(model(**batch).logits, before) < 1e-4
    with pytest.raises(ValueError, match="quantized base"):
        lk.initialize(wrap(quantized("nf4")), batches, "lora_ga", base="mutate", progress=False)


def test_the_function_is_kept_on_an_untouched_base():
    batches = padded(samples(), 4)
    for method in ("pissa", "corda", "lora_ga", "task_directions"):
        base = base_model().eval()
        before, weights = base(**batches[0]).logits.detach(), copy.deepcopy(base.state_dict())
        model = wrap(base)
        report = lk.initialize(model, batches, method, progress=False)
        assert relative_error(model.eval()(**batches[0]).logits.detach(), before) < 1e-4, method
        for name, value in model.get_base_model().state_dict().items():
            if name.replace(".base_layer", "") in weights:
                assert torch.equal(value, weights[name.replace(".base_layer", "")])
        assert all(layer.start_share > 0 for layer in report.layers)
        report.to_json()
