"""Models with LoRA-Dash for its tests, and an independent account of what it computes, in float64."""

import torch
from torch import nn

import lora_kernels as lk
from tests.statistics.models import padded, samples
from tests.training.test_accelerate import wrapped

BATCHES = padded(samples(), 4)


def trained(model):
    return [each for each in model.parameters() if each.requires_grad]


def adam(model, lr=1e-2):
    return torch.optim.AdamW(trained(model), lr=lr, weight_decay=0.1)


def dashed(model=None, *, k=3, size=0.5, **settings):
    """A model after the switch, coordinates away from zero."""
    model = wrapped() if model is None else model
    run = lk.LoraDash(k=k, **settings).attach(model)
    run.launch(adam(model), progress=False)
    torch.manual_seed(8)
    with torch.no_grad():
        for each in run.coordinates():
            each.normal_(0, size)
    return model, run


def linear(m=14, n=10, dtype=torch.float64, bias=False, **changes):
    """A LoRA layer over a random matrix, in a model of its own."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(n, m, bias=bias)).to(dtype)
    model = wrapped(net, target_modules=["0"], r=3, **changes).to(dtype)
    return model, model.base_model.model[0]


def effective(layer, adapter="default"):
    """`W + s B A + U diag(c) V^T` of a layer, from its tensors alone."""
    base = layer.get_base_layer().weight.detach().double()
    base = base.mT if type(layer.get_base_layer()).__name__ == "Conv1D" else base
    a, b = layer.lora_A[adapter].weight.detach().double(), layer.lora_B[adapter].weight.detach().double()
    dash = layer.lora_dash[adapter]
    left, right, c = dash.left.double(), dash.right.double(), dash.coordinates.detach().double()
    return base + layer.scaling[adapter] * b @ a + left @ torch.diag(c) @ right


def expected_selection(weight, change, k, epsilon=0.0):
    """Indices, `u v^T` of each chosen direction, and all rates, by the full product and an SVD."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    rates = (u.mT @ change.double() @ vh.mT).diagonal().abs() / (s + epsilon * s[0])
    chosen = rates.topk(k).indices
    return chosen, [torch.outer(u[:, index], vh[index]) for index in chosen], rates
