"""A plain PyTorch loop: EVA's start, the fused layers, and an adapter that stock PEFT loads.

    python examples/plain_loop.py

For your own model: replace `make_base` by `AutoModelForCausalLM.from_pretrained(...)`, `batches` by your data loader
(any iterable of batches with labels), and begin with a learning rate of about 1e-4. The rest stays as it is.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk


def make_base():
    """A tiny model with random weights, the same at every call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size))


def make_batches(count):
    """Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn."""
    start, step = torch.randint(0, 64, (count, 8, 1)), torch.randint(1, 5, (count, 8, 1))
    ids = (start + step * torch.arange(16)) % 64
    return [{"input_ids": each, "labels": each} for each in ids]


batches = make_batches(40)
model = get_peft_model(make_base(), LoraConfig(r=8, target_modules="all-linear"))

# Before the optimizer is made: ranks may change, and with them the parameters.
report = lk.initialize(model, batches, method="eva", max_batches=8, progress=False)
print(report.summary())
print(lk.accelerate(model).summary())
checked = lk.verify(model, batches[0])
print(f"verify: as accurate as PEFT: {checked.ok}")

optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
model.train()
losses = []
for batch in batches:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stock = PeftModel.from_pretrained(make_base(), folder)  # nothing of lora_kernels in here
with torch.no_grad():
    ours, theirs = (each.eval()(input_ids=batches[0]["input_ids"]).logits for each in (model, stock))
print(f"stock PEFT: largest difference of the logits {(ours - theirs).abs().max():.1e}")
