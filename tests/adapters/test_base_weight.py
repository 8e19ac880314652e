"""The weight under a LoRA layer: read exactly, in blocks or whole, or refused."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

import lora_kernels as lk
from lora_kernels.adapters import base_weight as base_module
from lora_kernels.adapters.base_weight import DEQUANTIZABLE, PLAIN, dense_weight, row_blocks, weight_kind
from tests.conftest import relative_error
from tests.helpers import quantized as stand_ins
from tests.helpers.quantized import bitsandbytes_linear

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


LAYERS = {
    "float32": lambda: dense(torch.float32),
    "bfloat16": lambda: dense(torch.bfloat16),
    "Conv1D": conv1d,
    "nf4": lambda: bitsandbytes_linear("nf4", WIDTH, 40),
    "nf4 nested": lambda: bitsandbytes_linear("nf4", WIDTH, 40, nested=True),
    "fp4": lambda: bitsandbytes_linear("fp4", WIDTH, 40),
    "int8": lambda: bitsandbytes_linear("int8", WIDTH, 40),
}


@pytest.mark.parametrize("chunk", [2**23, 128 * 7, 1])
@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_make_the_whole_weight(kind, chunk, monkeypatch):
    monkeypatch.setattr(base_module, "_CHUNK", chunk)
    module = wrapped(LAYERS[kind]())
    rows = row_blocks(module)
    blocks = list(rows())
    truth = dense_weight(module)
    assert torch.cat(blocks).shape == (40, WIDTH)
    assert torch.allclose(torch.cat(blocks).float(), truth, rtol=1e-5, atol=1e-6)
    assert (len(blocks) == 1) == (chunk == 2**23)
    assert torch.equal(torch.cat(list(rows())), torch.cat(blocks))  # can be read again


def test_blocks_of_the_quantization_that_run_over_rows_are_not_cut(monkeypatch):
    monkeypatch.setattr(base_module, "_CHUNK", 1)
    module = wrapped(bitsandbytes_linear("nf4", 96, 40))
    blocks = list(row_blocks(module)())
    assert torch.equal(torch.cat(blocks), dense_weight(module))
    for width in (96, 128):
        weight = wrapped(bitsandbytes_linear("nf4", width, 40)).get_base_layer().weight
        assert base_module._sliceable(weight, 40, width) == (width == 128)
    weight.quant_state.packing_format_for_cpu = True  # another order
    assert not base_module._sliceable(weight, 40, 128)


def test_weights_that_are_kept_transposed():
    from transformers.pytorch_utils import Conv1D

    class Other(nn.Module):  # by its attributes a linear layer
        in_features, out_features, weight = WIDTH, 40, torch.randn(WIDTH, 40)

    square = Conv1D(WIDTH, WIDTH)
    module = wrapped(square)
    assert torch.equal(torch.cat(list(row_blocks(module)())), square.weight.detach().mT)
    assert torch.equal(dense_weight(module), square.weight.detach().mT)
    module.base_layer, module.out_features = Other(), 40
    assert torch.equal(torch.cat(list(row_blocks(module)())), Other.weight.mT)


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_of_every_kind(kind):
    module = wrapped(LAYERS[kind]())
    truth = dense_weight(module)
    model = get_peft_model(Net(LAYERS["float32"]()), LoraConfig(r=2, target_modules=["lin"]))
    model.base_model.model.lin = module
    (layer,) = lk.diagnose(model)
    assert layer.spectrum.weight.spectral == pytest.approx(float(torch.linalg.matrix_norm(truth, 2)), rel=1e-3)
    assert layer.spectrum.weight.frobenius == pytest.approx(float(truth.norm()), rel=1e-5)


def eight_bit_floats(block_size, sizes=(200, 72)):
    """transformers' FP8Linear, and the weight that it holds."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if block_size is None and Version(transformers.__version__).major < 5:
        pytest.skip("this transformers scales by blocks only")
    torch.manual_seed(0)
    n, m = sizes
    layer = fp8.FP8Linear(n, m, block_size=block_size)
    layer.requires_grad_(False)
    scale = torch.rand_like(layer.weight_scale_inv) + 0.5
    layer.weight_scale_inv.copy_(scale)
    layer.weight.copy_(torch.randn(m, n))
    truth = layer.weight.float()
    if block_size is None:
        return layer, truth * scale
    for row in range(m):
        for column in range(n):
            truth[row, column] *= scale[row // block_size[0], column // block_size[1]]
    return layer, truth


@pytest.mark.parametrize("block_size", [None, (32, 48), (128, 128), (8, 8)])
def test_eight_bit_floats_with_scales(block_size):
    layer, truth = eight_bit_floats(block_size)
    module = wrapped(layer)
    assert weight_kind(module) == DEQUANTIZABLE
    assert torch.equal(dense_weight(module), truth)
    assert torch.equal(torch.cat(list(row_blocks(module, entries=1000)())), truth)
    layer.weight_scale_inv = nn.Parameter(torch.ones(2, 2, 2), requires_grad=False)
    assert "scales are of an unknown form" in weight_kind(module)


def test_eight_bit_floats_without_scales_are_numbers_only_where_nothing_could_scale_them():
    module = wrapped(dense(torch.float32))
    truth = module.base_layer.weight.detach().to(torch.float8_e4m3fn)
    module.base_layer.weight = nn.Parameter(truth, requires_grad=False)
    assert weight_kind(module) == DEQUANTIZABLE
    assert torch.equal(dense_weight(module), truth.float())
    module.base_layer.weight_scale = torch.ones(())
    assert "Linear keeps torch.float8_e4m3fn numbers, whose scales" in weight_kind(module)
    del module.base_layer.weight_scale
    module.base_layer.__class__ = type("OtherLinear", (nn.Linear,), {})
    with pytest.raises(ValueError, match=r"layer a\.lin cannot be read: OtherLinear keeps torch\.float8_e4m3fn"):
        dense_weight(module, "a.lin")


def test_only_a_tensor_of_the_layer_itself_is_changed_in_place():
    module = wrapped(dense(torch.float32))
    assert weight_kind(module) == PLAIN
    weight = module.base_layer.weight.detach().clone()
    del module.base_layer.weight
    module.base_layer.register_buffer("weight", weight)
    assert weight_kind(module) == PLAIN
    del module.base_layer.weight
    module.base_layer.weight = weight  # as FSDP1 keeps views of its flat parameter
    assert weight_kind(module) == DEQUANTIZABLE and torch.equal(dense_weight(module), weight)
    model = get_peft_model(
        Net(parametrizations.weight_norm(dense(torch.float32))), LoraConfig(r=2, target_modules=["lin"])
    )
    assert weight_kind(model.base_model.model.lin) == DEQUANTIZABLE
    with pytest.raises(ValueError, match='no plain tensor: only base="intact"'):
        lk.initialize(model, method="pissa", base="mutate", progress=False)


def test_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    layer = dense(torch.float32)
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = wrapped(layer)
    assert weight_kind(module) == DEQUANTIZABLE
    x = torch.randn(5, WIDTH)
    assert relative_error(x @ dense_weight(module).mT, layer(x)) < 1e-2


def test_other_shapes_and_no_weight_at_all():
    module = wrapped(dense(torch.float32))
    module.base_layer.weight = nn.Parameter(torch.zeros(0))  # as ZeRO-3 leaves it
    assert "a weight of shape (0,), but the layer's is (40, 128)" in weight_kind(module)
    module.base_layer = nn.Identity()
    assert weight_kind(module) == "Identity keeps no weight matrix"


UNREADABLE = {
    "gptq": "TorchQuantLinear keeps no weight matrix",
    "awq": "AwqQuantLinear keeps no weight matrix",
    "eetq": "EetqLinear keeps torch.int8 codes of an unknown quantization",
    "aqlm": "QuantizedLinear keeps no weight matrix",
    "inc": "PatchedLinear keeps torch.float8_e4m3fn numbers, whose scales are of an unknown form",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_codes_are_never_taken_for_the_weight(kind):
    """What needs no weight works on the layer; what does is refused before anything is read or written."""
    with stand_ins.peft_class(kind):
        model = stand_ins.wrapped(kind)
        assert weight_kind(model.base_model.model.lin) == UNREADABLE[kind]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batches = [torch.randn(64, 24) for _ in range(2)]

        def loss(outputs, _batch):
            return outputs

        for method in ("pissa", "corda", "task_directions"):
            with pytest.raises(ValueError, match=rf"layer base_model\.model\.lin cannot be read: {UNREADABLE[kind]}"):
                lk.initialize(model, iter(()), method, loss=loss, progress=False)
        carries = kind in ("gptq", "inc")  # in the others PEFT's forward knows nothing besides A and B
        for base, message in (("mutate", 'only base="intact"'), ("intact", "cannot carry anything besides A and B")):
            if base == "mutate" or not carries:
                with pytest.raises(ValueError, match=message if carries else "cannot carry anything besides A and B"):
                    lk.initialize(model, batches, "lora_ga", base=base, loss=loss, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for method in ("eva", "lora_da", *["lora_ga"] * carries):
            model = stand_ins.wrapped(kind)
            if model.base_model.model.lin.lora_A["default"].weight.dtype == torch.float8_e4m3fn:
                pytest.skip("this PEFT makes factors of 8-bit floats on such a base")
            layer = model.base_model.model.lin.base_layer
            (report,) = lk.initialize(model, batches, method, loss=loss, reduction="samples", progress=False)
            assert report.status == "initialised" and report.start_share == 0
            assert any("not compared with the weight" in each for each in report.notes) == (method != "eva")
            assert layer.true_weight().isfinite().all()
        (found,) = lk.diagnose(model)
        assert found.spectrum.weight is None and UNREADABLE[kind] in found.notes[0]


def test_hqq_and_transformer_engine_are_read():
    for kind, expected in (("hqq", DEQUANTIZABLE), ("te", PLAIN)):
        with stand_ins.peft_class(kind):
            model = stand_ins.wrapped(kind)
            module = model.base_model.model.lin
            assert weight_kind(module) == expected
            truth = module.base_layer.true_weight().clone()
            assert torch.equal(dense_weight(module), truth)
            before = model.eval()(torch.ones(2, 24)).detach()
            if kind == "te":
                with pytest.raises(ValueError, match="cannot carry anything besides A and B"):
                    lk.initialize(model, method="pissa", progress=False)
                continue
            (report,) = lk.initialize(model, method="pissa", progress=False)
            assert report.status == "initialised" and report.start_share > 0
            torch.testing.assert_close(model.eval()(torch.ones(2, 24)).detach(), before, rtol=1e-4, atol=1e-5)
            assert torch.equal(dense_weight(module), truth)
    with stand_ins.peft_class("te"):
        module = stand_ins.wrapped("te", layer=stand_ins.LayerNormLinear(24, 40)).base_model.model.lin
        assert "LayerNormLinear applies its weight to the normalised input" in weight_kind(module)


def test_an_int8_layer_runs_after_its_weight_was_read():
    """PEFT's own way to dequantize moves the parameter, and on a CPU the scales are lost."""
    base = bitsandbytes_linear("int8", 64, 48)
    model = Net(base)
    model.is_loaded_in_8bit = True
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["lin"]))
    module, x = model.base_model.model.lin, torch.randn(5, 64)
    first = dense_weight(module)  # before the first call, and after it: the scales move then
    before = model(x).detach()
    assert torch.equal(dense_weight(module), first)
    assert relative_error((x @ first.mT + base.bias).detach(), before) < 1e-5
    assert torch.equal(model(x), before)
    lk.diagnose(model)
    assert torch.equal(model(x), before)
