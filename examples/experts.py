"""A mixture of experts: a start for every expert from the rows that are routed to it, trained fused.

    python examples/experts.py

For your own model: replace `make_base` and `batches`. transformers 5 keeps experts as parameters of three axes, which
PEFT adapts by `target_parameters`. PEFT has one rank for all experts of a parameter. A token meets k of E experts, so
an expert sees k / E of the tokens: enough batches are those after which the report names no expert that saw fewer
tokens than its rank.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_kernels as lk


def make_base():
    """A tiny mixture with random weights, the same at every call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    routing = {"num_experts": 8, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, initializer_range=0.1, **size, **heads, **routing))


def batches(count, size=8):
    """Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 64, (count, size, 1), generator=generator)
    step = torch.randint(1, 5, (count, size, 1), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in (first + step * torch.arange(24)) % 64]


config = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "v_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
model = get_peft_model(make_base(), config)
print(lk.plan(model, "eva"))
report = lk.initialize(model, batches(4), method="eva", progress=False)
for layer in report:
    if layer.name.endswith(("experts", "experts.base_layer")):
        print(f"{layer.name}: {layer.tokens:.0f} rows; {'; '.join(layer.notes)}")
print(lk.accelerate(model).summary())

model.train()
optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=5e-3)
losses = []
for batch in batches(40):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    stock = PeftModel.from_pretrained(make_base(), folder)
batch = batches(1)[0]
with torch.no_grad():
    ours, theirs = (each.eval()(**batch).logits for each in (model, stock))
print(f"in stock PEFT: logits differ by {(ours - theirs).abs().max():.1e}")
