"""Two equal models, one accelerated, through the same adapter operations, with the same numbers expected after each.

`run(kind, seed)` draws a sequence; a `Difference` that it raises ends in a call of `replay` that repeats the sequence.
As a program, `python -m tests.helpers.twins FIRST LAST` cuts the sequences of seeds down to what still differs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import math
import pickle
import pprint
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk

# How far from PEFT's a result may lie (Frobenius norm, in machine epsilons of the narrowest dtype that takes part).
# What lies further away, and all in bfloat16, is compared with float64: it may be as many times worse as PEFT's, or as
# what parameters that are off by an epsilon lead to.
EPSILONS, WORSE = 16, 3.0
LENGTH = 25
POOL = ("one", "two", "three", "four")
Operations = Sequence[tuple[str, dict[str, Any]]]


class Difference(AssertionError):
    """The twins differ."""


# ----------------------------------------------------------------------------------------------------------------------
# Models


class Net(nn.Module):
    """Biases, a Conv1D, one layer that is called twice, whose base is also reached by another name, and two heads."""

    width = 12

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.alias = self.second
        self.block = nn.Sequential(nn.Linear(16, 6, bias=False), nn.Tanh(), Conv1D(16, 6))
        self.norm = nn.LayerNorm(16, elementwise_affine=False)
        self.heads = nn.ModuleList([nn.Linear(16, 5), nn.Linear(16, 7, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.nn.functional.gelu(self.first(x)))
        h = self.norm(h + self.second(h))
        h = self.norm(h + self.second(torch.tanh(h)))
        h = self.norm(self.alias(h) + self.block(h))
        return torch.cat([head(h) for head in self.heads], -1)


def llama() -> nn.Module:
    """One layer of width 16."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=20, use_cache=False, attn_implementation="eager",
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model and its layers.

    Attributes:
        make: makes it.
        width: of its input.
        targets: the layers of the first adapter.
        some: those of others.
        block: a module to be checkpointed.
        floor: the epsilon of what it computes in float32 whatever its dtype.
    """

    make: Callable[[], nn.Module]
    width: int
    targets: tuple[str, ...]
    some: tuple[str, ...]
    block: str
    floor: float = 0.0


KINDS = {
    "llama": Kind(
        llama, 16, ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "down_proj"),
        "model.layers.0", torch.finfo(torch.float32).eps,
    ),
    "net": Kind(
        Net, 12, ("first", "second", "block.0", "block.2", "heads.0", "heads.1"), ("second", "block.2", "heads.1"),
        "block",
    ),
}  # fmt: skip

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 3},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.3},
    "ranks": {"rank_pattern": {"second": 1, "q_proj": 7}, "alpha_pattern": {"down_proj": 1, "heads.1": 3}},
    "negative": {"lora_alpha": -4},
}


def config(kind: str, adapter: str, targets: Sequence[str]) -> LoraConfig:
    """That of an adapter, whose factors are both random."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **ADAPTERS[adapter]}
    return LoraConfig(target_modules=list(targets), **settings)


@dataclass
class Twin:
    """One of the two.

    Attributes:
        kind: the name of its `Kind`.
        model: the PEFT model.
        fused: whether it is the accelerated one.
    """

    kind: str
    model: Any
    fused: bool

    @classmethod
    def make(cls, kind: str, adapter: str, fused: bool) -> Twin:
        torch.manual_seed(1)
        base = KINDS[kind].make()
        twin = cls(kind, get_peft_model(base, config(kind, adapter, KINDS[kind].targets)), fused)
        twin.model.eval()
        twin.accelerate()
        return twin

    def accelerate(self) -> None:
        if self.fused:
            lk.accelerate(self.model, guard=False)

    def double(self, perturbation: float = 0.0) -> Twin:
        """A copy in float64: the truth. Or what it is when every parameter is off by up to a part of itself."""
        twin = Twin(self.kind, copy.deepcopy(self.model), self.fused)
        generator = torch.Generator().manual_seed(7)
        for value in [*twin.model.parameters(), *twin.model.buffers()]:
            if value.is_floating_point():
                value.data = value.data.double()
                value.data *= 1 + perturbation * (2 * torch.rand(value.shape, generator=generator) - 1)
        return twin

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def input(self, seed: int, rows: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 4, KINDS[self.kind].width, generator=generator, dtype=torch.float32)
        return x.to(self.dtype).requires_grad_()

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.kind == "llama":
            return self.model(inputs_embeds=x, **kwargs).logits
        return self.model(x, **kwargs)

    def layers(self) -> dict[str, Any]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoraLayer)}

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def accumulated(self) -> dict[str, torch.Tensor]:
        return {
            f"grad of {name}": value.grad.clone()
            for name, value in self.model.named_parameters()
            if value.grad is not None
        }

    def gradients(self, output: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor | None]:
        """Of a loss of the output, without a trace in `.grad`."""
        found: dict[str, torch.Tensor | None] = {"output": output.detach()}
        if output.requires_grad:
            trained = self.trained()
            values = torch.autograd.grad(loss(output), [x, *trained.values()], allow_unused=True, **kwargs)
            found.update({f"gradient of {name}": value for name, value in zip(["x", *trained], values, strict=True)})
        return found


def loss(output: torch.Tensor) -> torch.Tensor:
    """A number whose gradients depend on the output, but hardly more than that is rounded."""
    generator = torch.Generator().manual_seed(output.numel())
    weight = torch.randn(output.shape, generator=generator).to(output.dtype)
    return (output * weight).sum() / output.numel() ** 0.5 + output.square().mean()


# ----------------------------------------------------------------------------------------------------------------------
# What users put into modules. Classes, so that they can be copied and pickled.


class Replaced:
    """A `forward` in place of a module's own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * type(self.module).forward(self.module, x)


class OutputHook:
    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 0.5 + 0.1


class InputHook:
    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * 1.25, *args[1:])


class GradientHook:
    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tuple(None if value is None else 2 * value for value in inputs)


class OutputGradientHook:
    def __call__(self, module: nn.Module, outputs: Any) -> Any:
        return tuple(None if value is None else 0.5 * value for value in outputs)


HOOKS: dict[str, tuple[type, str, str]] = {
    "forward": (OutputHook, "register_forward_hook", "_forward_hooks"),
    "forward_pre": (InputHook, "register_forward_pre_hook", "_forward_pre_hooks"),
    "backward": (GradientHook, "register_full_backward_hook", "_backward_hooks"),
    "backward_pre": (OutputGradientHook, "register_full_backward_pre_hook", "_backward_pre_hooks"),
}


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Rounded(nn.Module):
    """In place of a dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.75


# ----------------------------------------------------------------------------------------------------------------------
# Operations


class Draw:
    """Random arguments that suit a model as it is."""

    def __init__(self, rng: random.Random, twin: Twin) -> None:
        self.rng, self.twin = rng, twin
        self.choice, self.random = rng.choice, rng.random

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def seed(self) -> int:
        return self.rng.randrange(1000)

    def seeds(self, *counts: int) -> list[int]:
        return [self.seed() for _ in range(self.choice(counts))]

    @property
    def names(self) -> list[str]:
        return list(self.twin.model.peft_config)

    def adapter(self) -> str:
        return self.choice(self.names)

    def adapters(self) -> list[str]:
        return self.rng.sample(self.names, self.rng.randint(1, min(3, len(self.names))))

    def layer(self) -> str:
        return self.choice([name for name, layer in self.twin.layers().items() if isinstance(layer, Linear)])

    def part(self) -> str:
        """A path of a layer's part, or of the layer."""
        layer = self.layer()
        module = self.twin.model.get_submodule(layer)
        factor = self.choice(list(module.lora_A) or [None])
        parts = ["", ".base_layer"] + ([] if factor is None else [
            f".lora_A.{factor}", f".lora_B.{factor}", f".lora_dropout.{factor}"
        ])  # fmt: skip
        return layer + self.choice(parts)

    def matrix(self) -> str:
        layer = self.layer()
        module = self.twin.model.get_submodule(layer)
        factor = self.choice(list(module.lora_A) or [None])
        return layer + self.choice([".base_layer"] + ([] if factor is None else 2 * [
            f".lora_A.{factor}", f".lora_B.{factor}"
        ]))  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """Something that a user does.

    Attributes:
        apply: does it to a twin, and returns what is to be compared.
        draw: draws its arguments; `None` where it does not suit.
        weight: how often.
        narrow: whether it computes in bfloat16.
        may_raise: whether the accelerated twin may refuse what PEFT does.
    """

    apply: Callable[..., dict[str, Any] | None]
    draw: Callable[[Draw], dict[str, Any] | None]
    weight: float = 1.0
    narrow: bool = False
    may_raise: bool = False


OPERATIONS: dict[str, Operation] = {}


def operation(draw: Callable[[Draw], dict[str, Any] | None] = lambda _: {}, weight: float = 1.0, **options: Any) -> Any:
    """Register a function of a twin and of drawn arguments as an operation."""

    def register(apply: Callable[..., dict[str, Any] | None]) -> Callable[..., dict[str, Any] | None]:
        OPERATIONS[apply.__name__] = Operation(apply, draw, weight, **options)
        return apply

    return register


def no_dropout(module: nn.Module) -> None:
    """Masks of twins would differ."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0


@operation(lambda _: {}, 0)
def probe(twin: Twin) -> dict[str, Any]:
    x = twin.input(0)
    return twin.gradients(twin(x), x)


@operation(lambda d: {"optimizer": d.choice(["sgd", "adamw"]), "seeds": d.seeds(1, 2), "accumulate": d.choice([1, 2]),
                      "clear": d.flag()}, 3)  # fmt: skip
def train(twin: Twin, optimizer: str, seeds: list[int], accumulate: int, clear: bool) -> dict[str, Any]:
    trained = list(twin.trained().values())
    if optimizer == "sgd":
        chosen: Any = torch.optim.SGD(trained, lr=0.02, momentum=0.5)
    else:  # an epsilon above what gradients are rounded by, or the first steps are those of signs of noise
        chosen = torch.optim.AdamW(trained, lr=0.01, eps=0.1)
    found = {}
    for number, seed in enumerate(seeds):
        for part in range(accumulate):
            loss(twin(twin.input(seed + part))).backward()
        found.update({f"{name}, step {number}": value for name, value in twin.accumulated().items()})
        chosen.step()
        chosen.zero_grad(set_to_none=clear)
    return found


@operation(lambda d: {"seeds": d.seeds(1, 2)})
def accumulate_and_keep(twin: Twin, seeds: list[int]) -> dict[str, Any]:
    for seed in seeds:
        loss(twin(twin.input(seed))).backward()
    return twin.accumulated()


@operation(lambda d: {"clear": d.flag()})
def zero_grad(twin: Twin, clear: bool) -> None:
    twin.model.zero_grad(set_to_none=clear)


@operation(lambda d: {"seeds": [d.seed(), d.seed()], "order": d.choice(["sum", "first", "last"])}, 2)
def two_forwards(twin: Twin, seeds: list[int], order: str) -> dict[str, Any]:
    xs = [twin.input(seed) for seed in seeds]
    outputs = [twin(x) for x in xs]
    losses = [loss(output) for output in outputs]
    try:
        if order == "sum":
            sum(losses).backward()
        else:
            for value in losses if order == "first" else reversed(losses):
                value.backward()
        return {**{f"input {i}": x.grad for i, x in enumerate(xs)}, **twin.accumulated()}
    finally:
        twin.model.zero_grad()


@operation(lambda d: {"seed": d.seed(), "path": d.matrix()}, 1)
def backward_twice(twin: Twin, seed: int, path: str) -> dict[str, Any]:
    x = twin.input(seed)
    value = loss(twin(x))
    first = torch.autograd.grad(value, [x, *twin.trained().values()], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(value, [x, *twin.trained().values()], allow_unused=True)
    return {f"pass {i}, {j}": each for i, them in enumerate((first, second)) for j, each in enumerate(them)}


@operation(lambda d: {"seed": d.seed(), "path": d.matrix()}, 1)
def edited_before_backward(twin: Twin, seed: int, path: str) -> dict[str, Any]:
    x = twin.input(seed)
    output = twin(x)
    with torch.no_grad():
        twin.model.get_submodule(path).weight.mul_(1.01)
    return twin.gradients(output, x)


@operation(lambda d: {"seed": d.seed()}, 1, may_raise=True)
def second_order(twin: Twin, seed: int) -> dict[str, Any]:
    x = twin.input(seed)
    (first,) = torch.autograd.grad(loss(twin(x)), x, create_graph=True)
    return twin.gradients(first, x)


@operation(lambda d: {"seed": d.seed()}, 1)
def second_order_in_reference_mode(twin: Twin, seed: int) -> dict[str, Any]:
    with lk.training.reference_mode(twin.model) if twin.fused else contextlib.nullcontext():
        x = twin.input(seed)
        (first,) = torch.autograd.grad(loss(twin(x)), x, create_graph=True)
        return twin.gradients(first, x)


@operation(lambda d: {"seed": d.seed(), "reentrant": d.flag(), "whole": d.flag()}, 2)
def checkpointed(twin: Twin, seed: int, reentrant: bool, whole: bool) -> dict[str, Any]:
    x = twin.input(seed)
    try:
        if whole:
            output = checkpoint(lambda value: twin(value), x, use_reentrant=reentrant)
        else:
            block = twin.model.base_model.model.get_submodule(KINDS[twin.kind].block)
            forward = block.forward

            def recomputed(value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return checkpoint(lambda h: forward(h, *args, **kwargs), value, use_reentrant=reentrant)

            block.forward = recomputed
            try:
                output = twin(x)
            finally:
                del block.forward
        loss(output).backward()
        return {"output": output.detach(), "input": x.grad, **twin.accumulated()}
    finally:
        twin.model.zero_grad()


@operation(lambda d: None if len(d.names) > 3 else {
    "name": d.choice([name for name in POOL if name not in d.names]), "adapter": d.choice(list(ADAPTERS)),
    "some": d.flag(), "again": d.flag(), "seed": d.seed()}, 3)  # fmt: skip
def add_adapter(twin: Twin, name: str, adapter: str, some: bool, again: bool, seed: int) -> None:
    kind = KINDS[twin.kind]
    torch.manual_seed(seed)
    twin.model.add_adapter(name, config(twin.kind, adapter, kind.some if some else kind.targets))
    if twin.model.training:
        no_dropout(twin.model)
    for layer in twin.layers().values():  # the dropout of a new adapter is in training mode whatever the model is in
        layer.train(twin.model.training)
    if again:
        twin.accelerate()


@operation(lambda d: {"names": d.adapters(), "several": d.flag()}, 3)
def set_adapter(twin: Twin, names: list[str], several: bool) -> None:
    if several:
        twin.model.base_model.set_adapter(names)
    else:
        twin.model.set_adapter(names[0])


@operation(lambda d: {"name": d.adapter()} if len(d.names) > 1 else None)
def delete_adapter(twin: Twin, name: str) -> None:
    twin.model.delete_adapter(name)


@operation(
    lambda d: (
        None if len(d.names) > 3 else {"name": "mixture", "names": d.adapters(), "how": d.choice(["linear", "cat"])}
    ),
    0.5,
)
def add_weighted_adapter(twin: Twin, name: str, names: list[str], how: str) -> None:
    twin.model.add_weighted_adapter(names, [0.5 + 0.25 * i for i in range(len(names))], name, combination_type=how)


@operation(lambda d: {"safe": d.flag(), "names": d.choice([None, d.adapters()])}, 1.5)
def merge(twin: Twin, safe: bool, names: list[str] | None) -> None:
    twin.model.merge_adapter(adapter_names=names, safe_merge=safe)


@operation(weight=3)
def unmerge(twin: Twin) -> None:
    twin.model.unmerge_adapter()


@operation(lambda d: {"safe": d.flag(), "merge": d.flag()}, 0.5)
def unload_of_a_copy(twin: Twin, safe: bool, merge: bool) -> dict[str, Any]:
    model = copy.deepcopy(twin.model)
    plain = model.merge_and_unload(safe_merge=safe) if merge else model.unload()
    x = twin.input(2)
    output = plain(inputs_embeds=x).logits if twin.kind == "llama" else plain(x)
    return {"output": output.detach()}


@operation(lambda d: {"seed": d.seed()})
def disable_adapter(twin: Twin, seed: int) -> dict[str, Any]:
    with twin.model.disable_adapter():
        x = twin.input(seed)
        return twin.gradients(twin(x), x)


@operation(weight=0.5)
def disable_adapter_layers(twin: Twin) -> None:
    twin.model.base_model.disable_adapter_layers()


@operation(weight=2)
def enable_adapter_layers(twin: Twin) -> None:
    twin.model.base_model.enable_adapter_layers()


@operation(lambda d: {"seed": d.seed(), "names": [d.choice([*d.names, "__base__"]) for _ in range(3)]}, 2)
def mixed_batch(twin: Twin, seed: int, names: list[str]) -> dict[str, Any]:
    x = twin.input(seed)
    hooks = {layer: list(layer._forward_pre_hooks) for layer in twin.layers().values()}
    try:
        return twin.gradients(twin(x, adapter_names=names), x)
    finally:  # PEFT leaves its own behind where it raises, and every later call raises, too
        for layer, before in hooks.items():
            for key in layer._forward_pre_hooks.keys() - set(before):
                del layer._forward_pre_hooks[key]


@operation(
    lambda d: {"name": d.adapter(), "layer": d.choice([None, d.layer()]), "scale": d.choice([0.0, 0.5, 1.0, -2.0])}
)
def set_scale(twin: Twin, name: str, layer: str | None, scale: float) -> None:
    for path, module in twin.layers().items():
        if layer is None or path == layer:
            module.set_scale(name, scale)


@operation(lambda d: {"layer": d.layer(), "scale": d.choice([0.25, 3.0])})
def scale_layer(twin: Twin, layer: str, scale: float) -> None:
    twin.model.get_submodule(layer).scale_layer(scale)


@operation(lambda d: {"layer": d.choice([None, d.layer()]), "scale": d.choice([None, 4.0])})
def unscale_layer(twin: Twin, layer: str | None, scale: float | None) -> None:
    for path, module in twin.layers().items():
        if layer is None or path == layer:
            module.unscale_layer(scale)


SCALINGS: dict[str, Callable[[float], Any]] = {
    "tensor": torch.tensor,
    "tensor of one": lambda value: torch.tensor([value]),
    "numpy": np.float64,
    "int": lambda value: math.ceil(value),
}


@operation(lambda d: {"layer": d.layer(), "value": d.choice([0.75, 1.5]), "number": d.choice(list(SCALINGS))}, 0.5)
def scaling_of_another_type(twin: Twin, layer: str, value: float, number: str) -> None:
    scaling = twin.model.get_submodule(layer).scaling
    for name in scaling:
        scaling[name] = SCALINGS[number](value)


PARAMETERS = ("lora_A", "lora_B", "base_layer", "magnitude", "bias", "")


@operation(lambda d: {"wanted": d.flag(), "which": d.choice(PARAMETERS), "layer": d.choice([None, d.layer()])}, 2)
def requires_grad(twin: Twin, wanted: bool, which: str, layer: str | None) -> None:
    for name, value in twin.model.named_parameters():
        if which in name and (layer is None or name.startswith(layer)):
            value.requires_grad_(wanted)


@operation(weight=2)
def train_mode(twin: Twin) -> None:
    no_dropout(twin.model)
    twin.model.train()


@operation(weight=2)
def eval_mode(twin: Twin) -> None:
    twin.model.eval()


@operation(lambda d: {"p": d.choice([0.4, 1.0])})
def dropout_in_eval_mode(twin: Twin, p: float) -> None:
    twin.model.eval()
    for layer in twin.layers().values():
        for part in layer.lora_dropout.values():
            if isinstance(part, nn.Dropout):
                part.p = p


@operation(lambda d: {"seed": d.seed(), "p": d.choice([0.4, 1.0])})
def dropout_in_eval_mode_alone(twin: Twin, seed: int, p: float) -> dict[str, Any]:
    """The layers train, and their dropouts do not."""
    before = twin.model.training
    dropouts = [part for part in twin.model.modules() if isinstance(part, nn.Dropout)]
    numbers = [part.p for part in dropouts]
    try:
        twin.model.train()
        for part in dropouts:
            part.p = p
            part.eval()
        x = twin.input(seed)
        return twin.gradients(twin(x), x)
    finally:
        for part, number in zip(dropouts, numbers, strict=True):
            part.p = number
        twin.model.train(before)


@operation(lambda d: {"seed": d.seed(), "how": d.choice(["no_grad", "inference_mode", "plain input"])})
def without_gradient(twin: Twin, seed: int, how: str) -> dict[str, Any]:
    x = twin.input(seed)
    if how == "plain input":
        output = twin(x.detach())
        values = list(twin.trained().values()) if output.requires_grad else []
        found = torch.autograd.grad(loss(output), values, allow_unused=True) if values else []
        return {"output": output.detach(), **dict(enumerate(found))}
    with torch.no_grad() if how == "no_grad" else torch.inference_mode():
        output = twin(x)
    return {"output": output.clone(), "attached": output.requires_grad}


@operation(lambda d: {"seed": d.seed()}, narrow=True)
def autocast(twin: Twin, seed: int) -> dict[str, Any]:
    x = twin.input(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=twin.dtype != torch.float64):
        output = twin(x)
    return {"dtype": None if twin.dtype == torch.float64 else output.dtype, **twin.gradients(output, x)}


@operation(lambda d: {"how": d.choice(["deepcopy", "pickle", "torch.save"])}, 1.5)
def copied(twin: Twin, how: str) -> None:
    if how == "deepcopy":
        twin.model = copy.deepcopy(twin.model)
    elif how == "pickle":
        twin.model = pickle.loads(pickle.dumps(twin.model))
    else:
        buffer = io.BytesIO()
        torch.save(twin.model, buffer)
        buffer.seek(0)
        twin.model = torch.load(buffer, weights_only=False)


@operation(lambda d: {"again": d.flag(), "seed": d.seed()})
def restore(twin: Twin, again: bool, seed: int) -> dict[str, Any]:
    x = twin.input(seed)
    output = twin(x)
    if twin.fused:
        lk.restore(twin.model)
        assert not any(accelerated(layer) for layer in twin.layers().values()), "not restored"
    found = twin.gradients(output, x)  # of a graph that is older
    twin.accelerate()
    return found


@operation(lambda d: {"seed": d.seed()}, 0.5)
def reference_mode(twin: Twin, seed: int) -> dict[str, Any]:
    x = twin.input(seed)
    with lk.training.reference_mode(twin.model) if twin.fused else contextlib.nullcontext():
        output = twin(x)
    return twin.gradients(output, x)


@operation(lambda d: {"assign": d.flag(), "seed": d.seed(), "some": d.flag()})
def load_state_dict(twin: Twin, assign: bool, seed: int, some: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in twin.model.state_dict().items()
        if not some or "lora" in name
    }
    wanted = {name: value.requires_grad for name, value in twin.model.named_parameters()}
    twin.model.load_state_dict(state, strict=not some, assign=assign)
    for name, value in twin.model.named_parameters():
        value.requires_grad_(wanted[name])


@operation(lambda d: None if len(d.names) > 3 else {
    "source": d.adapter(), "name": d.choice([name for name in POOL if name not in d.names]), "trainable": d.flag(),
    "again": d.flag()})  # fmt: skip
def save_and_load(twin: Twin, source: str, name: str, trainable: bool, again: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        twin.model.save_pretrained(folder, selected_adapters=[source], save_embedding_layers=False)
        path = folder if source == "default" else f"{folder}/{source}"
        twin.model.load_adapter(path, name, is_trainable=trainable)
    if twin.model.training:
        no_dropout(twin.model)
    for layer in twin.layers().values():
        layer.train(twin.model.training)
    if again:
        twin.accelerate()


@operation(lambda d: None if d.twin.dtype != torch.float32 else {})
def from_pretrained(twin: Twin) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        name = twin.model.active_adapters[0]
        twin.model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        torch.manual_seed(1)
        path = folder if name == "default" else f"{folder}/{name}"
        model = PeftModel.from_pretrained(KINDS[twin.kind].make(), path)
    loaded = Twin(twin.kind, model, twin.fused)
    loaded.accelerate()
    x = twin.input(5)
    return loaded.gradients(loaded(x), x)


@operation(lambda d: {"path": d.part()}, 1)
def replace_forward(twin: Twin, path: str) -> None:
    module = twin.model.get_submodule(path)
    if isinstance(module, LoraLayer):
        module = module.base_layer
    module.forward = Replaced(module)


@operation(weight=1.5)
def forward_again(twin: Twin) -> None:
    for module in twin.model.modules():
        module.__dict__.pop("forward", None)


@operation(lambda d: {"path": d.part(), "kind": d.choice(list(HOOKS))}, 1.5)
def add_hook(twin: Twin, path: str, kind: str) -> None:
    hook, register, _ = HOOKS[kind]
    getattr(twin.model.get_submodule(path), register)(hook())


@operation(weight=2)
def remove_hooks(twin: Twin) -> None:
    for module in twin.model.modules():
        for hook, _, attribute in HOOKS.values():
            hooks = getattr(module, attribute)
            for key in [key for key, value in hooks.items() if isinstance(value, hook)]:
                del hooks[key]


@operation(lambda d: {"seed": d.seed(), "kind": d.choice(["forward", "forward_pre"])})
def global_hook(twin: Twin, seed: int, kind: str) -> dict[str, Any]:
    class Within:
        """Acts on linear layers only: the calls of others differ between the twins."""

        def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
            if not isinstance(module, nn.Linear):
                return None
            return (args[0] * 1.25,) if output is None else output * 0.5

    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(Within())
    try:
        x = twin.input(seed)
        return twin.gradients(twin(x), x)
    finally:
        handle.remove()


@operation(lambda d: {"seed": d.seed(), "path": d.matrix(), "under": d.flag()})
def parametrization(twin: Twin, seed: int, path: str, under: bool) -> dict[str, Any]:
    module = twin.model.get_submodule(path)
    parametrize.register_parametrization(module, "weight", Halved())
    try:
        x = twin.input(seed)
        with parametrize.cached() if under else contextlib.nullcontext():
            return twin.gradients(twin(x), x)
    finally:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


@operation(lambda d: {"to": d.choice(["float64", "bfloat16", "float32", "float32"]),
                      "which": d.choice(["all", "all", "base", "factors"])}, 1.5)  # fmt: skip
def cast(twin: Twin, to: str, which: str) -> None:
    dtype = getattr(torch, to)
    if which == "all":
        twin.model.to(dtype)
    elif which == "base" and to != "float64":
        for layer in twin.layers().values():
            layer.base_layer.to(dtype)
    else:
        for name, value in twin.model.named_parameters():
            if "lora_" in name:
                value.data = value.data.to(dtype)


@operation(weight=1.5)
def back_to_float32(twin: Twin) -> None:
    twin.model.to(torch.float32)


@operation(lambda d: {"path": d.matrix(), "how": d.choice(["data", "data in place", "no_grad", "new parameter", "copy_",
                      "bias", "transposed"])}, 3)  # fmt: skip
def edit(twin: Twin, path: str, how: str) -> None:
    module = twin.model.get_submodule(path)
    weight = module.weight
    if how == "data":
        weight.data = weight.data * 0.9
    elif how == "data in place":
        weight.data.mul_(0.9)
    elif how == "no_grad":
        with torch.no_grad():
            weight.sub_(0.05)
    elif how == "copy_":
        with torch.no_grad():
            weight.copy_(weight.flip(0))
    elif how == "transposed":
        weight.data = weight.data.mT.contiguous().mT
    elif how == "bias":
        bias = getattr(module, "bias", None)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach() + 0.1, requires_grad=bias.requires_grad)
    else:
        module.weight = nn.Parameter(weight.detach() * 1.1, requires_grad=weight.requires_grad)


@operation(
    lambda d: {"path": d.part(), "seed": d.seed(), "how": d.choice(["linear", "biased", "own", "rank", "sequential"])},
    2,
)
def replace_module(twin: Twin, path: str, seed: int, how: str) -> None:
    owner, _, name = path.rpartition(".")
    holder, old = twin.model.get_submodule(owner), twin.model.get_submodule(path)
    torch.manual_seed(seed)
    if isinstance(old, LoraLayer):
        return
    if ".lora_dropout" in path:
        holder[name] = Rounded() if how == "own" else nn.Dropout(0.0) if how == "linear" else nn.Identity()
        return
    if not isinstance(old, nn.Linear):
        return
    wanted, dtype = old.weight.requires_grad, old.weight.dtype
    if how == "rank":
        if name == "base_layer":
            return
        layer = twin.model.get_submodule(owner.rpartition(".")[0])
        layer.lora_A[name] = nn.Linear(layer.in_features, 3, bias=False, dtype=dtype)
        layer.lora_B[name] = nn.Linear(3, layer.out_features, bias=False, dtype=dtype)
        return
    kind = OwnLinear if how == "own" else nn.Linear
    new: nn.Module = kind(
        old.in_features, old.out_features, bias=how == "biased" or old.bias is not None, dtype=dtype
    ).requires_grad_(wanted)
    if how == "sequential" and name == "base_layer":
        holder.base_layer = new
        return
    if isinstance(holder, nn.ModuleDict):
        holder[name] = new
    else:
        setattr(holder, name, new)


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "vector": lambda x: x[0],
    "matrix": lambda x: x,
    "empty": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "four dimensions": lambda x: x.reshape(2, 1, 3, -1),
    "columns": lambda x: x.repeat(1, 2)[:, ::2],
    "expanded": lambda x: x[:1].expand(5, -1),
    "transposed": lambda x: x.reshape(2, 3, -1).transpose(0, 1),
}


@operation(lambda d: {"seed": d.seed(), "layer": d.layer(), "shape": d.choice(list(SHAPES)), "keyword": d.flag()}, 2)
def call_layer(twin: Twin, seed: int, layer: str, shape: str, keyword: bool) -> dict[str, Any]:
    module = twin.model.get_submodule(layer)
    if shape == "vector" and any(module.use_dora.values()):  # of which PEFT makes a matrix
        shape = "one row"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, module.in_features, generator=generator).to(module.base_layer.weight.dtype).requires_grad_()
    output = module(x=SHAPES[shape](x)) if keyword else module(SHAPES[shape](x))
    return {"shape": tuple(output.shape), "strides": output.is_contiguous(), **twin.gradients(output, x)}


DTYPES = ("float64", "bfloat16", "float16", "int64")


@operation(lambda d: {"seed": d.seed(), "layer": d.layer(), "dtype": d.choice(DTYPES)}, 0.5, narrow=True)
def input_of_another_dtype(twin: Twin, seed: int, layer: str, dtype: str) -> dict[str, Any]:
    module = twin.model.get_submodule(layer)
    x = torch.randn(6, module.in_features, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    return {"output": module(x).detach()}


@operation(lambda d: {"seed": d.seed()}, 0.5)
def functional_call(twin: Twin, seed: int) -> dict[str, Any]:
    x = twin.input(seed)
    key = "inputs_embeds" if twin.kind == "llama" else "x"
    values = {
        name: (value.detach() * 0.9).requires_grad_(value.requires_grad)
        for name, value in twin.model.named_parameters()
    }
    output = torch.func.functional_call(twin.model, values, kwargs={key: x})
    output = output.logits if twin.kind == "llama" else output
    trained = [value for value in values.values() if value.requires_grad]
    if not output.requires_grad:
        return {"output": output}
    return {
        "output": output.detach(),
        **dict(enumerate(torch.autograd.grad(loss(output), [x, *trained], allow_unused=True))),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def accelerated(layer: nn.Module) -> bool:
    return isinstance(layer, Linear) and type(layer) is not Linear


def _epsilon(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


class Pair:
    """The twins.

    Args:
        kind: which model.
        adapter: which adapter it starts with.
    """

    def __init__(self, kind: str, adapter: str = "plain") -> None:
        self.kind, self.adapter = kind, adapter
        self.stock, self.fused = (Twin.make(kind, adapter, fused) for fused in (False, True))
        self.worst, self.raised = 0.0, 0  # the largest part of a bar that was used; how often both raised

    def step(self, name: str, arguments: dict[str, Any]) -> None:
        """Do an operation, and compare.

        Raises:
            Difference: if the twins differ.
        """
        self.compare(name, arguments)
        self.compare_states()
        self.compare("probe", {})

    def compare(self, name: str, arguments: dict[str, Any]) -> None:
        """Do an operation, and compare what comes of it.

        Raises:
            Difference: if the twins differ.
        """
        what = OPERATIONS[name]
        before = Twin(self.kind, self.stock.model if name == "probe" else copy.deepcopy(self.stock.model), False)
        (stock, expected), (fused, error) = (_outcome(what, twin, arguments) for twin in (self.stock, self.fused))
        if expected is not None and error is not None:
            self.raised += 1
            return
        if expected is not None:
            raise Difference(f"PEFT raises {type(expected).__name__} ({expected}), accelerated layers do not")
        if error is not None:
            if what.may_raise and isinstance(error, RuntimeError):
                return
            raise Difference(f"accelerated layers raise {type(error).__name__}: {error}") from error

        def truths(perturbation: float) -> tuple[dict[str, Any], dict[str, Any]]:
            true, near = (_outcome(what, before.double(part), arguments)[0] for part in (0.0, perturbation))
            return true, near

        self._compare(stock, fused, truths, narrow=what.narrow)

    def _compare(
        self,
        stock: dict[str, Any],
        fused: dict[str, Any],
        truths: Callable[[float], tuple[dict[str, Any], dict[str, Any]]] | None,
        narrow: bool = False,
    ) -> None:
        if stock.keys() != fused.keys():
            raise Difference(f"different results: {sorted(map(str, stock.keys() ^ fused.keys()))}")
        norms = {key: _norm(value) for key, value in stock.items() if isinstance(value, torch.Tensor)}
        typical = math.sqrt(sum(norm**2 for norm in norms.values()) / max(1, len(norms)))
        unit = max([KINDS[self.kind].floor, *(_epsilon(value) for value in self.stock.model.parameters())])
        unit = max(unit, torch.finfo(torch.bfloat16).eps if narrow else 0.0)
        true: dict[str, Any] = {}
        for key, expected in stock.items():
            found = fused[key]
            if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
                if type(expected) is not type(found) or expected != found:
                    raise Difference(f"{key}: {_short(found)}, but PEFT has {_short(expected)}")
                continue
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise Difference(f"{key}: {_short(found)}, but PEFT has {_short(expected)}")
            if not torch.equal(found.isfinite(), expected.isfinite()):
                raise Difference(f"{key}: finite where PEFT's is not, or not finite where PEFT's is")
            if not bool(expected.isfinite().all()):
                continue
            size = max(norms[key], 0.01 * typical)
            error, bar = _norm(found.double() - expected.double()), EPSILONS * unit * size
            if truths is not None and error > (0 if unit > 1e-4 else bar):
                if not true:
                    true, near = truths(unit)
                if isinstance(true.get(key), torch.Tensor) and true[key].shape == found.shape:
                    exact = true[key].double()
                    error, peer = _norm(found.double() - exact), _norm(expected.double() - exact)
                    bar = WORSE * max(peer, _norm(near[key].double() - exact), unit * size)
            if error > bar:
                raise Difference(f"{key}: off by {error / size:.1e} where {bar / size:.1e} is rounding")
            self.worst = max(self.worst, error / bar if bar else 0.0)

    def compare_states(self) -> None:
        """Compare all that the twins hold, and then give the accelerated one the other's rounding.

        Raises:
            Difference: if the twins differ.
        """
        one, other = self.stock.model, self.fused.model
        if [name for name, _ in one.named_modules()] != [name for name, _ in other.named_modules()]:
            raise Difference("different modules")
        values = dict(one.named_parameters()), dict(other.named_parameters())
        wants = [{name: value.requires_grad for name, value in each.items()} for each in values]
        if wants[0] != wants[1]:
            raise Difference(
                f"requires_grad: {sorted(name for name in wants[0] if wants[0][name] != wants[1].get(name))}"
            )
        modes = [[module.training for module in model.modules()] for model in (one, other)]
        if modes[0] != modes[1]:
            raise Difference("different training flags")
        for key in ("active_adapters", "disable_adapters", "merged_adapters"):
            states = [
                [getattr(layer, key, None) for layer in twin.layers().values()] for twin in (self.stock, self.fused)
            ]
            if states[0] != states[1]:
                raise Difference(f"{key}: {states[1]}, but PEFT has {states[0]}")
        for layer, twin in zip(self.stock.layers().items(), self.fused.layers().values(), strict=True):
            if repr(layer[1].scaling) != repr(twin.scaling):
                raise Difference(f"scaling of {layer[0]}: {twin.scaling}, but PEFT has {layer[1].scaling}")
        self._compare(dict(one.state_dict()), dict(other.state_dict()), None)
        grads = [
            {name: _short(value) for name, value in twin.accumulated().items()} for twin in (self.stock, self.fused)
        ]
        if grads[0] != grads[1]:
            raise Difference(f"gradients: {sorted(set(grads[0].items()) ^ set(grads[1].items()))}")
        if not any(accelerated(layer) for layer in self.fused.layers().values()):
            raise Difference("no layer is accelerated any more")
        with torch.no_grad():
            for name, value in values[1].items():
                for mine, peer in ((value, values[0][name]), (value.grad, values[0][name].grad)):
                    if mine is not None and not torch.equal(mine, peer):
                        mine.data.copy_(peer)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    return repr(value)


def _outcome(what: Operation, twin: Twin, arguments: dict[str, Any]) -> tuple[dict[str, Any], Exception | None]:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return what.apply(twin, **arguments) or {}, None
        except Exception as error:
            return {}, error


# ----------------------------------------------------------------------------------------------------------------------
# Sequences


def sequence(
    kind: str, seed: int, length: int = LENGTH, without: Sequence[str] = ()
) -> Iterator[tuple[Pair, str, dict[str, Any]]]:
    """Draw operations one after the other, each for the twins as they are then."""
    rng = random.Random(f"{kind} {seed}")
    pair = Pair(kind, rng.choice(list(ADAPTERS)))
    names = [name for name in OPERATIONS if name not in without]
    weights = [OPERATIONS[name].weight for name in names]
    done = 0
    while done < length:
        (name,) = rng.choices(names, weights)
        arguments = OPERATIONS[name].draw(Draw(rng, pair.stock))
        if arguments is not None:
            yield pair, name, arguments
            done += 1


def run(kind: str, seed: int, length: int = LENGTH, without: Sequence[str] = ()) -> Pair:
    """Draw and do a sequence.

    Raises:
        Difference: at the first difference, with the call that repeats it.
    """
    done: list[tuple[str, dict[str, Any]]] = []
    for pair, name, arguments in sequence(kind, seed, length, without):
        done.append((name, arguments))
        try:
            pair.step(name, arguments)
        except Difference as error:
            raise Difference(f"after {name}: {error}\n{call(kind, pair.adapter, done)}") from error
    return pair


def call(kind: str, adapter: str, operations: Operations) -> str:
    """The Python code that does a sequence."""
    return f"replay({kind!r}, {adapter!r}, {pprint.pformat(list(operations), width=120, sort_dicts=False)})"


def replay(kind: str, adapter: str, operations: Operations) -> Pair:
    """Do a sequence.

    Raises:
        Difference: at the first difference.
    """
    pair = Pair(kind, adapter)
    for name, arguments in operations:
        pair.step(name, arguments)
    return pair


def shortened(kind: str, adapter: str, operations: Operations) -> tuple[str, list[tuple[str, dict[str, Any]]], str]:
    """The shortest adapter and sequence found that still differ, by leaving out one operation after the other."""

    def fault(adapter: str, some: Operations) -> str:
        try:
            replay(kind, adapter, some)
        except Difference as error:
            return str(error)
        except Exception:  # what an operation was drawn for is missing
            return ""
        return ""

    rest = list(operations)
    adapter = "plain" if fault("plain", rest) else adapter
    for position in reversed(range(len(rest) - 1)):
        fewer = rest[:position] + rest[position + 1 :]
        if fault(adapter, fewer):
            rest = fewer
    adapter = "plain" if fault("plain", rest) else adapter
    return adapter, rest, fault(adapter, rest)


def main() -> None:
    """Print the shortened sequences of seeds, each kind of fault once."""
    parser = argparse.ArgumentParser(description="Shorten the sequences of seeds that differ.")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--without", nargs="*", default=(), choices=list(OPERATIONS), help="operations to leave out")
    options = parser.parse_args()
    found = set()
    for seed, kind in itertools.product(range(options.first, options.last + 1), KINDS):
        done: list[tuple[str, dict[str, Any]]] = []
        for pair, name, arguments in sequence(kind, seed, without=options.without):
            done.append((name, arguments))
            try:
                pair.step(name, arguments)
            except Difference:
                adapter, rest, why = shortened(kind, pair.adapter, done)
                fault = (adapter, *(step for step, _ in rest))
                if fault not in found:
                    found.add(fault)
                    print(f"# seed {seed}: {why}\n{call(kind, adapter, rest)}\n", flush=True)
                break


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
