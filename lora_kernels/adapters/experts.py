"""The experts of a module of many, seen as linear layers with adapters of their own.

PEFT adapts a parameter `(experts, ...)` as one layer, a `ParamWrapper`, and keeps the factors of all experts in two
matrices: the rows of the first are ordered by expert and rank, the columns of the second by rank and expert. Which of
the two meets the inputs depends on the layout of the parameter and on PEFT's version. `by_expert` takes them apart for
all experts at once, `ExpertLayer` shows one expert as a layer. While statistics are collected, a module of experts
runs an implementation out of transformers' registry that calls an expert with the rows that go to it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_kernels._checks import FLOATS
from lora_kernels.runtime.modes import is_sharded

PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
TRAITS = ("config", "num_experts", "has_gate", "has_bias", "is_transposed")
OBSERVED = "lora_kernels_observed"  # the implementation in transformers' registry
_LAYERS = "_lora_kernels_experts"  # where a module of experts keeps its layers while it is observed


def chain_of(wrapper: Any) -> list[Any]:
    """A wrapper and those inside of it, around one module of experts."""
    chain = [wrapper]
    while hasattr(chain[-1].base_layer, "parameter_name") and hasattr(chain[-1].base_layer, "lora_A"):
        chain.append(chain[-1].base_layer)
    return chain


def first_meets_inputs(wrapper: Any) -> bool:
    """Whether the first of PEFT's two matrices is the one that the inputs are multiplied by (A)."""
    base = chain_of(wrapper)[-1].base_layer
    if wrapper.num_experts == 1:
        return not base.is_transposed  # PEFT adds `B A` to one matrix as it is stored
    return bool(base.is_transposed or getattr(wrapper, "_did_swap_in_out_features", False))


def why_no_sum(wrapper: Any, adapter: str) -> str | None:
    """Why PEFT cannot add the update of one expert to its matrix, or `None`."""
    first, second = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    if wrapper.num_experts > 1 or (second.shape[0], first.shape[1]) == tuple(wrapper.get_param().shape[1:]):
        return None
    return "PEFT's update of one expert is of the transposed shape in this layout, and cannot be added to its weight"


def by_expert(wrapper: Any, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(experts, r, n)` and B `(experts, m, r)`, differentiable, of weights `(experts r, .)` and `(., r experts)`."""
    left, right = split_experts(first.unsqueeze(0), second.unsqueeze(0), wrapper.num_experts)
    right = right.contiguous()
    return (left, right) if first_meets_inputs(wrapper) else (right.mT, left.mT)


def split_experts(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(L experts, r, n)` and B `(L experts, m, r)`, from PEFT's `(L, experts r, n)` and `(L, m, r experts)`."""
    if experts == 1:
        return a, b
    columns = b.reshape(*b.shape[:2], b.shape[2] // experts, experts).permute(0, 3, 1, 2)
    return a.reshape(-1, a.shape[1] // experts, a.shape[2]), columns.flatten(0, 1)


def join_experts(a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `split_experts`."""
    if experts == 1:
        return a, b
    columns = b.view(len(b) // experts, experts, *b.shape[1:]).permute(0, 2, 3, 1)
    return a.reshape(-1, experts * a.shape[1], a.shape[2]), columns.flatten(2)


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices `(tokens, k)` by expert: experts, their places in `top_k_index`, offsets `(experts + 1,)` of runs."""
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    places = torch.arange(experts + 1, device=ids.device, dtype=ids.dtype)
    return ids, order, torch.searchsorted(ids, places)


class _Base(nn.Module):
    """What is under the adapter of one expert."""

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    @property
    def weight(self) -> torch.Tensor:
        """W `(m, n)`, a view."""
        layer = self.__dict__["layer"]
        matrix: torch.Tensor = layer.wrapper.get_param().detach()[layer.expert]
        return matrix.mT if layer.transposed else matrix


class ExpertLayer(nn.Module):
    """One expert of a parameter with its adapters; called, it is the product of the rows that go to this expert."""

    wrapper: Any  # PEFT's layer for all experts
    expert: int
    rows: torch.Tensor | None  # of the current call, the numbers of the tokens that its rows are
    tokens: int  # of how many
    operands: tuple[torch.Tensor, torch.Tensor | None] | None
    lora_magnitude_vector: dict[str, Any] = {}  # noqa: RUF012  (no adapter of a parameter is DoRA)

    def __init__(self, name: str, wrapper: Any, expert: int) -> None:
        """See one expert of a wrapper, by the wrapper's name in the model."""
        super().__init__()
        # Not as submodules: whoever walks through the model meets the wrapper.
        self.__dict__ |= {"wrapper": wrapper, "expert": expert, "rows": None, "tokens": 0, "operands": None}
        self.wrapper_name = name
        self.transposed = chain_of(wrapper)[-1].base_layer.is_transposed
        m, n = wrapper.get_param().shape[1:]
        self.out_features, self.in_features = (n, m) if self.transposed else (m, n)
        self.direct = first_meets_inputs(wrapper)

    # What PEFT's layer has, of all experts: by adapter, and whether adapters are merged.
    r = property(attrgetter("wrapper.r"))
    lora_alpha = property(attrgetter("wrapper.lora_alpha"))
    use_rslora = property(attrgetter("wrapper.use_rslora"))
    scaling = property(attrgetter("wrapper.scaling"))
    merged = property(attrgetter("wrapper.merged"))

    def get_base_layer(self) -> nn.Module:
        """What is under the adapter."""
        return _Base(self)

    def _parts(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of this expert, views: writing to them writes to PEFT's matrices."""
        return self.of(self.wrapper.lora_A[adapter].weight.detach(), self.wrapper.lora_B[adapter].weight.detach())

    def of(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(r, n)` and B `(m, r)` of this expert, views of matrices in PEFT's layout."""
        rank = first.shape[0] // self.wrapper.num_experts
        left = first[self.expert * rank : (self.expert + 1) * rank]
        right = second[:, self.expert :: self.wrapper.num_experts]
        return (left, right) if self.direct else (right.mT, left.mT)

    @property
    def lora_A(self) -> dict[str, SimpleNamespace]:  # noqa: N802  (PEFT's name)
        """A by adapter, views, as PEFT's linear layers show theirs."""
        return {name: SimpleNamespace(weight=self._parts(name)[0], bias=None) for name in self.wrapper.lora_A}

    @property
    def lora_B(self) -> dict[str, SimpleNamespace]:  # noqa: N802  (PEFT's name)
        """B by adapter, views."""
        return {name: SimpleNamespace(weight=self._parts(name)[1], bias=None) for name in self.wrapper.lora_A}

    @torch.no_grad()
    def put(self, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write A `(r, n)` and B `(m, r)`."""
        for part, value in zip(self._parts(adapter), (a, b), strict=True):
            part.copy_(value)

    def call(
        self, x: torch.Tensor, operands: tuple[torch.Tensor, torch.Tensor | None], rows: torch.Tensor, tokens: int
    ) -> Any:
        """The product, by way of the hooks on this layer."""
        self.__dict__ |= {"operands": operands, "rows": rows, "tokens": tokens}
        try:
            return self(x)
        finally:
            self.__dict__ |= {"operands": None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x W^T` with the bias; inside of `call`."""
        assert self.operands is not None  # called by `call` alone
        weight, bias = self.operands
        return nn.functional.linear(x, weight, bias)


def asks_registry(kind: type) -> bool:
    """Whether a class of experts has the forward that transformers' decorator gives it."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return "experts_interface" in getattr(getattr(forward, "__code__", None), "co_freevars", ())


def why_unseen(wrapper: Any, adapter: str) -> str | None:
    """Why the experts of a wrapper cannot be seen as layers, or `None`."""
    base, name = chain_of(wrapper)[-1].base_layer, wrapper.parameter_name
    if wrapper.get_param().dim() != 3:
        return f"target_parameters ({name}): {type(base).__name__} is no module of experts (a router, say)"
    if name not in PRODUCTS or not all(hasattr(base, trait) for trait in TRAITS):
        return f"target_parameters ({name}): {type(base).__name__} is not a module of experts that transformers routes"
    if not asks_registry(type(base)):
        return f"target_parameters ({name}): {type(base).__name__} does not ask transformers' registry of experts"
    if getattr(base, "_is_expert_parallel", False):
        return f"target_parameters ({name}): its experts are shared out over processes"
    if (reason := why_no_sum(wrapper, adapter)) is not None:
        return f"target_parameters ({name}): {reason}"
    parameter, factors = wrapper.get_param(), (wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight)
    if parameter.dtype not in FLOATS or any(map(is_sharded, (parameter, *factors))):
        return f"target_parameters ({name}): it is quantized or sharded"
    return None


def expert_layers(name: str, wrapper: Any) -> dict[str, ExpertLayer]:
    """One layer per expert of a wrapper's parameter, by a name of its own: experts, parameter, number."""
    stem = f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"
    return {f"{stem}.{expert}": ExpertLayer(name, wrapper, expert) for expert in range(wrapper.num_experts)}


class OtherConfig:
    """The config of a module of experts with another implementation: while it is observed, of its own."""

    _experts_implementation = OBSERVED

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


@contextlib.contextmanager
def observed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run the modules of experts so that those of their experts that are among `modules` are called as layers."""
    by_base: dict[Any, dict[str, dict[int, ExpertLayer]]] = defaultdict(lambda: defaultdict(dict))
    for module in modules:
        if isinstance(module, ExpertLayer):
            base = chain_of(module.wrapper)[-1].base_layer
            by_base[base][module.wrapper.parameter_name][module.expert] = module
    if by_base:
        from transformers.integrations import moe  # noqa: PLC0415  (an optional dependency)

        moe.ALL_EXPERTS_FUNCTIONS[OBSERVED] = _forward
    with contextlib.ExitStack() as undo:
        for base, layers in by_base.items():
            undo.callback(setattr, base, "config", base.config)
            undo.callback(base.__dict__.pop, _LAYERS, None)
            base.config, base.__dict__[_LAYERS] = OtherConfig(base.config), layers
        yield


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias)


def one_by_one(
    module: Any, x: torch.Tensor, name: str, bounds: list[int], run: Callable[..., Any] = _linear
) -> torch.Tensor:
    """The products of x, sorted by expert, with a parameter, by `run(x, weight, bias, expert, place)` per expert."""
    weight, bias = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    parts = []
    for expert, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if low < high:
            matrix = weight[expert].mT if module.is_transposed else weight[expert]
            operands = matrix, None if bias is None else bias[expert]
            parts.append(run(x[low:high], *operands, expert, slice(low, high)))
    width = weight.shape[2 if module.is_transposed else 1]
    return torch.cat(parts) if parts else x.new_zeros(0, width)  # (a call without rows)


def mixture(module: Any, x: torch.Tensor, product: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What the experts of a module make of rows x `(rows, n)`, sorted by expert."""
    inner = product(x, "gate_up_proj" if module.has_gate else "up_proj")
    out = product(module._apply_gate(inner) if module.has_gate else module.act_fn(inner), "down_proj")
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out  # type: ignore[no-any-return]


def _forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
    """The experts of a module, one after another, with the rows of `(tokens, n)` that `(tokens, k)` indices send."""
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)  # who goes where is in the numbers
    tokens, count = top_k_index.shape
    _, order, offsets = sort_by_expert(top_k_index, module.num_experts)
    bounds = offsets.tolist()
    rows = order // count
    layers = module.__dict__[_LAYERS]

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int, place: slice) -> Any:
            layer = layers[name].get(expert) if name in layers else None
            return _linear(x, weight, bias) if layer is None else layer.call(x, (weight, bias), rows[place], tokens)

        return one_by_one(module, x, name, bounds, run)

    out = mixture(module, hidden_states[rows], product) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    result = torch.zeros(tokens, out.shape[1], dtype=out.dtype, device=out.device).index_add(0, rows, out)
    return result.to(hidden_states.dtype)
