"""Many initialisations from one pass over the data, and what the reports predict of them.

    python examples/many_inits.py

Statistics are collected once, saved, and read by every method. Each report predicts the change of the loss by the start
itself and by Adam's first step; both are measured here. The predictions are of first order: they hold for small steps,
and say nothing of where training ends. For your own model: replace `make_model` and `batches`.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk

RATE = 1e-4


def make_model():
    """A tiny model with random weights and an adapter, the same at every call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size))
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))


def step(model, optimizer, batches):
    """One step on the mean loss of all batches; the loss before it."""
    mean = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        mean += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return mean


def change(values):
    """The sum of the layers' predictions, of those that have one."""
    return sum(each for each in values if each is not None)


# Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn.
torch.manual_seed(1)
ids = (torch.randint(0, 64, (2, 16, 1)) + torch.randint(1, 5, (2, 16, 1)) * torch.arange(16)) % 64
batches = [{"input_ids": each, "labels": each} for each in ids]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "statistics.safetensors"
    # What all methods together read. LoRA-DA's authors weigh every sample alike; here all are of one length.
    wants = ("input_second", "gradient", "fisher")
    lk.collect(make_model(), batches, wants, weighting="sample", progress=False).save(file)
    print(f"one pass, {file.stat().st_size / 1e6:.1f} MB")
    statistics = lk.statistics.Statistics.load(file)

with torch.no_grad():
    untouched = sum(make_model()(**batch).loss.item() for batch in batches) / len(batches)
print("method            start: predicted, measured    first step: predicted, measured    loss after 10 more")
for method in ("eva", "lora_da", "lora_ga", "corda", "pissa", "task_directions"):
    model = make_model()
    report = lk.initialize(model, statistics=statistics, method=method, progress=False)
    lk.accelerate(model)
    model.eval()
    optimizer = torch.optim.Adam((each for each in model.parameters() if each.requires_grad), lr=RATE)
    start = step(model, optimizer, batches)
    after = step(model, optimizer, batches)
    for group in optimizer.param_groups:
        group["lr"] = 5e-3
    for _ in range(10):
        last = step(model, optimizer, batches)
    predicted = change(layer.start_change for layer in report), RATE * change(layer.first_step for layer in report)
    measured = start - untouched, after - start
    print(
        f"{method:16s} {predicted[0]:+17.4f}, {measured[0]:+.4f} {predicted[1]:+24.5f}, {measured[1]:+.5f} {last:22.3f}"
    )
