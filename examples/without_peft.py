"""Without PEFT or transformers: layers of your own, with the op, the statistics and a method as plain functions.

    python examples/without_peft.py

For your own model: `LoraLinear` is all there is to it. Any model will do that is made of `nn.Linear`; name the layers,
and say how it is called (`forward=`) and what its loss is (`loss=`).
"""

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.landscape import Adapter, measure


class LoraLinear(nn.Module):
    """A frozen linear layer with an adapter that starts at given factors and leaves the function as it was."""

    def __init__(self, linear, factors, scaling):
        super().__init__()
        self.linear, self.scaling = linear.requires_grad_(False), scaling
        self.A, self.B = nn.Parameter(factors.A.clone()), nn.Parameter(factors.B.clone())
        self.register_buffer("A0", factors.A)
        self.register_buffer("B0", factors.B)

    def forward(self, x):
        """`x W^T + bias + s x A^T B^T - s x A0^T B0^T`, in one op."""
        start = (self.A0, self.B0, -self.scaling)
        weight, bias = self.linear.weight, self.linear.bias
        return lk.ops.lora_linear(x, weight, bias, self.A, self.B, scaling=self.scaling, extra=start)


def squared_error(outputs, batch):
    """The loss: a mean over samples."""
    return nn.functional.mse_loss(outputs, batch["y"])


# A network, and data of another one whose first layer differs by a matrix of rank 2.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
x = torch.randn(1024, 32)
with torch.no_grad():
    other = torch.randn(64, 2) @ torch.randn(2, 32) / 8
    y = model[1:](model[0](x) + x @ other.T)
batches = [{"x": a, "y": b} for a, b in zip(x.split(64), y.split(64), strict=True)]

# One pass for the gradients of the mean loss; nothing of the model is changed, and no .grad is made.
names = ["0", "2"]
method = lk.init.LoraGA()
statistics = lk.collect(
    model,
    batches,
    method,
    targets=names,
    forward=lambda model, batch: model(batch["x"]),
    loss=squared_error,
    progress=False,
)
found = method.factors(statistics, {name: 4 for name in names})

with torch.no_grad():
    before = model(x)
for name in names:
    model.set_submodule(name, LoraLinear(model.get_submodule(name), found[name].factors, scaling=2.0))
model[4].requires_grad_(False)
with torch.no_grad():
    print(f"start: the function is kept within {(model(x) - before).abs().max():.1e}")

trained = [each for each in model.parameters() if each.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=5e-3)
losses = []
for _ in range(10):
    for batch in batches:
        loss = squared_error(model(batch["x"]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")

# What was learned: s (B A - B0 A0), as one product of factors of rank 2 r. Its matrix is never formed.
layers = {name: model.get_submodule(name) for name in names}
learned = [
    Adapter(name, torch.cat((each.A, each.A0)).detach(), torch.cat((each.B, -each.B0), 1).detach(), each.scaling)
    for name, each in layers.items()
]
for name, spectrum in measure(learned).items():
    values = ", ".join(f"{value:.2f}" for value in spectrum.values[:4])
    print(f"layer {name}: |update| {spectrum.frobenius:.2f}, singular values {values}, ...")
