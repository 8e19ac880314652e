"""QLoRA: a 4-bit base that stays as it is, and a method that starts away from zero all the same.

    pip install bitsandbytes
    python examples/qlora.py

For your own model: leave out the first `save_pretrained` and give `from_pretrained` its name. PiSSA, LoRA-GA and CorDA
usually change the base weight, which a quantized one does not allow; here a frozen adapter takes their start off again.
"""

import hashlib
import importlib.util
import sys

if importlib.util.find_spec("bitsandbytes") is None:
    print("this example needs bitsandbytes: pip install bitsandbytes")
    sys.exit(0)

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lora_kernels as lk


def digest(base):
    """A fingerprint of the packed weights."""
    found = hashlib.sha256()
    for name, value in base.named_parameters():
        if "lora_" not in name and value.dtype == torch.uint8:
            found.update(value.detach().cpu().numpy().tobytes())
    return found.hexdigest()


torch.manual_seed(0)
scratch = tempfile.TemporaryDirectory()
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size)).save_pretrained(scratch.name)
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
base = LlamaForCausalLM.from_pretrained(scratch.name, quantization_config=four_bit)
base.train()  # on a CPU, bitsandbytes packs the weights for inference alone once they run in evaluation mode

# Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn.
ids = (torch.randint(0, 64, (40, 8, 1)) + torch.randint(1, 5, (40, 8, 1)) * torch.arange(16)) % 64
batches = [{"input_ids": each.to(base.device), "labels": each.to(base.device)} for each in ids]

packed = digest(base)
with torch.no_grad():
    before = base(**batches[0]).logits
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
print(lk.initialize(model, batches, method="lora_ga", max_batches=8, progress=False).summary())
with torch.no_grad():
    print(f"start: logits differ by {(model(**batches[0]).logits - before).abs().max():.1e} from the base's")
print(lk.accelerate(model).summary())  # delta: bitsandbytes computes its product, the adapter is fused

optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=5e-3)
losses = []
for batch in batches:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f"base intact: {digest(model) == packed}")

with tempfile.TemporaryDirectory() as folder:
    layers = lk.export(model, folder)  # one stock adapter of rank 2 r for the same 4-bit base
    fresh = LlamaForCausalLM.from_pretrained(scratch.name, quantization_config=four_bit)
    stock = PeftModel.from_pretrained(fresh, folder).train()
with torch.no_grad():
    ours, theirs = (each(**batches[0]).logits for each in (model, stock))
print(
    f"export of rank {max(each.rank for each in layers.values())}: logits differ by {(ours - theirs).abs().max():.1e}"
)
