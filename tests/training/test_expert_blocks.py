"""Experts in blocks of rows: which rows are in one, what is kept, and when they are not used."""

import contextlib

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

moe = pytest.importorskip("transformers.integrations.moe")
if not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
    pytest.skip("no registry of experts", allow_module_level=True)

from lora_kernels.adapters.experts import chain_of
from lora_kernels.ops import _ext
from lora_kernels.ops.grouped_lora import passes
from lora_kernels.ops.grouped_lora.passes import Scalars
from lora_kernels.training import expert_blocks
from tests.adapters.test_experts_files import SIZES
from tests.conftest import relative_error
from tests.helpers.accuracy import rounding
from tests.training.test_experts import (
    both,
    compare,
    own_experts,
    routed,
    run,
    same,
    wrapped,
)

NEEDS_CPP = pytest.mark.skipif(not hasattr(_ext.load()[0], "grouped_lora_forward"), reason="kernels not built")


@pytest.fixture
def calls(monkeypatch):
    """A number for each call that is taken by blocks."""
    seen, take = [], expert_blocks.run
    monkeypatch.setattr(expert_blocks, "run", lambda *args: seen.append(1) or take(*args))
    return seen


def base_of(experts):
    return chain_of(experts)[-1].base_layer


@pytest.mark.parametrize(
    ("offsets", "experts"),
    [
        ([0, 2, 4, 6, 8], [(0, 4)]),  # exactly as many as fit
        ([0, 2, 4, 6, 9], [(0, 3), (3, 4)]),
        ([0, 20, 21, 29, 50], [(0, 1), (1, 2), (2, 3), (3, 4)]),  # experts are not cut
        ([0, 0, 0, 30, 30], [(0, 2), (2, 3), (3, 4)]),
        ([0, 0, 0], [(0, 2)]),
        ([0, 30], [(0, 1)]),
    ],
    ids=str,
)
def test_blocks_have_all_experts_in_turn(offsets, experts, monkeypatch):
    monkeypatch.setattr(expert_blocks, "ROWS", 8)
    blocks = expert_blocks._cut(torch.tensor(offsets))
    assert [(block.experts.start, block.experts.stop) for block in blocks] == experts
    for block, (first, last) in zip(blocks, experts, strict=True):
        assert (block.rows.start, block.rows.stop) == (offsets[first], offsets[last])
        assert block.bounds == block.offsets.tolist() == [at - offsets[first] for at in offsets[first : last + 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("rows", [1, 25, 10**6])
def test_any_size_of_blocks_gives_stocks_numbers(rows, kind, dtype, monkeypatch, calls):
    monkeypatch.setattr(expert_blocks, "ROWS", rows)
    stock, fused = both(wrapped(kind).to(dtype))
    for only in (None, [2]):
        compare(stock, fused, routed(fused, 50, 2 if only is None else 1, dtype, only))
    assert len(calls) == 2


@pytest.mark.parametrize(
    "traits",
    [
        {"has_gate": False},
        {"has_bias": True},
        {"is_transposed": True, "has_bias": True},
        {"is_transposed": True, "has_gate": False},
        {"is_concatenated": False},
    ],
    ids=str,
)
def test_every_kind_of_experts(traits, monkeypatch, calls):
    monkeypatch.setattr(expert_blocks, "ROWS", 20)
    base, first = own_experts(**traits)
    model = wrapped(base=base, targets=[f"mlp.experts.{first}", "mlp.experts.down_proj"], target_modules=[])
    stock, fused = both(model)
    compare(stock, fused, routed(fused, 30, 2))
    assert len(calls) == 1


def test_a_token_may_choose_an_expert_twice(monkeypatch, calls):
    monkeypatch.setattr(expert_blocks, "ROWS", 20)
    stock, fused = both(wrapped())
    x, index, weights = routed(fused, 30, 2)
    index[:10, 1] = index[:10, 0]
    compare(stock, fused, (x, index, weights))
    assert len(calls) == 1


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_weights_of_another_dtype(dtypes, calls):
    stock, fused = both(wrapped().to(dtypes[0]))
    x, index, weights = routed(fused, 50, 2, dtypes[0])
    compare(stock, fused, (x, index, weights.to(dtypes[1])))
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(compiled_autograd, "_enable"), reason="another interface in this version of torch")
def test_backward_passes_that_are_compiled(monkeypatch, calls):
    monkeypatch.setattr(expert_blocks, "ROWS", 20)
    stock, fused = both(wrapped())
    torch._dynamo.reset()
    inputs = routed(fused, 30, 2)
    expected = run(stock, *inputs)
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = run(fused, *inputs)
    for part, value in expected.items():
        assert relative_error(found[part], value) < 1e-5, part
    assert len(calls) == 1


@pytest.mark.parametrize("learns", ["x", "weights", "first", "second"])
def test_only_what_needs_a_gradient(learns, monkeypatch, calls):
    monkeypatch.setattr(expert_blocks, "ROWS", 20)
    stock, fused = both(wrapped("GptOss"))
    inputs, found = routed(fused, 30, 2), []
    for experts in (stock, fused):
        x, index, weights = (each.clone() for each in inputs)
        outer, inner = chain_of(experts)
        first, second = (outer, inner) if outer.parameter_name == "gate_up_proj" else (inner, outer)
        wanted = {
            "x": [x],
            "weights": [weights],
            **{
                name: [one.lora_A["default"].weight, one.lora_B["default"].weight]
                for name, one in (("first", first), ("second", second))
            },
        }
        experts.requires_grad_(False)
        for leaf in wanted[learns]:
            leaf.requires_grad_()
        out = experts(x, index, weights)
        found.append(torch.autograd.grad(out.square().sum(), wanted[learns]))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-5
    assert len(calls) == 1


def test_without_gradients(calls):
    stock, fused = both(wrapped())
    inputs = routed(fused, 30, 2)
    with torch.no_grad():
        assert relative_error(fused(*inputs), stock(*inputs)) < 1e-5
    with torch.inference_mode():
        assert relative_error(fused(*inputs), stock(*inputs)) < 1e-5
    assert len(calls) == 2


def kept(experts, inputs):
    """Numbers that are saved for the backward pass, weights aside."""
    sizes, weights = [], {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    x, index, routing = inputs
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(x.requires_grad_(), index, routing.requires_grad_())
    return sum(sizes)


def test_of_all_rows_those_in_front_of_the_gate_are_kept(monkeypatch, calls):
    tokens, k, rank = 200, 2, 3
    _, fused = both(wrapped(r=rank))
    inputs, base = routed(fused, tokens, k), base_of(fused)
    before = tokens * (SIZES["hidden_size"] + k)  # x and the weights, which are there anyway
    factors = sum(value.numel() for name, value in fused.named_parameters() if "lora_" in name)
    rows = tokens * k * base.gate_up_proj.shape[1]
    low_rank = 2 * tokens * k * rank
    mine = kept(fused, inputs)
    assert len(calls) == 1 and rows < mine <= before + rows + low_rank + factors + 2
    monkeypatch.setattr(expert_blocks, "can_run", lambda *_: False)
    assert kept(fused, inputs) > 1.5 * mine


class Watch(TorchDispatchMode):
    """Sees every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("why", ["trained", "hooked", "autocast", "mixed", "normed", "observed"])
def test_where_blocks_do_not_serve_all_rows_go_together(why, calls):
    if why == "normed":
        base, first = own_experts(has_post_expert_norm=True)
        model = wrapped(base=base, targets=[f"mlp.experts.{first}", "mlp.experts.down_proj"], target_modules=[])
    else:
        model = wrapped()
    stock, fused = both(model)
    inputs, around = routed(fused, 20, 2), contextlib.nullcontext()
    tolerance, seen = 1e-5, []
    for experts in (stock, fused):
        base = base_of(experts)
        if why == "trained":
            base.down_proj.requires_grad_()
        elif why == "hooked":
            base.act_fn.register_forward_hook(lambda *_: seen.append(1))
        elif why == "mixed":
            base.down_proj.data = base.down_proj.data.double()
    if why == "mixed":
        assert not expert_blocks.can_run(base_of(fused), inputs[0], inputs[2])
        return
    if why == "autocast":
        around, tolerance = torch.autocast("cpu", dtype=torch.bfloat16), 2e-2
    if why == "observed":
        around = Watch()
    with around:
        same(stock, fused, inputs, tolerance)
    assert not calls
    if why == "hooked":
        assert len(seen) == 2
    if why == "trained":
        grads = [
            torch.autograd.grad(each(*inputs).square().sum(), base_of(each).down_proj)[0] for each in (stock, fused)
        ]
        assert relative_error(grads[1], grads[0]) < 1e-5


def test_a_changed_weight_is_seen_in_the_backward_pass():
    _, fused = both(wrapped())
    x, index, weights = routed(fused, 20, 2)
    out = fused(x.requires_grad_(), index, weights)
    with torch.no_grad():
        base_of(fused).down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batched_gradients_are_refused(calls):
    _, fused = both(wrapped())
    x, index, weights = routed(fused, 20, 2)
    out = fused(x.requires_grad_(), index, weights)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)
    assert len(calls) == 1


def test_the_graph_can_be_kept(calls):
    _, fused = both(wrapped())
    x, index, weights = routed(fused, 20, 2)
    out = fused(x.requires_grad_(), index, weights).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0 and len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=NEEDS_CPP)])
def test_a_gradient_is_added_into_another(backend, dtype):
    """`passes.backward` into memory; rows of no expert keep what is there."""
    offsets, rows = torch.tensor([0, 20, 20, 33]), 40
    g, x = torch.randn(rows, 30).to(dtype), torch.randn(rows, 17).to(dtype)
    a, b = torch.randn(3, 4, 17).to(dtype), torch.randn(3, 30, 4).to(dtype)
    scalars, before = Scalars(0.5, 0, 0, backend), torch.randn(rows, 17).to(dtype)
    _, t = passes.forward(torch.zeros(rows, 30, dtype=dtype), x, offsets, a, b, None, scalars)
    alone = passes.backward(g, x, t, offsets, a, b, None, scalars, True)
    memory = before.clone()
    found = passes.backward(g, x, t, offsets, a, b, None, scalars, True, into=memory)
    assert found[0] is memory and all(map(torch.equal, found[1:], alone[1:]))
    truth = before.double()
    for expert, (low, high) in enumerate(((0, 20), (20, 20), (20, 33))):
        truth[low:high] += 0.5 * g[low:high].double() @ b[expert].double() @ a[expert].double()
    assert relative_error(memory, truth) < rounding(torch.float32, 34, dtype)
    assert torch.equal(memory[33:], before[33:]) and not torch.equal(memory[:33], before[:33])


def test_the_op_without_ranks_adds_nothing():
    offsets, memory = torch.tensor([0, 5]), torch.randn(5, 3)
    before, scalars = memory.clone(), Scalars(1.0, 0, 0, "torch")
    a, b = torch.zeros(1, 0, 3), torch.zeros(1, 4, 0)
    passes.backward(torch.randn(5, 4), None, None, offsets, a, b, None, scalars, True, into=memory)
    assert torch.equal(memory, before)
