"""What one adapter of a LoRA layer may have besides A and B: a frozen start, and LoRA-Dash's coordinates.

    y = base(x) + s B A drop(x)  -  s B0 A0 x  +  sum_i c_i u_i (v_i^T x)

PEFT hands forward, merging and unmerging of an adapter to `layer.lora_variant[adapter]`, a `PartsVariant`; the tensors
lie in `layer.lora_start[adapter]` and `layer.lora_dash[adapter]`, and PEFT moves, activates, deletes and saves them.

A layer's state dict has the parts as more rank of A and B: `[A; A0; V^T]` and `[B, -B0, U diag(c) / s]`. That is a
stock adapter of the same function, whoever reads it. Loading takes them apart again, to the bit. Factors that are
sharded (FSDP2) are left as they are in a state dict; `adapters.config` joins them in the file.

A parameter of many experts can have a frozen start in the layout of its factors, `(experts r, .)`, `(., r experts)`:
rank within expert in the first, expert within rank in the second. One expert is the ordinary case.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_kernels.adapters.names import scaling_of
from lora_kernels.adapters.view import stock_class
from lora_kernels.runtime.modes import is_sharded

START, DASH = "lora_start", "lora_dash"
_PARTS = (START, DASH)
# PEFT's layers whose forward asks a variant.
_CARRIERS = (
    "Linear", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "GPTQLoraLinear", "HqqLoraLinear", "IncLoraLinear",
)  # fmt: skip
_OF_EXPERTS = "ParamWrapper"  # asks `get_delta_weight`, in newer versions `get_delta_factors`
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel reads it when it wraps a module

# Names the key of a tensor in a state dict, from the container of PEFT's that it lies in and the rest.
Key = Callable[[str, str], str]


class Extension(NamedTuple):
    """More rank of an adapter: `+ ((x right^T) * coordinates) left^T + s sign (x A0^T) B0^T`, x not dropped."""

    # A variant whose forward is `base(x) + s B A drop(x)` and such parts returns them by `fused(layer, adapter)`.

    coordinates: torch.Tensor | None  # `(k,)`, not scaled by s; `None` without LoRA-Dash
    left: torch.Tensor | None = None  # `(m, k)`, or `None` before the coordinates have directions
    right: torch.Tensor | None = None  # `(k, n)`, without a gradient, or `None` as `left`
    # A0 `(r, n)`, B0 `(m, r)`, without gradients, and the sign; or `None`.
    start: tuple[torch.Tensor, torch.Tensor, float] | None = None


class _Tied(torch.autograd.Function):
    """The first argument, and a gradient of exactly zero for the second."""

    @staticmethod
    def forward(value: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG004
        ctx.size, ctx.dtype = inputs[1].shape, inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return g, g.new_zeros(ctx.size, dtype=ctx.dtype)


def tied(value: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
    """`value`, in whose graph the coordinates get a gradient of exactly zero."""
    # DistributedDataParallel waits for the gradients of all parameters, also those of coordinates without directions.
    result: torch.Tensor = _Tied.apply(value, coordinates) if coordinates.requires_grad else value  # type: ignore[no-untyped-call]
    return result


class Start(nn.Module):
    """Where an adapter started, frozen: A0 `(r, n)` and B0 `(m, r)` of one or more experts; `s B0 A0` is subtracted."""

    sign = -1.0
    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, a: torch.Tensor, b: torch.Tensor, experts: int = 1) -> None:
        """Take `(r, n)` and `(m, r)`, which must be no views of the adapter's own factors."""
        super().__init__()
        self.experts = experts
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    @property
    def rank(self) -> int:
        """The rank r that it adds."""
        return self.a.shape[0] // self.experts


class Directions(nn.Module):
    """LoRA-Dash's coordinates, and the directions they belong to; all of them are zero until the switch."""

    coordinates: nn.Parameter  # c `(k,)`
    left: torch.Tensor  # the `u_i` `(m, k)`, frozen
    right: torch.Tensor  # the `v_i^T` `(k, n)`, frozen

    def __init__(self, k: int, weight_a: torch.Tensor, weight_b: torch.Tensor) -> None:
        """Zeros, of the dtype and on the device of the adapter's factors `(r, n)` and `(m, r)`."""
        super().__init__()
        self.coordinates = nn.Parameter(weight_a.new_zeros(k), requires_grad=weight_a.requires_grad)
        self.register_buffer("left", weight_b.new_zeros(weight_b.shape[0], k))
        self.register_buffer("right", weight_a.new_zeros(k, weight_a.shape[1]))
        self.steps, self.launched = 0, False  # optimizer steps counted, and whether they led to the switch

    def get_extra_state(self) -> torch.Tensor:
        """Steps and switch, which are saved and loaded with the tensors."""
        return torch.tensor([self.steps, int(self.launched)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over what was loaded."""
        self.steps, self.launched = int(state[0]), bool(state[1])

    @torch.no_grad()
    def launch(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Set directions `(m, k)` and `(k, n)`, with coordinates of zero: the function does not change."""
        self.left.copy_(left)
        self.right.copy_(right)
        self.coordinates.zero_()
        self.launched = True


class PartsVariant:
    """PEFT's `LoraVariant` interface; it asks for nothing but these methods."""

    def supports_lora_conversion(self) -> bool:
        """Yes: `get_delta_weight` of the layer has all parts."""
        return True

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing: the parts are there before the variant is."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """`result` and the adapter with its parts, of which only `s B A` is dropped, and only c not scaled by s."""
        factor, scaling = module.lora_A[active_adapter], module.scaling[active_adapter]
        hidden = factor(module.lora_dropout[active_adapter](x))
        if hidden.shape[-1] > module.r[active_adapter]:  # a state dict's factors (functional_call): joined already
            return result + module.lora_B[active_adapter](hidden) * scaling  # type: ignore[no-any-return]
        if (dash := directions(module, active_adapter)) is not None and not dash.launched:
            hidden = tied(hidden, dash.coordinates)
        result = result + module.lora_B[active_adapter](hidden) * scaling
        began, dtype = start(module, active_adapter), factor.weight.dtype
        if began is not None:
            hidden = nn.functional.linear(x, began.a.to(dtype))
            result = result + nn.functional.linear(hidden, began.b.to(dtype)) * (began.sign * scaling)
        if dash is not None and dash.launched:
            dtype = dash.coordinates.dtype
            hidden = nn.functional.linear(x, dash.right.to(dtype)) * dash.coordinates
            result = result + nn.functional.linear(hidden, dash.left.to(dtype))
        return result

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with the adapter, a new tensor."""
        return orig_weight + _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """The same in place."""
        orig_weight.data += _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the adapter."""
        return orig_weight.data - _delta_like(orig_weight, module, active_adapter)

    @staticmethod
    def fused(module: Any, adapter: str) -> Extension:
        """What the fused forward adds (see `Extension`)."""
        if module.lora_A[adapter].weight.shape[0] > module.r[adapter]:
            return Extension(None)  # a state dict's factors (functional_call): joined already
        dash, began = directions(module, adapter), start(module, adapter)
        extension = Extension(None if dash is None else dash.coordinates)
        if dash is not None and dash.launched:
            extension = Extension(dash.coordinates, dash.left, dash.right)
        return extension if began is None else extension._replace(start=(began.a, began.b, began.sign))


def _delta_like(weight: torch.Tensor, layer: Any, adapter: str) -> torch.Tensor:
    if not weight.is_floating_point():  # casting the sum to it would leave nothing of the adapter
        raise ValueError(f"a base weight of {weight.dtype} cannot take an adapter up: merge on an unquantized base")
    delta: torch.Tensor = layer.get_delta_weight(adapter)
    return delta.to(weight.dtype)


def delta_weight(layer: Any, adapter: str) -> torch.Tensor:
    """`get_delta_weight` of a layer with parts, `s (B A - B0 A0) + U diag(c) V^T`, transposed as the base weight is."""
    # It is all that merging, unmerging and conversion see of an adapter.
    dash, began = directions(layer, adapter), start(layer, adapter)
    if began is None and (dash is None or not dash.launched):
        stock: torch.Tensor = type(layer).get_delta_weight(layer, adapter)
        return stock
    if getattr(layer, "num_experts", 1) > 1:
        left, right, scaling = delta_factors(layer, adapter)
        product: torch.Tensor = (left @ right) * scaling
        return product
    weight_b = layer.lora_B[adapter].weight
    wide = torch.promote_types(weight_b.dtype, torch.float32)
    delta: torch.Tensor = weight_b.to(wide) @ layer.lora_A[adapter].weight.to(wide)
    if began is not None:  # before scaling and rounding, so that nothing is left of the two at the start
        delta = delta + began.sign * (began.b.to(wide) @ began.a.to(wide))
    delta = delta * layer.scaling[adapter]
    if dash is not None and dash.launched:
        delta = delta + (dash.left.to(wide) * dash.coordinates.to(wide)) @ dash.right.to(wide)
    delta = delta.mT if getattr(layer, "fan_in_fan_out", False) else delta
    return delta.to(layer.get_param().dtype if hasattr(layer, "parameter_name") else weight_b.dtype)


def delta_factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`get_delta_factors` of PEFT's `ParamWrapper` with parts: `s * left @ right` is added to the parameter."""
    a, b, began = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, start(layer, adapter)
    firsts, seconds = [a], [b]
    if began is not None:
        firsts.append(began.a.to(a))
        seconds.append(began.sign * began.b.to(b))
    first, second = _side_by_side(firsts, seconds, layer.num_experts)
    a, b = first.view(layer.num_experts, -1, first.shape[1]), second.view(second.shape[0], -1, layer.num_experts)
    b = b.permute(2, 0, 1)
    left, right = (b, a) if getattr(layer, "_did_swap_in_out_features", False) else (a.mT, b.mT)
    dtype = layer.get_param().dtype
    return left.to(dtype), right.to(dtype), layer.scaling[adapter]


def _side_by_side(
    firsts: list[torch.Tensor], seconds: list[torch.Tensor], experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of several products as those of their sum: `(experts r, n)` and `(m, r experts)` of several r."""
    if experts == 1:
        return torch.cat(firsts), torch.cat(seconds, 1)
    first = torch.cat([value.reshape(experts, -1, value.shape[1]) for value in firsts], 1)
    second = torch.cat([value.reshape(value.shape[0], -1, experts) for value in seconds], 1)
    return first.flatten(0, 1), second.flatten(1)


def some_ranks(a: torch.Tensor, b: torch.Tensor, ranks: slice, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """These ranks of every expert, of factors `(experts r, n)` and `(m, r experts)`, as tensors of their own."""
    first = a.reshape(experts, -1, a.shape[1])[:, ranks].flatten(0, 1)
    second = b.reshape(b.shape[0], -1, experts)[:, ranks].flatten(1)
    return first.clone(), second.clone()


def start(layer: Any, adapter: str) -> Start | None:
    """The frozen start of an adapter of a layer, or `None`."""
    part: Start | None = _part(layer, START, adapter)
    return part


def directions(layer: Any, adapter: str) -> Directions | None:
    """The coordinates of an adapter of a layer, or `None`."""
    part: Directions | None = _part(layer, DASH, adapter)
    return part


def _part(layer: Any, container: str, adapter: str) -> Any:
    parts = getattr(layer, container, {})
    return parts[adapter] if adapter in parts else None  # noqa: SIM401  (a ModuleDict has no get)


def refusal(layer: Any, adapter: str) -> str | None:
    """Why an adapter of a LoRA layer cannot have parts, or `None`."""
    kind = stock_class(layer).__name__
    if kind not in (*_CARRIERS, _OF_EXPERTS):
        return f"PEFT's {kind} layer cannot carry anything besides A and B"
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, PartsVariant):
        return f"adapter {adapter!r} is a variant ({getattr(variant, '__name__', type(variant).__name__)})"
    return None


def carry(layer: Any) -> None:
    """Let a LoRA layer without a `refusal` have parts, and take those apart that a state dict has joined."""
    if hasattr(layer, START):
        return
    for container in _PARTS:
        setattr(layer, container, nn.ModuleDict().train(layer.training))
    layer.adapter_layer_names = (*layer.adapter_layer_names, *_PARTS)
    # On the instance: some layers merge by this method alone and do not ask a variant.
    layer.get_delta_weight = functools.partial(delta_weight, layer)
    if hasattr(layer, "get_delta_factors"):
        layer.get_delta_factors = functools.partial(delta_factors, layer)
    layer.register_state_dict_post_hook(_join_layer)
    layer.register_load_state_dict_pre_hook(_split_layer)


def drop(layer: Any) -> None:
    """Undo `carry` on any layer, if none of its adapters has a part."""
    if not hasattr(layer, START) or any(len(getattr(layer, container)) for container in _PARTS):
        return
    for container in _PARTS:
        delattr(layer, container)
    layer.adapter_layer_names = tuple(name for name in layer.adapter_layer_names if name not in _PARTS)
    del layer.get_delta_weight
    vars(layer).pop("get_delta_factors", None)
    for hooks in (layer._state_dict_hooks, layer._load_state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_join_layer, _split_layer):
                del hooks[number]


def add_start(layer: Any, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Set the frozen start A0 `(r, n)`, B0 `(m, r)` (not sharded) of an adapter of a layer that carries parts."""
    layer.lora_start[adapter] = Start(a, b, getattr(layer, "num_experts", 1))
    layer.lora_start.train(layer.training)
    _choose_variant(layer, adapter)


def add_directions(layer: Any, adapter: str, k: int) -> Directions:
    """Add k coordinates of LoRA-Dash to an adapter of a layer that carries parts."""
    weight_a, weight_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    layer.lora_dash[adapter] = dash = Directions(k, weight_a, weight_b)
    layer.lora_dash.train(layer.training)
    _choose_variant(layer, adapter)
    return dash


def remove(layer: Any, adapter: str, container: str) -> None:
    """Remove a part, in the container `START` or `DASH`, from an adapter of a layer, if it has it."""
    if _part(layer, container, adapter) is not None:
        del getattr(layer, container)[adapter]
        _choose_variant(layer, adapter)


def _choose_variant(layer: Any, adapter: str) -> None:
    if hasattr(layer, "parameter_name"):  # where no variant is asked
        return
    if start(layer, adapter) is not None or directions(layer, adapter) is not None:
        layer.lora_variant[adapter] = PartsVariant()
    else:
        layer.lora_variant.pop(adapter, None)


def ignore_buffers(model: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting the frozen parts, equal on all processes, before every forward."""
    frozen = {name for name, _ in model.named_buffers() if f".{START}." in name or f".{DASH}." in name}
    others = (name for name in getattr(model, _IGNORED, []) if f".{START}." not in name and f".{DASH}." not in name)
    setattr(model, _IGNORED, [*others, *sorted(frozen)])


def columns(left: torch.Tensor, coordinates: torch.Tensor, scaling: float) -> torch.Tensor:
    """Coordinates `(k,)` as columns of B, `U diag(c) / s` `(m, k)`, for a reader that multiplies by s."""
    if scaling == 0:
        raise ValueError("an adapter of scaling 0 cannot express its coordinates, which are not scaled")
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) * (coordinates.to(wide) / scaling)


def join(state: MutableMapping[str, torch.Tensor], key: Key, scaling: float, experts: int = 1) -> None:
    """Join the parts of one adapter of a layer to its factors, as more rank; `key` names entries of the state dict."""
    # The exact c and U stay in it, since U c / s is rounded, and also before the switch: PEFT only loads entries that
    # the model's own state dict has. `scaling` is the s that a reader of the saved config finds.
    key_a, key_b = key("lora_A", "weight"), key("lora_B", "weight")
    if key_a not in state or key_b not in state or is_sharded(state[key_a]) or is_sharded(state[key_b]):
        return
    a, b = [state[key_a].detach()], [state[key_b].detach()]
    if key(START, "a") in state:
        a.append(state.pop(key(START, "a")))
        b.append(Start.sign * state.pop(key(START, "b")))
    if (flags := state.get(key(DASH, "_extra_state"))) is not None and key(DASH, "right") in state:
        right = state.pop(key(DASH, "right"))
        if flags[1]:
            a.append(right)
            b.append(columns(state[key(DASH, "left")], state[key(DASH, "coordinates")].detach(), scaling))
            state[key(DASH, "_extra_state")] = torch.tensor([*flags.tolist()[:2], 1])  # and joined
    if len(a) > 1:
        blocks = [block.to(a[0]) for block in a], [block.to(b[0]) for block in b]
        state[key_a], state[key_b] = _side_by_side(*blocks, experts)


def nominal_scaling(layer: Any, adapter: str) -> float:
    """The scaling that follows from rank and alpha, which is what a saved config says."""
    return scaling_of(layer.lora_alpha[adapter], layer.r[adapter], layer.use_rslora.get(adapter, False))


def _join_layer(layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for adapter in dict.fromkeys((*layer.lora_start, *layer.lora_dash)):
        join(state, _key_of(prefix, adapter), nominal_scaling(layer, adapter), getattr(layer, "num_experts", 1))


def _key_of(prefix: str, adapter: str) -> Key:
    return lambda container, leaf: f"{prefix}{container}.{adapter}.{leaf}"


def _split_layer(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for adapter in layer.lora_A:
        _split(layer, adapter, state, _key_of(prefix, adapter))


def _split(layer: Any, adapter: str, state: dict[str, Any], key: Key) -> None:
    """Undo `join` before the layer loads. Where the ranks do not add up, PyTorch is left to say so."""
    key_a, key_b = key("lora_A", "weight"), key("lora_B", "weight")
    if key_a not in state or key_b not in state:
        return
    a, b, rank, experts = state[key_a], state[key_b], layer.r[adapter], getattr(layer, "num_experts", 1)
    flags = state.get(key(DASH, "_extra_state"))
    joined = flags is not None and flags.numel() > 2 and bool(flags[2])
    k = state[key(DASH, "coordinates")].numel() if joined else 0
    more = a.shape[0] // experts - rank - k
    if more not in (0, rank) or b.dim() != 2 or b.shape[1] != a.shape[0] or a.shape[0] % experts:
        return
    if more:
        state[key(START, "a")], began = some_ranks(a, b, slice(rank, rank + more), experts)
        state[key(START, "b")] = Start.sign * began
    if key(START, "a") not in state:  # a state without a start: the function is that of A and B
        remove(layer, adapter, START)
    elif start(layer, adapter) is None:
        factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        zeros = (torch.zeros(factor.shape, dtype=factor.dtype, device=factor.device) for factor in factors)
        add_start(layer, adapter, *zeros)
    if joined:
        state[key(DASH, "right")] = a[rank + more :].clone()
        if directions(layer, adapter) is None:
            add_directions(layer, adapter, k)
    if (dash := directions(layer, adapter)) is not None:
        for name, value in (*dash.named_parameters(), *dash.named_buffers()):
            state.setdefault(key(DASH, name), torch.zeros_like(value))
        state.setdefault(key(DASH, "_extra_state"), torch.tensor([0, 0]))
    if more or joined:
        state[key_a], state[key_b] = some_ranks(a, b, slice(rank), experts)
