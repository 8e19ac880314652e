"""Rows of base weights, against the whole weight as PEFT dequantizes it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters.base_weight import base_weight
from lora_kernels.integrations import base_rows

WIDTH = 128


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.lin = layer

    def forward(self, x):
        return self.lin(x)


def wrapped(layer):
    return get_peft_model(Net(layer), LoraConfig(r=2, target_modules=["lin"])).base_model.model.lin


def dense(dtype):
    return nn.Linear(WIDTH, 40, bias=False, dtype=dtype)


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(40, WIDTH)  # keeps W^T


def quantized(kind, nested=False, width=WIDTH):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(40, width)
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(width, 40, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(width, 40, bias=False, quant_type=kind, compress_statistics=nested)
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=nested, module=layer
        )
    return layer.to("cpu")


LAYERS = {
    "float32": lambda: dense(torch.float32),
    "bfloat16": lambda: dense(torch.bfloat16),
    "Conv1D": conv1d,
    "nf4": lambda: quantized("nf4"),
    "nf4 nested": lambda: quantized("nf4", nested=True),
    "fp4": lambda: quantized("fp4"),
    "int8": lambda: quantized("int8"),
}


@pytest.mark.parametrize("chunk", [2**23, 128 * 7, 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_make_the_whole_weight(kind, chunk, monkeypatch):
    monkeypatch.setattr(base_rows, "_CHUNK", chunk)
    module = wrapped(LAYERS[kind]())
    rows = base_rows.row_blocks(module)
    blocks = list(rows())
    truth = base_weight(module)
    assert torch.cat(blocks).dtype == torch.float32 and torch.cat(blocks).shape == (40, WIDTH)
    assert torch.allclose(torch.cat(blocks), truth, rtol=1e-5, atol=1e-6)
    assert (len(blocks) == 1) == (chunk == 2**23)
    assert torch.equal(torch.cat(list(rows())), torch.cat(blocks))  # can be read again


def test_blocks_of_the_quantization_that_run_over_rows_are_not_cut(monkeypatch):
    monkeypatch.setattr(base_rows, "_CHUNK", 1)
    module = wrapped(quantized("nf4", width=96))
    blocks = list(base_rows.row_blocks(module)())
    assert torch.equal(torch.cat(blocks), base_weight(module))
    for width in (96, 128):
        weight = wrapped(quantized("nf4", width=width)).get_base_layer().weight
        assert base_rows._sliceable(weight, 40, width) == (width == 128)
    weight.quant_state.packing_format_for_cpu = True  # another order
    assert not base_rows._sliceable(weight, 40, 128)


def test_weights_that_are_kept_transposed():
    from transformers.pytorch_utils import Conv1D

    class Other(nn.Module):  # by its attributes a linear layer
        in_features, out_features, weight = WIDTH, 40, torch.randn(WIDTH, 40)

    square = Conv1D(WIDTH, WIDTH)
    module = wrapped(square)
    assert torch.equal(torch.cat(list(base_rows.row_blocks(module)())), square.weight.detach().mT)
    assert torch.equal(base_weight(module), square.weight.detach().mT)
    module.base_layer, module.out_features = Other(), 40
    assert torch.equal(torch.cat(list(base_rows.row_blocks(module)())), Other.weight.mT)


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_of_every_kind(kind):
    module = wrapped(LAYERS[kind]())
    truth = base_weight(module)
    model = get_peft_model(Net(LAYERS["float32"]()), LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.model.lin = module
    (layer,) = lk.diagnose(model)
    assert layer.spectrum.weight.spectral == pytest.approx(float(torch.linalg.matrix_norm(truth, 2)), rel=1e-3)
    assert layer.spectrum.weight.frobenius == pytest.approx(float(truth.norm()), rel=1e-5)
