"""A vision transformer: EVA moves rank between the layers, and negatives of images become readable.

    pip install scikit-learn
    python examples/vision.py

A small ViT learns scikit-learn's digits and then meets their negatives, of which it can make nothing; LoRA adapts it.
For your own model: leave out the pretraining, use `ViTForImageClassification.from_pretrained(...)`, and batches of
`pixel_values` and `labels`.
"""

import importlib.util
import sys

if importlib.util.find_spec("sklearn") is None:
    print("this example needs scikit-learn: pip install scikit-learn")
    sys.exit(0)

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import lora_kernels as lk


def make_batches(images, labels, size=64):
    """Batches as transformers' classifiers take them."""
    parts = zip(images.split(size), labels.split(size), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in parts]


def accuracy(model, batches):
    """Share of images whose digit is found."""
    model.eval()
    with torch.no_grad():
        right = [(model(**each).logits.argmax(-1) == each["labels"]).float() for each in batches]
    return torch.cat(right).mean().item()


def train(model, batches, epochs, rate):
    """A plain loop over whatever is trainable."""
    model.train()
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=rate)
    for _ in range(epochs):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8), from -1 to 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
images, labels = images[order], labels[order]
size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size))
train(base, make_batches(images[:1400], labels[:1400]), epochs=8, rate=3e-3)
print(f"digits: accuracy {accuracy(base, make_batches(images[1400:], labels[1400:])):.2f}")

task, held_out = make_batches(-images[:1400], labels[:1400]), make_batches(-images[1400:], labels[1400:])
config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
model = get_peft_model(base, config)
# No labels are needed: EVA looks at the inputs alone. With rho=2 a layer may get up to twice its rank, or less.
report = lk.initialize(model, task, method=lk.init.EVA(rho=2.0), progress=False)
print(report.summary())
for layer in sorted(report, key=lambda each: each.rank)[:: len(report.layers) - 1]:
    print(f"rank {layer.rank_before} -> {layer.rank}: {layer.name.removeprefix('base_model.model.')}")
print(lk.accelerate(model).summary())

before = accuracy(model, held_out)
train(model, task, epochs=4, rate=5e-3)
print(f"negatives: accuracy {before:.2f} -> {accuracy(model, held_out):.2f}")
