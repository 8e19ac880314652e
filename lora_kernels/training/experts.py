"""The fused forward of PEFT's LoRA on the parameters of many experts.

PEFT wraps a module of experts once per adapted parameter, one wrapper around the other, and makes `W + dW` of all
experts at every call. Here the outermost wrapper runs an implementation as transformers' registry
(`ALL_EXPERTS_FUNCTIONS`) has others: the products of rows, sorted by expert, are those of the implementation that the
user chose, and low-rank parts are added. A module that is hooked into is called, and asks the registry by itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lora_kernels._checks import FLOATS
from lora_kernels.adapters import experts, parts
from lora_kernels.ops.grouped_lora import op as grouped
from lora_kernels.ops.grouped_lora.passes import Scalars
from lora_kernels.ops.lora_linear.op import TRANSFORMED
from lora_kernels.training import expert_blocks
from lora_kernels.training.description import is_patched, is_replaced, is_whole, plain_linear
from lora_kernels.training.expert_blocks import Term
from lora_kernels.training.lora_layer import GLOBAL_HOOKS, SEEDS, FusedForward, warn_once

NAME = "lora_kernels"  # of the implementation
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
OUTER = "another parameter of the same experts runs PEFT's own forward"
COLLECTED = "statistics of its experts are collected"


class _Call:
    """What a wrapper asks of `experts_forward`."""

    def __init__(self, implementation: str, terms: dict[str, list[Term]]) -> None:
        self.implementation, self.terms, self.ran = implementation, terms, False


class _Thread(threading.local):
    call: _Call | None = None  # under way through a module of experts


_thread, _lock = _Thread(), threading.Lock()


class _Routed(experts.OtherConfig):
    """The config of a module of experts while wrappers call it: another implementation in the threads that do."""

    users = 0

    @property
    def _experts_implementation(self) -> str:  # type: ignore[override]
        return NAME if _thread.call is not None else self.config._experts_implementation  # type: ignore[no-any-return]


class FusedExperts(FusedForward):
    """The forward of an accelerated wrapper of a parameter of experts; mixed into a subclass of PEFT's own class."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's, fused where possible, for x `(tokens, n)` and what the module of experts takes beside it."""
        if self._runs_fused(x) and "adapter_names" not in kwargs:
            chain = experts.chain_of(self)
            base, terms = chain[-1].base_layer, _terms(chain)
            call = _Call(base.config._experts_implementation, terms)
            if terms and _asks_registry(type(base)) and not is_replaced(base):
                return _forward(call, base, x, *args, **kwargs)
            if terms:
                with _redirected(base, call):
                    result: torch.Tensor = base(x, *args, **kwargs)
                if call.ran:
                    return result
                warn_once("the module of experts does not ask transformers' registry for its implementation")
        result = super(FusedForward, self).forward(x, *args, **kwargs)  # type: ignore[misc]
        return result

    def _runs_fused(self, x: torch.Tensor) -> bool:
        disabled = any(wrapper.disable_adapters for wrapper in experts.chain_of(self)) or any(GLOBAL_HOOKS)
        if disabled or not (self.fused and FusedForward.fused):
            return False
        if type(x) not in (torch.Tensor, nn.Parameter) and not isinstance(x, FakeTensor):
            return False
        reason = experts_reason(self)
        if reason is not None and reason not in (self.__dict__.get("_eager_reason"), OUTER, COLLECTED):
            warn_once(reason)
        return reason is None


def experts_reason(wrapper: Any, *, gathered: bool = False) -> str | None:
    """Why a wrapper and those in it must run PEFT's own forward now, or `None`; FSDP2 may have `gathered` them."""
    chain = experts.chain_of(wrapper)
    base = chain[-1].base_layer
    if not all(hasattr(base, trait) for trait in experts.TRAITS):
        return f"{type(base).__name__} takes no implementation from transformers' registry of experts"
    if "parametrizations" in base._modules:
        return OUTER
    if getattr(base, "_is_expert_parallel", False):
        return "the experts are shared out over processes"
    if (reason := _implementation_reason(base.config._experts_implementation)) is not None:
        return reason
    if not torch.compiler.is_compiling() and any(is_patched(wrapper) for wrapper in chain):
        return "the forward of PEFT's ParamWrapper is replaced"
    for inner in chain[1:]:
        if is_replaced(inner):
            return f"the wrapper of {inner.parameter_name} is hooked into"
    for link in chain:
        if (reason := _wrapper_reason(link, gathered)) is not None:
            return reason
    return None


def _implementation_reason(name: str | None) -> str | None:
    try:
        from transformers.integrations import moe  # noqa: PLC0415  (an optional dependency)

        registry, products = moe.ALL_EXPERTS_FUNCTIONS, (moe._grouped_linear, moe._batched_linear)
    except (ImportError, AttributeError):
        return "this version of transformers has no registry of experts that is known"
    if name == experts.OBSERVED:
        return COLLECTED
    if name not in _IMPLEMENTATIONS:
        return f"the experts' implementation is {name!r}"
    if name != "eager" and registry[name] is not getattr(moe, f"{name}_experts_forward") or not all(products):
        return f"the experts' implementation {name!r} is replaced"
    if NAME not in registry:
        registry[NAME] = experts_forward
    return None


def _wrapper_reason(wrapper: Any, gathered: bool) -> str | None:
    name, parameter = wrapper.parameter_name, wrapper.get_param()
    if name not in experts.PRODUCTS:
        return f"the parameter {name} is not the weight of a product of experts"
    if parameter.dim() != 3 or parameter.dtype not in FLOATS or not is_whole(parameter, gathered):
        return f"the parameter {name} is quantized, sharded or no stack of matrices"
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        factors = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
        if (reason := experts.why_no_sum(wrapper, adapter)) is not None:
            return reason
        if any(not plain_linear(factor, gathered) or factor.bias is not None for factor in factors):
            return f"the factors of adapter {adapter!r} are sharded, hooked into or no plain linear layers"
        if wrapper.lora_variant.get(adapter) is not None or type(wrapper.lora_dropout[adapter]) is not nn.Identity:
            return f"adapter {adapter!r} is a variant or has dropout"
        if isinstance(wrapper.scaling[adapter], torch.Tensor):
            return f"the scaling of adapter {adapter!r} is a tensor, which can change in place"
    return None


def _terms(chain: Sequence[Any]) -> dict[str, list[Term]]:
    """By parameter, the low-rank parts of its active adapters."""
    terms: dict[str, list[Term]] = {}
    for wrapper in chain:
        if wrapper.merged:
            continue
        for adapter in wrapper.active_adapters:
            if adapter in wrapper.lora_A:
                scaling = float(wrapper.scaling[adapter])
                state = None
                if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                    with torch.inference_mode(False):  # graphs are to keep it
                        state = torch.tensor([hash((adapter, scaling)) & SEEDS])
                mine = terms.setdefault(wrapper.parameter_name, [])
                weights = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
                mine.append(Term(*experts.by_expert(wrapper, *weights), scaling, state))
                if (began := parts.start(wrapper, adapter)) is not None:
                    mine.append(Term(*experts.by_expert(wrapper, began.a, began.b), began.sign * scaling, state))
    return terms


_asks_registry = torch.compiler.assume_constant_result(experts.asks_registry)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _redirected(base: Any, call: _Call) -> Iterator[None]:
    """Make a module of experts ask for `experts_forward`, in this thread: others may be in the same module."""
    with _lock:
        routed = base.config if isinstance(base.config, _Routed) else _Routed(base.config)
        base.config, routed.users = routed, routed.users + 1
    before, _thread.call = _thread.call, call
    try:
        yield
    finally:
        _thread.call = before
        with _lock:
            routed.users -= 1
            if not routed.users:
                base.config = routed.config


def _sums(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The sums `(tokens, n)` of `rows[places]` `(tokens, k, n)` over k, weighted, in fixed order: without atomics."""
    if rows.device.type != "cpu":
        picked = rows[places]
        return (picked if weights is None else picked * weights.unsqueeze(-1)).sum(1)
    wide = torch.promote_types(rows.dtype, torch.float32 if weights is None else weights.dtype)
    wide = torch.promote_types(wide, torch.float32)
    total = rows.new_zeros(places.shape[0], rows.shape[1], dtype=wide)
    # One choice of all tokens after the other, in the same memory: fresh pages cost more than the arithmetic.
    picked = rows.new_empty(total.shape)
    for choice in range(places.shape[1]):
        torch.index_select(rows, 0, places[:, choice], out=picked)
        if weights is None:
            total.add_(picked)
        else:
            total.addcmul_(picked.to(wide), weights[:, choice, None].to(wide))
    return total


class _Rows(torch.autograd.Function):
    """The rows `(tokens k, n)` of x `(tokens, n)` in the order of their experts; token i has `places[i]`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, owners: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x[owners]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return _sums(g, ctx.saved_tensors[0]).to(g.dtype), None, None


class _Combined(torch.autograd.Function):
    """The sums of the rows of each token, times the weights `(tokens, k)` of its experts."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, places)
        ctx.dtype = rows.dtype
        return _sums(rows, places, weights)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, weights, places = ctx.saved_tensors
        need_rows, need_weights, _ = ctx.needs_input_grad
        of_rows = g.new_empty(places.numel(), g.shape[1], dtype=ctx.dtype) if need_rows else None
        of_weights = torch.empty_like(weights) if need_weights else None
        # One choice of all tokens after the other: no temporary of the size of all rows.
        for choice in range(places.shape[1]):
            index = places[:, choice]
            if of_weights is not None:
                of_weights[:, choice] = (g * rows.index_select(0, index)).sum(1)
            if of_rows is not None:
                of_rows.index_copy_(0, index, (g * weights[:, choice, None]).to(ctx.dtype))
        return of_rows, of_weights, None


def _product(
    module: Any, implementation: str, x: torch.Tensor, name: str, ids: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The products by transformers' own kernels; row i is of expert `ids[i]`, the rows of expert e end at `ends[e]`."""
    from transformers.integrations import moe  # noqa: PLC0415  (an optional dependency)

    weight, bias = getattr(module, name), getattr(module, f"{name}_bias")[ids] if module.has_bias else None
    settings = {"bias": bias, "is_transposed": module.is_transposed}
    if implementation == "batched_mm":
        return moe._batched_linear(x, weight[ids], **settings)  # type: ignore[no-any-return]
    return moe._grouped_linear(x, weight, offs=ends, **settings)  # type: ignore[no-any-return]


def experts_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Transformers' implementation of experts, for x `(tokens, n)` and choices `(tokens, k)`, with low-rank parts."""
    call = _thread.call
    if call is None:
        raise ValueError(f"the implementation {NAME!r} of experts is for accelerated LoRA layers alone")
    call.ran = True
    return _forward(call, module, hidden_states, top_k_index, top_k_weights)


def _forward(
    call: _Call, module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
        raise RuntimeError(TRANSFORMED)
    tokens, count = top_k_index.shape
    ids, order, offsets = experts.sort_by_expert(top_k_index, module.num_experts)
    if expert_blocks.can_run(module, hidden_states, top_k_weights):
        return expert_blocks.run(module, hidden_states, top_k_weights, order, offsets, call.terms)
    eager = call.implementation == "eager"
    bounds, ends = offsets.tolist() if eager else [], offsets[1:].to(torch.int32)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    places = places.view(tokens, count)
    x = _Rows.apply(hidden_states, order // count, places)  # type: ignore[no-untyped-call]

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        """Of rows x, sorted by expert, with a parameter and its bias; the low-rank parts are added in its memory."""
        if eager:  # as models have it themselves
            y = experts.one_by_one(module, x, name, bounds)
        else:
            y = _product(module, call.implementation, x, name, ids, ends)
        x = x.to(y.dtype)
        for a, b, scaling, state in call.terms.get(name, ()):
            scalars = Scalars(scaling, 0, 0, grouped.experts.choose("auto", x))
            y = grouped.run(y, x, offsets, a, b, None, state, scalars, True)
        return y

    out = experts.mixture(module, x, product)
    out = _Combined.apply(out, top_k_weights, places)  # type: ignore[no-untyped-call]
    return out.to(hidden_states.dtype)  # type: ignore[no-any-return]
