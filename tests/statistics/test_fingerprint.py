"""Statistics know the weights that they are of, however these are wrapped."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.statistics import CollectOptions
from lora_kernels.statistics.fingerprint import fingerprint


class Wrapped(torch.Tensor):
    """A weight of parts that knows neither slices nor reshapes, as some quantized ones."""

    @staticmethod
    def __new__(cls, codes, scale):
        shape = codes.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} of a wrapped weight")


class Opaque(Wrapped):
    """The same, which only says what its numbers are."""

    __tensor_flatten__ = None

    def dequantize(self):
        return self.codes * self.scale


def identity(model):
    return fingerprint(model, [], {"input_second": False}, CollectOptions())["parameters"]


def holding(weight):
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(weight, requires_grad=False)
    torch.nn.init.zeros_(model.bias)
    return model


@pytest.mark.parametrize("kind", [Wrapped, Opaque])
def test_values_of_wrapped_weights_count(kind):
    codes, scale = torch.arange(16, dtype=torch.int8).reshape(4, 4), torch.tensor([0.5])
    other = codes.clone()
    other[3, 3] += 1
    first = identity(holding(kind(codes, scale)))
    assert first == identity(holding(kind(codes.clone(), scale.clone())))
    assert first != identity(holding(kind(other, scale)))
    assert first != identity(holding(kind(codes, scale * 2)))


def test_values_of_torchao_weights_count():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 32))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[0].weight[5, 5] += 1.0
    same = copy.deepcopy(base)
    for model in (base, other, same):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert identity(base) == identity(same)
    assert identity(base) != identity(other)


def test_a_checkpoint_of_another_wrapped_model_is_refused(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    file = tmp_path / "checkpoint.safetensors"
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 8))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        arguments = {"checkpoint": file, "progress": False}
        if seed == 0:
            lk.collect(model, [torch.randn(3, 32)], **arguments)
            continue
        with pytest.raises(ValueError, match="parameters"):
            lk.collect(model, [torch.randn(3, 32)], **arguments)
