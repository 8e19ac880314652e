"""What holds for every op: what the lists say, the paths of a call, and self-tests that can fail."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import ops
from lora_kernels.doctor import self_tests
from lora_kernels.ops import _ext
from lora_kernels.ops._backend import Refused
from lora_kernels.ops._op import OPS, Op, is_plain, no_float64, on_cpp, on_torch

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
# Exported beside ops: settings, arguments of ops, compositions of torch, and what is made of several ops.
BESIDE = {"BACKENDS", "Dropout", "lora_delta", "symmetrize_", "use_backend", "use_form"}


def tensors(values):
    """The tensors among arguments or results, in order."""
    values = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    return [value for value in values if isinstance(value, torch.Tensor)]


def call(function, arguments):
    """Call; all that it could have written, and its results."""
    results = function(**arguments)
    return [*tensors(arguments), *tensors(results)]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Watch(TorchDispatchMode):
    """Notes the operations that torch's dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_every_op_is_public():
    assert set(OPS) | BESIDE == set(ops.__all__) and not set(OPS) & BESIDE
    assert all(op.function.__name__ == op.name for op in OPS.values())


@EVERY
def test_a_half_scaled_result_fails_the_self_test(op):
    arguments, error = op.example(CPU)
    results = op.function(**arguments)
    assert error(results) <= op.bound
    written = [arguments[name] for name in op.writes if isinstance(arguments.get(name), torch.Tensor)]
    for tensor in {id(tensor): tensor for tensor in (*written, *tensors(results))}.values():
        tensor.mul_(0.5)
    assert not error(results) <= op.bound


@EVERY
def test_the_registered_op_does_what_a_direct_call_does(op):
    direct, registered = op.example(CPU)[0], op.example(CPU)[0]
    expected = call(op.function, direct)
    with Watch() as watch:
        found = call(op.function, registered)
    assert watch.seen.count(op.overload) == 1 and same(expected, found)


@EVERY
def test_on_fake_tensors_shapes_and_dtypes_are_those_of_a_call(op):
    arguments = op.example(CPU)[0]
    expected = call(op.function, arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        found = call(op.function, fakes)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in expected]


@EVERY
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_a_break(op, compiler):
    """Written arguments are inputs of the graph, read before and after; results are buffers of the graph."""

    function = op.function

    def around(arguments):
        before = [arguments[name] * 2 for name in op.writes if name in arguments]
        found = call(function, arguments)
        return before, [each + 1 for each in found if each.is_floating_point()]

    eager, compiled = op.example(CPU)[0], op.example(CPU)[0]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        found = torch.compile(around, fullgraph=True, backend=compiler)(compiled)
    expected = around(eager)
    assert same(expected[0], found[0]) and same(expected[1], found[1]) and same(tensors(eager), tensors(compiled))


def test_autograd_hears_of_what_is_written():
    out, x = torch.zeros(3, 3), torch.randn(4, 3)
    factor = torch.ones(3, 3, requires_grad=True)
    product = (out * factor).sum()
    ops.covariance_(out, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        ops.covariance_(torch.zeros(3, 3), x)


def test_autocast_does_not_reach_into_an_op():
    arguments = {"rows": OPS["project"].example(CPU)[0], "y": OPS["orthonormalize"].example(CPU)[0]}
    expected = ops.project(**arguments["rows"]), *ops.orthonormalize(**arguments["y"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.project(**arguments["rows"]), *ops.orthonormalize(**arguments["y"])
    assert same(expected, found)


@EVERY
def test_a_default_device_does_not_matter(op):
    arguments, error = op.example(CPU)
    function = op.function
    with torch.device("meta"):
        results = function(**arguments)
    assert error(results) <= op.bound


def test_plain():
    x = torch.randn(3)
    assert is_plain(x, None, torch.nn.Parameter(x))
    zeros = torch._efficientzerotensor((3,))
    for other in (torch._neg_view(x), zeros, x.to("meta"), x.as_subclass(_Own)):
        assert not is_plain(x, other)
    with Watch():
        assert not is_plain(x)
    found = []
    torch.func.grad(lambda y: (found.append(is_plain(x)), y.sum())[1])(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda y: (found.append(is_plain(x)), y * 2)[1], x, check_trace=False)
    assert found == [False, False]


class _Own(torch.Tensor):
    pass


def _scaled(backend, out, x, weight, total, scale: float, times: int, flag: bool, kind: str):
    backend(out, x, weight, total, scale * times)


_scaled.__annotations__ |= {
    "out": torch.Tensor, "x": torch.Tensor, "weight": torch.Tensor | None, "total": torch.Tensor | None,
}  # fmt: skip


def _run(out, x, weight, total, scale):
    out.copy_(x * scale if weight is None else x * weight * scale)
    if total is not None:
        total += x.sum()


@pytest.fixture(scope="module")
def own():
    op = Op(
        "test_own",
        _scaled,
        writes=("out", "total"),
        backends=(on_cpp(_run, lambda _, x, *__: no_float64(x)), on_torch(_run)),
        accumulates=True,
    )
    del OPS["test_own"]  # it is in no list
    return op


def test_an_op_takes_optional_tensors_and_numbers(own):
    x, weight = torch.randn(3), torch.randn(3)
    assert str(own.overload._schema) == (
        "lora_kernels::test_own(Tensor(a0!) out, Tensor x, Tensor? weight, Tensor(a3!)? total, float scale, "
        "SymInt times, bool flag, str kind, str backend) -> ()"
    )
    for factor in (None, weight):
        for total in (None, torch.zeros(())):
            arguments = (torch.zeros(3), x, factor, total, 0.5, 4, True, "m")
            torch.library.opcheck(own.overload, (*arguments, "torch"))
            own("torch", *arguments)
            assert torch.equal(arguments[0], 2 * x * (1 if factor is None else factor))
            assert total is None or torch.equal(total, x.sum())


def test_an_op_explains_its_choice(own, monkeypatch):
    x = torch.randn(3)
    rest = (None, None, 1.0, 1, True, "m")
    wide = own.explain(x.double(), x.double(), *rest)
    assert wide["torch"] is None and ("takes no float64" in wide["cpp"] or _ext.load()[0] is None)
    monkeypatch.setattr(_ext, "missing", lambda: "not built")
    with pytest.raises(Refused, match=r"test_own cannot run on backend 'cpp' \(cpp: not built\)") as refusal:
        own("cpp", x.clone(), x, *rest)
    assert refusal.value.reasons == {"cpp": "not built"}
    with pytest.raises(Refused, match="test_own has no 'triton' implementation"):
        own("triton", x.clone(), x, *rest)
    with pytest.raises(ValueError, match="out and x share memory"):
        own("torch", x, x, *rest)


def test_self_tests_say_why_a_backend_did_not_run():
    for outcome in self_tests():
        assert outcome.op in OPS or outcome.op.startswith("lora_linear")
        assert not outcome.broken and (outcome.error is not None or outcome.reason), outcome
