"""Strategies for what no function expects: tensors of any shape, stride, dtype, device and kind; no numbers."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

SIZES = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17)
NARROW = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*NARROW, torch.float64)
DTYPES = (
    *FLOATS, torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
)  # fmt: skip
LAYOUTS = (
    "plain",
    "transposed",
    "sliced",
    "reversed",
    "offset",
    "expanded",
    "negated",
    "gradient",
    "parameter",
    "view",
)
VALUES = ("normal", "normal", "normal", "zeros", "equal", "large", "tiny", "huge", "nan", "infinite", "mixed")
QUIET = ("normal", "zeros", "equal", "large", "tiny")


class Renamed(torch.Tensor):
    """A subclass that does nothing."""


def fill(shape, dtype, kind, seed):
    """Plain float64 values of a kind, rounded to what the dtype can hold."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "zeros":
        made = torch.zeros_like(made)
    elif kind == "equal":
        made = torch.full_like(made, 0.75)
    elif kind == "large":
        made = made * 1e3
    elif kind == "tiny":
        made = made * 1e-4
    elif kind == "huge":
        made = made.sign() * (torch.finfo(dtype).max if dtype.is_floating_point else 100) * 0.9
    elif kind in ("nan", "infinite", "mixed") and made.numel():
        places = torch.randperm(made.numel(), generator=generator)[: max(1, made.numel() // 7)]
        what = {"nan": [math.nan], "infinite": [math.inf], "mixed": [math.nan, math.inf, -math.inf]}[kind]
        made.view(-1)[places] = torch.tensor([what[i % len(what)] for i in range(len(places))], dtype=torch.float64)
    return made


def lay_out(values, dtype, layout):
    """The same numbers in another place and order of memory."""
    values = values.to(dtype) if dtype.is_floating_point or dtype.is_complex else values.nan_to_num(0, 1, -1).to(dtype)
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "reversed" and values.dim() > 1:  # strides that grow to the right, for every size
        return values.permute(*range(values.dim())[::-1]).contiguous().permute(*range(values.dim())[::-1])
    if layout == "sliced" and values.dim() > 0:
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), 77, dtype=torch.float32).to(dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if layout == "offset" and values.dim() > 0:
        wide = torch.full((values.shape[0] + 3, *values.shape[1:]), 77, dtype=torch.float32).to(dtype)
        wide[2:-1] = values
        return wide[2:-1]
    if layout == "expanded" and values.dim() > 0 and values.shape[0] > 1:
        return values[:1].clone().expand(values.shape)
    if layout == "negated" and dtype.is_floating_point and dtype.itemsize > 1:
        return torch._neg_view(values.neg())
    if layout == "gradient" and dtype.is_floating_point and dtype.itemsize > 1:
        return values.clone().requires_grad_()
    if layout == "parameter" and dtype.is_floating_point and dtype.itemsize > 1:
        return torch.nn.Parameter(values.clone())
    if layout == "view" and values.dim() > 0:
        return values.clone().as_subclass(Renamed)
    return values.clone()


@st.composite
def tensors(draw, shape, dtype=torch.float32, values=VALUES, layouts=LAYOUTS):
    """A dense CPU tensor of a shape and dtype."""
    numbers = fill(shape, dtype, draw(st.sampled_from(values)), draw(st.integers(0, 2**16)))
    return lay_out(numbers, dtype, draw(st.sampled_from(layouts)))


def writable(shape, dtype=torch.float32, values=("normal", "zeros")):
    """A tensor to accumulate in: no two elements in one place, rows in one piece, no gradient."""
    return tensors(shape, dtype, values, ("plain", "offset"))


sizes = st.sampled_from(SIZES)
shapes = st.lists(sizes, max_size=4).map(tuple)
huge_shapes = st.sampled_from([(2**40, 0), (0, 2**40), (2**62, 0, 2), (0, 2**62)])


def _sparse(shape):
    return torch.ones(shape).to_sparse()


def _freed(shape):
    made = torch.ones(shape)
    made.untyped_storage().resize_(0)
    return made


def _nested(_shape):
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])


def _quantized(shape):
    return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


def _fake(shape):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape)


@st.composite
def hostile_tensors(draw, like=None):
    """A tensor that should not be here; of the shape of `like` in half of the cases, where that is given."""
    shape = tuple(like.shape) if isinstance(like, torch.Tensor) and draw(st.booleans()) else draw(shapes)
    kind = draw(st.sampled_from(["dense"] * 6 + ["meta", "meta", "huge", "expanded", "freed", "other"]))
    if kind == "dense":
        return draw(tensors(shape, draw(st.sampled_from(DTYPES))))
    if kind == "meta":
        big = draw(st.sampled_from([shape, (2**20, 2**20), (2**40,)]))
        return torch.empty(big, dtype=draw(st.sampled_from(FLOATS)), device="meta")
    if kind == "huge":
        return torch.empty(draw(huge_shapes), dtype=draw(st.sampled_from(FLOATS)))
    if kind == "expanded":
        return torch.ones(1, dtype=draw(st.sampled_from(FLOATS))).expand(shape or (3,))
    if kind == "freed":
        return _freed(shape if shape and math.prod(shape) else (3, 3))
    return draw(st.sampled_from([_sparse, _nested, _quantized]))(shape or (2, 3))


hostile_scalars = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 2**31, 2**40, 2**63, 2**64, -(2**63) - 1, 10**400, -(10**400), 0.0, -0.0,
        0.5, 1.5, -2.5, 1e308, 1e-308, math.nan, math.inf, -math.inf, "", "auto", "cpp", "torch", "float32", "\x00",
        "é" * 3, b"bytes", 1j, np.float32(0.5), np.float64(math.nan), np.int64(3), np.bool_(True), np.zeros(3),
        np.array("x"), [], [1, 2], (), (1,), (0.9, "x"), {}, {"a": 1}, {3}, object(), int, torch.float32,
        torch.device("meta"), torch.float8_e4m3fn, slice(None), lambda *_: None, range(3), Ellipsis,
    ]
)  # fmt: skip


@st.composite
def hostile(draw, value):
    """Anything in place of a value."""
    if draw(st.integers(0, 2)) == 0:
        return draw(hostile_scalars)
    if isinstance(value, torch.Tensor) or draw(st.integers(0, 3)) == 0:
        return draw(hostile_tensors(value))
    return draw(hostile_scalars)


@st.composite
def corrupted(draw, valid, names=()):
    """A valid call, with one or two arguments replaced."""
    arguments = dict(draw(valid))
    for name in draw(st.lists(st.sampled_from(sorted(names or arguments)), min_size=1, max_size=2, unique=True)):
        arguments[name] = draw(hostile(arguments[name]))
    return arguments


def is_plain(value):
    """Whether a tensor has numbers in memory."""
    dense = value.device.type == "cpu" and value.layout == torch.strided and not (value.is_nested or value.is_quantized)
    return dense and (value.numel() == 0 or value.untyped_storage().nbytes() > 0)


def plain(value):
    """A copy of a tensor's numbers in float64, in an ordinary tensor; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not is_plain(value):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        made = value.detach().as_subclass(torch.Tensor).resolve_neg().resolve_conj().clone()
    return made if made.dtype in (torch.bool, torch.int64) or made.dtype.is_complex else made.to(torch.float64)
