"""Lightning: the start before `fit`, the fused layers inside, and the landscape in its logs.

    pip install lightning
    python examples/lightning_fit.py

For your own model: replace the base model and the batches. The LightningModule is like any other; `lk.initialize` is
called before `fit`, which asks for the optimizer.
"""

import importlib.util
import sys

if importlib.util.find_spec("lightning") is not None:
    import lightning
elif importlib.util.find_spec("pytorch_lightning") is not None:
    import pytorch_lightning as lightning
else:
    print("this example needs Lightning: pip install lightning")
    sys.exit(0)

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk


class FineTuning(lightning.LightningModule):
    """A PEFT model, its optimizer, and what is logged."""

    def __init__(self, model, rate):
        super().__init__()
        self.model, self.rate, self.losses = model, rate, []
        self.monitor = lk.api.LandscapeMonitor(every=20)

    def training_step(self, batch, index):
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, index):
        """Every 20th time, the landscape's numbers go to Lightning's loggers."""
        numbers = self.monitor.step(self.model)
        if numbers is not None:
            self.log_dict({f"landscape/{name}": value for name, value in numbers.items()})
            print(f"step {self.monitor.count}: rank {numbers['entropy_rank']:.1f}, share {numbers['share']:.3f}")

    def configure_optimizers(self):
        """AdamW, or `lk.create_lora_pro_optimizer(self.model, lr=self.rate)`."""
        return torch.optim.AdamW((each for each in self.model.parameters() if each.requires_grad), lr=self.rate)


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **size))
# Sequences that count in steps of 1 to 4, from anywhere: a pattern to learn.
ids = (torch.randint(0, 64, (40, 8, 1)) + torch.randint(1, 5, (40, 8, 1)) * torch.arange(16)) % 64
loader = torch.utils.data.DataLoader([{"input_ids": each, "labels": each} for each in ids], batch_size=None)

model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
print(lk.initialize(model, loader, method="eva", max_batches=8, progress=False).summary())
print(lk.accelerate(model).summary())
module = FineTuning(model, rate=1e-2)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
lightning.Trainer(max_epochs=1, accelerator="auto", devices=1, **quiet).fit(module, loader)
print(f"loss: {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
