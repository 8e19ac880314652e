"""Quantized base layers: bitsandbytes' own, and stand-ins by which PEFT's other LoRA classes run without their library.

A stand-in keeps integer codes and scales where the library's layer keeps them, and computes what it says. PEFT's module
for the library is imported anew with the library's check and classes replaced, so that PEFT's own dispatch wraps it.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from contextlib import contextmanager

import peft.import_utils
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn


def bitsandbytes_linear(kind, in_features, out_features, nested=False, bias=True):
    """`Linear4bit` (`nf4`, `fp4`) or `Linear8bitLt` (`int8`) on the CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(out_features, in_features) / in_features**0.5
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=bias, quant_type=kind, compress_statistics=nested
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
        )
    return layer.to("cpu")


class Codes(nn.Module):
    """`x W^T + bias` with W made of 8-bit codes and a scale for each row."""

    codes_name = "qweight"

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        self.register_buffer(self.codes_name, self.packed(codes))
        self.register_buffer("scales", (0.5 + torch.rand(out_features, 1)) / (60 * in_features**0.5))
        self.bias = nn.Parameter(torch.randn(out_features), requires_grad=False) if bias else None

    def packed(self, codes):
        return codes

    def numbers(self):
        return getattr(self, self.codes_name)

    def true_weight(self):
        return self.numbers().to(torch.float32) * self.scales

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.true_weight().to(x.dtype), bias)


class TorchQuantLinear(Codes):
    """GPTQ: codes packed into int32."""

    def packed(self, codes):
        return codes.mT.contiguous().view(torch.int32)

    def numbers(self):
        return self.qweight.view(torch.int8).mT


class AwqQuantLinear(TorchQuantLinear):
    """AWQ, by the same library."""


class HQQLinear(Codes):
    """HQQ: `W_q`, and a method that dequantizes."""

    codes_name = "W_q"

    def dequantize(self):
        return self.true_weight()


class EetqLinear(Codes):
    """EETQ: codes under the name of a weight, in the kernel's own order."""

    codes_name = "weight"

    def packed(self, codes):
        return codes.roll(1, 0)

    def numbers(self):
        return self.weight.roll(-1, 0)


class QuantizedLinear(Codes):
    """AQLM."""

    codes_name = "codes"
    codebooks = None


class PatchedLinear(Codes):
    """Intel's neural compressor: a weight of 8-bit floats, scaled by an attribute."""

    codes_name = "weight"

    def packed(self, codes):
        return (codes.to(torch.float32) / 8).to(torch.float8_e4m3fn)


class TeStandIn(nn.Module):
    """TransformerEngine: a plain weight in a class of its own."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out_features), requires_grad=False) if bias else None

    def true_weight(self):
        return self.weight.detach()

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


class LayerNormLinear(TeStandIn):
    """Of TransformerEngine: normalises first."""

    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


TeLinear = type("Linear", (TeStandIn,), {})


class Kind:
    """How PEFT comes to wrap a stand-in.

    Attributes:
        layer: the stand-in's class.
        lora_class: PEFT's class for it.
        module: where that is, under `peft.tuners.lora`.
        available: the check of PEFT's that the library is installed.
        library: where the library keeps the class, and under what name.
        dispatch: the function of PEFT's that wraps it.
    """

    def __init__(self, layer, lora_class, module, available, library, dispatch=None):
        self.layer, self.lora_class, self.module, self.available = layer, lora_class, module, available
        self.library, self.dispatch = library, dispatch or f"dispatch_{module}"


KINDS = {
    "gptq": Kind(
        TorchQuantLinear,
        "GPTQLoraLinear",
        "gptq",
        "is_gptqmodel_available",
        "gptqmodel.nn_modules.qlinear.BaseQuantLinear",
    ),
    "awq": Kind(
        AwqQuantLinear, "AwqLoraLinear", "awq", "is_gptqmodel_available", "gptqmodel.nn_modules.qlinear.BaseQuantLinear"
    ),
    "hqq": Kind(HQQLinear, "HqqLoraLinear", "hqq", "is_hqq_available", "hqq.core.quantize.HQQLinear"),
    "eetq": Kind(EetqLinear, "EetqLoraLinear", "eetq", "is_eetq_available", "eetq.EetqLinear"),
    "aqlm": Kind(QuantizedLinear, "AqlmLoraLinear", "aqlm", "is_aqlm_available", "aqlm.QuantizedLinear"),
    "inc": Kind(
        PatchedLinear,
        "IncLoraLinear",
        "inc",
        "is_inc_available",
        "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear",
    ),
    "te": Kind(
        TeLinear,
        "TeLinear",
        "te",
        "is_te_pytorch_available",
        "transformer_engine.pytorch.Linear",
        "dispatch_transformer_engine",
    ),
}


def _install(patch, path, value):
    """Make `path` importable for a while."""
    *parents, name = path.split(".")
    above = None
    for depth, part in enumerate(parents):
        full = ".".join(parents[: depth + 1])
        module = types.ModuleType(full)
        patch.setitem(sys.modules, full, module)
        if above is not None:
            setattr(above, part, module)
        above = module
    setattr(above, name, value)
    return above


@contextmanager
def peft_class(kind):
    """PEFT's LoRA class of a kind, wrapping its stand-in.

    Yields:
        The class.
    """
    entry = KINDS[kind]
    full = f"peft.tuners.lora.{entry.module}"
    getattr(peft.import_utils, entry.available, bool)()  # answers once, before a stand-in could be found
    with pytest.MonkeyPatch.context() as patch:
        where = _install(patch, entry.library, entry.layer)
        if kind == "te":
            where.LayerNormLinear, where.LayerNormMLP = LayerNormLinear, type("LayerNormMLP", (TeStandIn,), {})
        patch.setattr(peft.import_utils, entry.available, lambda: True, raising=False)
        patch.delitem(sys.modules, full, raising=False)
        patch.setattr(lora, entry.module, None, raising=False)
        try:
            module = importlib.import_module(full)
        except ImportError:
            pytest.skip(f"this PEFT has no {entry.module}")
        if kind == "awq":
            if not hasattr(module, "is_gptqmodel_awq_layer"):
                pytest.skip("this PEFT knows AWQ by another library")
            patch.setattr(module, "is_gptqmodel_awq_layer", lambda layer: isinstance(layer, AwqQuantLinear))
        patch.setattr(lora.model, entry.dispatch, getattr(module, entry.dispatch))
        yield getattr(module, entry.lora_class)


class Net(nn.Module):
    """Two layers, the second of a kind."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.lin = nn.Linear(layer.in_features, layer.in_features), layer

    def forward(self, x):
        return self.lin(torch.tanh(self.first(x))).square().mean()


def wrapped(kind, sizes=(24, 40), bias=True, layer=None, **settings):
    """A PEFT model whose layer `lin` is of a kind; call it inside of `peft_class`."""
    torch.manual_seed(0)
    base = KINDS[kind].layer(*sizes, bias=bias) if layer is None else layer
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")
        model = get_peft_model(Net(base), LoraConfig(**{"r": 3, "target_modules": ["lin"], **settings}))
    assert type(model.base_model.model.lin).__name__ == KINDS[kind].lora_class
    return model
