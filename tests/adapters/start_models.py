"""Models with a frozen start for the tests of adapters."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import lora_kernels as lk
from tests.statistics.models import padded, samples, tiny_llama

BATCHES = padded(samples(), 4)
BATCH = BATCHES[0]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def wrapped(adapter="default", **changes):
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **changes}
    return get_peft_model(tiny_llama(), LoraConfig(**settings), adapter_name=adapter)


def nudge(model, size=0.05):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(size * torch.randn(each.shape, generator=generator).to(each.dtype))


def started(method="lora_ga", adapter="default", **changes):
    """Started away from zero, then trained a bit."""
    model = wrapped(adapter, **changes)
    data = None if method == "pissa" else BATCHES
    lk.initialize(model, data, method=method, adapter_name=adapter, progress=False)
    nudge(model)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def tensors(model):
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value.detach().clone() for name, value in named if "lora_" in name}


def assert_same_bits(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def whole_batch():
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(11))


def train(model, ids, steps=3):
    """Steps on the mean of squared logits: equal shares of a batch have the batch's mean gradient."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
