"""The LoRA layer in autograd, torch.compile and checkpoints, and beside PEFT."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_kernels.ops import Dropout, _ext, lora_delta, lora_linear
from lora_kernels.ops.lora_linear import reference
from tests.conftest import relative_error
from tests.ops.test_lora_linear import DROPOUTS, make, make_extra, widened


@pytest.mark.parametrize("ratio", [None, -1.0, 0.4], ids=["no extra", "taken off", "extra"])
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["whole", "dropped"])
def test_gradcheck(dropout, ratio):
    tensors = make((2, 3), 7, 5, 3, torch.float64)
    extra = None if ratio is None else widened(make_extra(7, 5, 0.7 * ratio, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *each: lora_linear(*each, scaling=0.7, dropout=dropout, extra=extra), tensors
    )
    y = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    x, _, _, a, b = tensors
    assert torch.autograd.gradcheck(
        lambda *each: lora_delta(*each, scaling=0.7, dropout=dropout, extra=extra), (y, x, a, b)
    )


def test_second_derivatives_are_refused():
    tensors = make((4,), 5, 3, 2)

    def loss(x):
        return lora_linear(x, *tensors[1:], scaling=1.0).sum()  # g does not depend on x: nothing would show the error

    functional = torch.autograd.functional
    for attempt in (
        lambda: torch.autograd.grad(loss(tensors[0]), tensors[3], create_graph=True),
        lambda: functional.hvp(loss, tensors[0].detach(), torch.ones(4, 5)),
        lambda: functional.hessian(loss, tensors[0].detach()),
        lambda: functional.jacobian(loss, tensors[0].detach(), create_graph=True),
    ):
        with pytest.raises(RuntimeError, match="twice.*reference_mode"):
            attempt()
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.func.vmap):
        with pytest.raises(RuntimeError, match="torch.func transforms.*reference_mode"):
            transform(loss)(tensors[0].detach())
    assert torch.autograd.functional.jacobian(loss, tensors[0].detach()).shape == (4, 5)


def test_registration_is_sound():
    x, weight, bias, a, b = (each.detach() for each in make((6,), 7, 5, 3))
    a0, b0, _ = make_extra(7, 5, 1.0)
    seed = torch.tensor([4])
    forward = torch.ops.lora_kernels.lora_linear.default
    backward = torch.ops.lora_kernels.lora_linear_backward.default
    g = torch.randn(6, 5)
    backends = ("torch", "cpp") if _ext.load()[0] is not None else ("torch",)
    for backend, start, pair, drop in itertools.product(
        backends, (bias, None), ((a0, b0), (None, None)), ((None, 0, 0), (seed, 20000, 3))
    ):
        tensors, scalars = (a, b, *pair, drop[0]), (0.5, -0.5, *drop[1:])
        torch.library.opcheck(forward, (x, weight, start, *tensors, *scalars, backend))
        _, t = forward(x, weight, start, *tensors, *scalars, backend)
        torch.library.opcheck(backward, (g, x, t, weight, *tensors, *scalars, backend, True))
        torch.library.opcheck(backward, (g, None, None, None, *tensors, *scalars, backend, True))
        torch.library.opcheck(backward, (g, x, None, weight, *tensors, *scalars, backend, False))
    torch.library.opcheck(forward, (x, None, torch.randn(6, 5), a, b, a0, b0, seed, 0.5, 0.1, 20000, 3, "torch"))


def test_a_dispatch_mode_sees_the_registered_operations():
    seen = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    tensors = make((4,), 5, 3, 2)
    expected = torch.autograd.grad(lora_linear(*tensors, scaling=1.0).pow(2).sum(), tensors)
    with Look():
        found = torch.autograd.grad(lora_linear(*tensors, scaling=1.0).pow(2).sum(), tensors)
    assert {"lora_kernels::lora_linear", "lora_kernels::lora_linear_backward"} <= set(seen)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Layer(torch.nn.Module):
    """A layer as a training loop has it: the seed is drawn from torch's generator, inside."""

    def __init__(self, features, outputs, rank, p=0.4):
        super().__init__()
        tensors = make((1,), features, outputs, rank)
        self.weight, self.bias = (torch.nn.Parameter(each.detach(), requires_grad=False) for each in tensors[1:3])
        self.a, self.b = (torch.nn.Parameter(each.detach()) for each in tensors[3:])
        self.extra, self.p = make_extra(features, outputs, -0.5), p

    def forward(self, x):
        dropout = Dropout.draw(self.p, device=x.device) if self.p else None
        y = lora_linear(x, self.weight, self.bias, self.a, self.b, scaling=0.5, dropout=dropout, extra=self.extra)
        dropout = Dropout.draw(self.p, stream=1, device=x.device) if self.p else None
        return lora_delta(y, x, self.a, self.b, scaling=0.25, dropout=dropout).tanh()


def step(function, layer, x, seed=3):
    """Output and gradients under a seed of torch's generator."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.a, layer.b))]


def assert_same(found, expected, tolerance=0.0):
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_compiles_for_any_number_of_tokens(p):
    layer, graphs = Layer(12, 9, 3, p), []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    made = []
    for tokens in (5, 8, 17):
        x = torch.randn(2, tokens, 12)
        assert_same(step(compiled, layer, x), step(layer, layer, x), 1e-6)
        made.append(len(graphs))  # more than one after the first call: torch may start over while it compiles
    assert made[2] == made[0], "compiled again for another number of tokens"
    with torch.no_grad():
        assert compiled(torch.randn(2, 5, 12)).shape == (2, 5, 9)


def test_no_compilation_per_seed():
    x, weight, bias, a, b = make((6,), 12, 9, 3)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = lambda seed: lora_linear(x, weight, bias, a, b, scaling=0.5, dropout=Dropout(0.5, seed))  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=count)
    results = [compiled(torch.tensor([seed])) for seed in range(5)]
    assert len(graphs) == 1 and not torch.equal(results[0], results[1])
    assert torch.equal(results[3], run(3))


def test_compiles_under_autocast():
    layer = Layer(12, 9, 3)

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 12)
    assert_same(step(compiled, layer, x), step(run, layer, x), 1e-2)


@pytest.mark.slow
def test_inductor():
    """It draws seeds of its own unless told otherwise; the same for a checkpoint as without one."""
    layer, x = Layer(12, 9, 3, 0.0), torch.randn(6, 12)
    assert_same(step(torch.compile(layer, fullgraph=True), layer, x), step(layer, layer, x), 1e-5)
    layer.p = 0.4
    plain = step(torch.compile(layer, fullgraph=True), layer, x)
    recomputed = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True)
    assert_same(step(recomputed, layer, x), plain, 1e-5)


def test_exported_and_on_meta():
    layer, tokens = Layer(12, 9, 3, 0.0), torch.export.Dim("tokens", min=2, max=100)
    exported = torch.export.export(layer, (torch.randn(6, 12),), dynamic_shapes={"x": {0: tokens}}).module()
    x = torch.randn(9, 12)
    torch.testing.assert_close(exported(x), layer(x))
    meta = [torch.empty(size, device="meta") for size in ((4, 3, 8), (6, 8), (6,), (2, 8), (6, 2))]
    assert lora_linear(*meta, scaling=1.0).shape == (4, 3, 6)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_drop_the_same(reentrant):
    layer, x = Layer(20, 15, 4), torch.randn(11, 20)
    plain = step(layer, layer, x)

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    x_leaf = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = recomputed(x_leaf)
    torch.manual_seed(77)  # another state by the time of the backward
    layer.zero_grad()
    y.square().sum().backward()
    assert_same([y.detach(), x_leaf.grad, layer.a.grad, layer.b.grad], plain)
    assert not torch.equal(step(layer, layer, x, seed=4)[0], plain[0]), "dropout must matter"


def test_compiled_checkpoint():
    layer, x = Layer(20, 15, 4), torch.randn(11, 20)

    def recomputed(x):
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, layer, x), step(layer, layer, x), 1e-6)


def test_functional_call_with_replaced_adapters():
    layer, x = Layer(12, 9, 3, 0.0), torch.randn(5, 12)
    new = {"a": torch.randn(3, 12, requires_grad=True), "b": torch.randn(9, 3, requires_grad=True)}
    found = torch.autograd.grad(torch.func.functional_call(layer, new, x).sum(), (new["a"], new["b"]))
    layer.a.data, layer.b.data = new["a"].detach(), new["b"].detach()
    expected = torch.autograd.grad(layer(x).sum(), (layer.a, layer.b))
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_peft(dtype):
    lora = pytest.importorskip("peft.tuners.lora")
    base = torch.nn.Linear(24, 18).to(dtype)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=6, lora_alpha=9, lora_dropout=0.0, init_lora_weights=False)
    layer = lora.Linear(base, "default", config=config, r=6, lora_alpha=9, init_lora_weights=False)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, grad = torch.randn(3, 8, 24).to(dtype).requires_grad_(), torch.randn(3, 8, 18).to(dtype)
    leaves = (x, base.weight, base.bias, a, b)
    for each in leaves:
        each.requires_grad_()
    theirs = layer(x)
    expected = [theirs, *torch.autograd.grad(theirs, leaves, grad)]
    ours = lora_linear(x, base.weight, base.bias, a, b, scaling=layer.scaling["default"])
    found = [ours, *torch.autograd.grad(ours, leaves, grad)]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    truth = reference.lora_linear(*exact, scaling=layer.scaling["default"])
    truths = [truth, *torch.autograd.grad(truth, exact, grad.double())]
    for one, other, true in zip(found, expected, truths, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one.detach(), true.detach()) <= 2 * relative_error(other.detach(), true.detach()) + 2e-7
