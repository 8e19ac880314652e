"""How to call what takes a model."""

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from registry import Case, add
from torch import nn

import lora_kernels as lk


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.two(torch.relu(self.one(x))).square().mean()


def adapted(start=True):
    return get_peft_model(Small(), LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=start))


def accelerated():
    model = adapted(False)
    lk.accelerate(model, guard=False)
    return model


def loaders():
    return st.sampled_from(("normal", "one", "tuple")).map(
        lambda kind: {"normal": [torch.randn(3, 6)] * 2, "one": [torch.randn(1, 6)], "tuple": (torch.randn(4, 6),)}[
            kind
        ]
    )


def made(function, **arguments):
    """A strategy of keyword arguments; callables without arguments are called anew for every example."""
    strategies = {
        name: value if isinstance(value, st.SearchStrategy) else st.builds(value) if callable(value) else st.just(value)
        for name, value in arguments.items()
    }
    return st.fixed_dictionaries(strategies)


def case(function, *, weight=0.3, check=None, corrupt=(), enter=False, documentation=None, name="", **arguments):
    add(Case(function, made(function, **arguments), check, weight=weight, corrupt=corrupt, enter=enter, name=name,
             documentation=documentation))  # fmt: skip


case(lk.collect, model=Small, loader=loaders(), wants=st.sampled_from((None, "eva", "gradient")), targets=None,
     adapter_name="default", progress=False, max_batches=None, mask=None, loss=None, seed=0,
     corrupt=("model", "wants", "targets", "adapter_name", "max_batches", "seed"))  # fmt: skip
case(lk.plan, model=adapted, wants="eva", batch=None, targets=None, world_size=None, budget=None, form="auto",
     sketch_size=8, dtype=torch.float32, adapter_name="default",
     corrupt=("model", "wants", "targets", "world_size", "budget", "form", "sketch_size", "dtype", "adapter_name"),
)  # fmt: skip
case(lk.initialize, model=adapted, loader=loaders(), method=st.sampled_from(("eva", "lora_ga", "pissa")),
     statistics=None, adapter_name="default", base="intact", ranks=None, learning_rate=None,
     unreached="warn", progress=False,
     corrupt=("model", "method", "statistics", "adapter_name", "base", "ranks", "learning_rate", "unreached"),
)  # fmt: skip
case(lk.diagnose, model=lambda: adapted(False), adapter_name="default", weights=True)
case(lk.api.snapshot, model=lambda: adapted(False), adapter_name="default")
case(lk.accelerate, model=adapted, strict=False, guard=False, corrupt=("model",))
case(lk.restore, model=accelerated)
case(lk.verify, model=accelerated, batch=lambda: torch.randn(3, 6), forward=None, loss=None, corrupt=("model",))
case(lk.create_lora_pro_optimizer, model=lambda: adapted(False), lr=1e-3)
case(lk.training.lora_pro_cls_and_kwargs, model=lambda: adapted(False), lr=1e-3)
case(
    lk.LoraDash,
    k=4,
    pre_launch=10,
    epsilon=1e-6,
    adapter_name=None,
    cache_dir=None,
    corrupt=("k", "pre_launch", "epsilon"),
)
case(
    lk.api.LandscapeMonitor,
    every=5,
    path=None,
    adapter_name="default",
    rank_tolerance=0.01,
    corrupt=("every", "rank_tolerance"),
)
