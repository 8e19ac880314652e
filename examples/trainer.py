"""transformers' Trainer: LoRA-GA's start with LoRA-Pro and a watch on the landscape; then LoRA-Dash.

    python examples/trainer.py

For your own model: replace `make_base`, `Counting` by your dataset, and the learning rates: LoRA-Pro begins at about
that of full fine-tuning. Everything else is the Trainer as you know it: nothing of it is replaced.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

import lora_kernels as lk


def make_base():
    """A tiny model with random weights, the same at every call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size))


class Counting(torch.utils.data.Dataset):
    """Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn."""

    def __len__(self):
        """How many there are."""
        return 320

    def __getitem__(self, index):
        """One of them."""
        ids = (index // 4 + (1 + index % 4) * torch.arange(16)) % 64
        return {"input_ids": ids, "labels": ids}


def train(name, model, rate, **parts):
    """Run the Trainer and print how the loss went."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=rate,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=Counting(), **parts)
        trainer.remove_callback(PrinterCallback)  # what matters is printed below
        trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return trainer.state.log_history


config = LoraConfig(r=8, target_modules="all-linear")
loader = torch.utils.data.DataLoader(Counting(), batch_size=16, shuffle=True)

model = get_peft_model(make_base(), config)
print(lk.initialize(model, loader, method="lora_ga", max_batches=8, progress=False).summary())
print(lk.accelerate(model).summary())
optimizer = lk.create_lora_pro_optimizer(model, lr=5e-3)
history = train("LoRA-Pro", model, 5e-3, optimizers=(optimizer, None), callbacks=[lk.api.LandscapeCallback(every=20)])
for entry in history:
    if "landscape/entropy_rank" in entry:
        numbers = {key.removeprefix("landscape/"): value for key, value in entry.items() if "landscape/" in key}
        print(f"step {entry['step']}: rank {numbers['entropy_rank']:.1f}, |s B A| / |W| {numbers['share']:.3f}")

# LoRA-GA starts away from zero on an untouched base: the export is one stock adapter for that base.
with tempfile.TemporaryDirectory() as folder:
    layers = lk.export(model, folder)
    stock = PeftModel.from_pretrained(make_base(), folder)
ids = Counting()[0]["input_ids"][None]
with torch.no_grad():
    ours, theirs = (each.eval()(input_ids=ids.to(each.device)).logits.cpu() for each in (model, stock))
print(
    f"export of rank {max(each.rank for each in layers.values())}: logits differ by {(ours - theirs).abs().max():.1e}"
)

model = get_peft_model(make_base(), config)
dash = lk.api.LoraDashCallback(lk.LoraDash(k=4, pre_launch=10))
train("LoRA-Dash", model, 1e-2, callbacks=[dash])
moved = sum(bool(each.any()) for each in dash.run.coordinates())
print(f"LoRA-Dash: {moved} layers have learned {dash.config.k} coordinates each, after {dash.run.steps} steps without")
