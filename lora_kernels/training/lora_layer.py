"""The fused forward of PEFT's LoRA layers, whose classes become subclasses of their own.

A layer is prepared once: what runs, on which tensors and on which backend. A call compares, by identity, everything
that this depended on, and prepares the layer anew where something has changed. Nothing else is kept between calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from lora_kernels.adapters.view import stock_class
from lora_kernels.ops import Dropout, _backend, _ext, lora_delta
from lora_kernels.ops._autocast import autocast_dtype
from lora_kernels.ops._dropout import to_op_args
from lora_kernels.ops.lora_linear import op as lora_op
from lora_kernels.ops.lora_linear.op import TRANSFORMED, LoraFunction, apply_directly, run_forward
from lora_kernels.ops.lora_linear.passes import Scalars
from lora_kernels.training import dora
from lora_kernels.training.description import (
    DROPOUT_FORWARD,
    LINEAR_FORWARD,
    Adapter,
    active,
    eager_reason,
    plain_linear,
)

# PEFT's layers whose forward is `base(x) + s B A drop(x)`, or that in each product of many experts, and their modules
# below `peft.tuners.lora`. Some are there only if their library is installed.
KINDS = {
    "Linear": "layer", "Linear4bit": "bnb", "Linear8bitLt": "bnb", "TorchaoLoraLinear": "torchao",
    "GPTQLoraLinear": "gptq", "AwqLoraLinear": "awq", "AqlmLoraLinear": "aqlm", "TeLinear": "te",
    "EetqLoraLinear": "eetq", "HqqLoraLinear": "hqq", "IncLoraLinear": "inc", "ParamWrapper": "layer",
}  # fmt: skip

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(
    hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and name.endswith("hooks")
)
SEEDS = 2**63 - 1
# Asked at every call. A tensor that a transform has left behind is a wrapper without memory.
_transformed, _unwrapped = torch._C._are_functorch_transforms_active, torch._C._functorch.unwrap_if_dead
_compiling, _casts, _cast_dtype = torch.compiler.is_compiling, torch.is_autocast_enabled, torch.get_autocast_dtype
_learns = torch.is_grad_enabled


class FusedForward:
    """The forward of an accelerated layer; mixed into a subclass of the layer's own class."""

    fused = True  # reference_mode sets it to False, on a layer or on all

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's on x `(..., n)`, fused where possible; a call with further arguments is PEFT's."""
        if not args and not kwargs:
            if _compiling():
                traced = prepare(self, x)
                if traced is not None:
                    return traced.run(x)
            else:
                prepared = self.__dict__.get("_prepared")
                if prepared is None or not prepared.fits(self, x):
                    prepared = self.__dict__["_prepared"] = prepare(self, x)
                if prepared is not None:
                    return prepared.run(x)  # type: ignore[no-any-return]
        result: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse an adapter with parts joined to its factors, where nothing would take them apart."""
        experts = getattr(self, "num_experts", 1)
        for adapter, own in self.r.items():  # type: ignore[attr-defined]
            rank = own * experts
            factor = state_dict.get(f"{prefix}lora_A.{adapter}.weight")
            joined = f"{prefix}lora_dash.{adapter}.coordinates" in state_dict or (
                factor is not None and factor.shape[0] == 2 * rank
            )
            if joined and factor is not None and factor.shape[0] != rank and not hasattr(self, "lora_start"):
                raise RuntimeError(
                    f"{prefix[:-1]} was saved with rank {factor.shape[0] // experts} but is of rank {own} here: a "
                    "frozen start or coordinates were saved as rank with it; lora_kernels.load(model, folder) takes "
                    "them apart, also before transformers' Trainer resumes"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def class_of(kind: type) -> type:
    """The accelerated subclass of a PEFT class, always the same, so that layers can be pickled: under its own name."""
    name = f"Fused{kind.__name__}"
    cls: type | None = globals().get(name)
    if cls is None or cls.__bases__[1] is not kind:  # PEFT's module may have been imported anew
        experts = importlib.import_module("lora_kernels.training.experts") if is_experts(kind) else None
        bases = (FusedForward if experts is None else experts.FusedExperts, kind)
        own = {"__module__": __name__, "__qualname__": name, "__doc__": f"{kind.__name__}, accelerated."}
        cls = globals()[name] = type(kind.__name__, bases, own)
    return cls


def is_experts(kind: type) -> bool:
    """Whether a class of PEFT's adapts a parameter, of many experts say, instead of a linear layer."""
    return kind.__name__ == "ParamWrapper"


def __getattr__(name: str) -> Any:
    # A pickled layer names its class, which this process may not have made yet.
    if name.startswith("Fused"):
        for kind in supported():
            if name == f"Fused{kind.__name__}":
                return class_of(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def supported() -> tuple[type, ...]:
    """PEFT's classes that can be accelerated, as far as this PEFT and its backends have them."""
    kinds = []
    for name, module in KINDS.items():
        with contextlib.suppress(ImportError):  # an older PEFT
            kinds.append(getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name, None))
    return tuple(kind for kind in kinds if isinstance(kind, type))


@functools.cache
def warn_once(reason: str) -> None:
    """Say that a layer runs PEFT's own forward, once for each reason."""
    warnings.warn(f"accelerated LoRA layers run PEFT's own forward: {reason}", RuntimeWarning, stacklevel=5)


def prepare(layer: Any, x: torch.Tensor) -> Prepared | None:
    """What an accelerated layer runs for inputs like x `(..., n)`; `None` for PEFT's forward, with a warning."""
    if not (layer.fused and FusedForward.fused) or layer.disable_adapters or layer.merged or any(GLOBAL_HOOKS):
        return None
    if type(x) not in (torch.Tensor, nn.Parameter) and not isinstance(x, FakeTensor):
        return None  # a DTensor, say, which the registered operations have no rule for
    if (reason := eager_reason(layer)) is not None:
        if not _compiling() and reason != layer.__dict__.get("_eager_reason"):  # which `accelerate` has reported
            warn_once(reason)
        return None
    return Prepared.make(layer, x)


class Prepared:
    """What a layer runs, and what that depends on."""

    def __init__(self, layer: Any, x: torch.Tensor, adapters: list[Adapter], cast: torch.dtype | None) -> None:
        """See `make`; `adapters` are those of `description.active`, `cast` is the dtype that autocast asks for."""
        first, base = adapters[0], layer.base_layer
        fused = plain_linear(base) and (cast is not None or base.weight.dtype == x.dtype)
        self.layer, self.adapters, self.cast = layer, adapters, cast
        self.base = None if fused else base  # where it computes its own product
        self.weight: torch.Tensor | None = base.weight if fused else None
        self.bias: torch.Tensor | None = base.bias if fused else None
        self.type = type(x)
        self.dtype, self.device, self.kind, self.inputs = x.dtype, x.device, x.device.type, first.a.shape[1]
        masked = first.p > 0 and first.magnitude is None
        threshold = to_op_args(Dropout(first.p, 0), x.device)[0] if masked else 0
        start = first.start()
        rank = first.a.shape[0] + (0 if start is None else start[0].shape[0])
        backend = lora_op.layer.choose("auto", x.device, x.dtype if cast is None else cast, threshold > 0, rank)
        pair: tuple[torch.Tensor | None, torch.Tensor | None, float] = start or (None, None, 0.0)
        self.a0, self.b0, frozen_scaling = pair
        self.masked = threshold > 0
        self.scalars = Scalars(first.scaling, frozen_scaling, threshold, 0, backend)
        # One product is all: W, one adapter, and what is frozen beside it.
        alone = len(adapters) == 1 and first.bias is None and first.magnitude is None
        self.simple = alone and fused and cast is None and first.extension.coordinates is None
        self.a, self.b = first.a, first.b
        self.state: torch.Tensor | None = None  # differs where the layer computes something else, for recomputations

    @staticmethod
    def make(layer: Any, x: torch.Tensor) -> Prepared | None:
        """A layer without an `eager_reason`, prepared for inputs like x; `None` where x does not fit it."""
        adapters = active(layer)
        if x.dim() == 0 or any(x.shape[-1] != adapter.a.shape[1] for adapter in adapters):
            return None  # PEFT's own forward raises
        prepared = Prepared(layer, x, adapters, autocast_dtype(x))
        if not torch.compiler.is_compiling():
            prepared._remember(layer)
        return prepared

    def _remember(self, layer: Any) -> None:
        """Note everything that a call must find unchanged."""
        names = [adapter.name for adapter in self.adapters]
        modules, own = layer._modules, layer.__dict__
        parts = [layer.base_layer]
        cells: list[tuple[Any, Any]] = [
            (own, "training"), (own, "_disable_adapters"), (own, "merged_adapters"), (own, "scaling"),
            (own, "lora_variant"), (modules, "base_layer"), (modules, "lora_A"), (modules, "lora_B"),
            (modules, "lora_dropout"),
        ]  # fmt: skip
        for name in names:
            cells += [(layer.scaling, name), (layer.r, name), (layer.lora_variant, name)]
            for group in ("lora_A", "lora_B", "lora_dropout"):
                part = modules[group]._modules[name]
                cells.append((modules[group]._modules, name))
                parts.append(part)
            if isinstance(part, nn.Dropout):
                cells += [(part.__dict__, "p"), (part.__dict__, "training")]
            magnitudes = layer.lora_magnitude_vector._modules
            if name in magnitudes:
                cells += [(magnitudes, name), (magnitudes[name]._parameters, "weight")]
        for part in parts:
            cells.append((part.__dict__, "forward"))
            if not isinstance(part, (nn.Dropout, nn.Identity)):
                cells += [(part._parameters, "weight"), (part._parameters, "bias")]
        self.cells = tuple((cell, key, cell.get(key)) for cell, key in cells)
        self.parts, self.classes = tuple(parts), tuple(map(type, parts))
        extension = _ext.load()[0]
        self.unchanged = unchanged if extension is None else extension.unchanged
        self.stock: Any = stock_class(layer)
        self.forward = self.stock.forward  # type: ignore[attr-defined]
        # What must be empty: looked at all at once.
        hooked = parts if self.base is None else parts[1:]
        self.empty = (
            *(getattr(part, name) for part in hooked for name in _HOOKS),
            *GLOBAL_HOOKS,
            layer.merged_adapters,
        )
        self.active = own["_active_adapter"] if isinstance(own["_active_adapter"], str) else [*own["_active_adapter"]]
        self.override = _backend._override
        trained = None if len(names) == 1 else [adapter.frozen for adapter in self.adapters]
        variants = [(layer.lora_variant.get(each.name), each) for each in self.adapters if each.magnitude is None]
        self.trained, self.variants = trained, [(kind, each) for kind, each in variants if kind is not None]
        numbers = [(adapter.name, adapter.scaling, adapter.p) for adapter in self.adapters]
        with torch.inference_mode(False):  # graphs are to keep it
            self.state = torch.tensor([hash((*map(tuple, numbers), layer.training)) & SEEDS])

    def fits(self, layer: Any, x: torch.Tensor) -> bool:
        """Whether nothing has changed that `run` depends on."""
        own, kind = layer.__dict__, self.kind
        if (
            layer is not self.layer  # a copy with the same parts
            or type(x) is not self.type
            or x.dtype is not self.dtype
            or x.device != self.device
            or x.dim() == 0
            or x.shape[-1] != self.inputs
            or own["_active_adapter"] != self.active
            or (_cast_dtype(kind) if _casts(kind) else None) is not self.cast
            or _backend._override is not self.override
            or self.stock.forward is not self.forward
            or nn.Linear.forward is not LINEAR_FORWARD
            or nn.Dropout.forward is not DROPOUT_FORWARD
            or not FusedForward.fused
            or "fused" in own
        ):
            return False
        if not self.unchanged(self.cells, self.empty, self.parts, self.classes):
            return False
        if self.variants or self.trained is not None:
            return self._same_parts(layer)
        return True

    def _same_parts(self, layer: Any) -> bool:
        for variant, adapter in self.variants:
            if not _identical(variant.fused(layer, adapter.name), adapter.extension):
                return False
        return self.trained is None or self.trained == [adapter.frozen for adapter in active(layer)]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output `(..., m)` for x `(..., n)`."""
        if self.state is not None:
            if _transformed():
                raise RuntimeError(TRANSFORMED)
            x = _unwrapped(x)
        seed = torch.randint(SEEDS, (1,), dtype=torch.int64, device=self.device) if self.masked else None
        if self.simple and _learns():
            if seed is None and self.a0 is None and self.state is not None:
                y: torch.Tensor = apply_directly(  # type: ignore[no-untyped-call]
                    x, self.weight, self.bias, self.a, self.b, self.scalars, self.state
                )
                return y
            apply = apply_directly if self.state is not None else LoraFunction.apply
            y = apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.bias, self.a, self.b, self.scalars, self.state, seed, self.a0, self.b0
            )
            return y
        first, *others = self.adapters
        if first.magnitude is not None:  # of a layer with no other adapter
            return self._scaled(x, first, first.magnitude)
        y = self._sum(x, seed)
        dtype = y.dtype
        if self.cast is not None:
            x = x.to(self.cast)
        y = _with_directions(y, x, first)
        for adapter in others:
            dropout = Dropout.draw(adapter.p, device=x.device) if adapter.p else None
            y = lora_delta(y, x, *adapter.factors(), scaling=adapter.scaling, dropout=dropout, extra=adapter.start())
            y = _with_directions(y, x, adapter)
            if adapter.bias is not None:
                y = y + adapter.scaling * adapter.bias.to(y.dtype)
        return y if y.dtype == dtype else y.to(dtype)

    def _sum(self, x: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        """Base product and first adapter, in the dtype of the layer's result."""
        start, dtype, first = self.bias, None, self.adapters[0]
        if self.base is not None:
            start = self.base(x)
            dtype = start.dtype  # whatever the arithmetic is done in
        if self.cast is not None:
            x = x.to(self.cast)
        if first.bias is not None:
            bias = first.scaling * first.bias  # of B
            start = bias if start is None else (start + bias).to(start.dtype)
        if start is not None and self.base is not None and start.dtype != x.dtype:
            start = start.to(x.dtype)
        y = self._product(x, start, *first.factors(), seed)
        return y if dtype is None or y.dtype == dtype else y.to(dtype)

    def _scaled(self, x: torch.Tensor, adapter: Adapter, magnitude: torch.Tensor) -> torch.Tensor:
        """DoRA: the sum, rescaled by row; with dropout the dropped input has a base product of its own."""
        norms, base = dora.norms(self.layer, adapter.name), self.layer.base_layer
        bias = getattr(base, "bias", None)  # in the sum: so an adapter that changes nothing gives the base's own bits
        if adapter.p == 0:
            return dora.rescaled(self._sum(x, None), magnitude, norms, inner=bias, outer=bias)
        dropped = nn.functional.dropout(x, adapter.p)
        return dora.rescaled(self._sum(dropped, None), magnitude, norms, inner=bias, outer=base(x - dropped))

    def _product(
        self, x: torch.Tensor, start: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, seed: torch.Tensor | None
    ) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return run_forward(x, self.weight, start, a, b, self.a0, self.b0, seed, self.scalars)[0]
        y: torch.Tensor = LoraFunction.apply(  # type: ignore[no-untyped-call]
            x, self.weight, start, a, b, self.scalars, self.state, seed, self.a0, self.b0
        )
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a layer is prepared anew."""
        return type(None), ()


def unchanged(
    cells: tuple[tuple[Any, Any, Any], ...], empty: tuple[Any, ...], parts: tuple[Any, ...], classes: tuple[type, ...]
) -> bool:
    """As the compiled extension's: dictionaries hold their values, what was empty is, and parts have their classes."""
    for cell, key, value in cells:
        if cell.get(key) is not value:
            return False
    return not any(empty) and tuple(map(type, parts)) == classes


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_identical(a, b) for a, b in zip(one, other, strict=True))
    return one is other or (isinstance(one, float) and one == other)


def _with_directions(y: torch.Tensor, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    directions = adapter.directions()
    return y if directions is None else lora_delta(y, x, *directions, scaling=1.0)
