"""Layers on one input: the same numbers as each of them alone, forward and backward."""

import pytest
import torch

from lora_kernels import ops
from lora_kernels.ops import Dropout, LoraMember
from lora_kernels.ops.lora_linear import reference
from tests.conftest import relative_error

FEATURES = 24
BACKENDS = ["torch", "cpp"]


def tensor(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def member(outputs, rank, dtype=torch.float32, *, drop=None, extra=0, base=False, bias=True, scaling=0.7, train=True):
    frozen = None
    if extra:
        frozen = tensor(extra, FEATURES, dtype=dtype, grad=False), tensor(outputs, extra, dtype=dtype, grad=False), -0.7
    start = tensor(5, 3, outputs, dtype=dtype) if base else None
    return LoraMember(
        None if base else tensor(outputs, FEATURES, dtype=dtype, grad=train),
        start if base else tensor(outputs, dtype=dtype) if bias else None,
        tensor(rank, FEATURES, dtype=dtype, grad=train),
        tensor(outputs, rank, dtype=dtype),
        scaling,
        None if drop is None else Dropout(0.3, drop),
        frozen,
    )


def leaves(x, members):
    found = [x]
    for each in members:
        found += [t for t in (each.weight, each.start, each.a, each.b) if t is not None and t.requires_grad]
    return found


def by_definition(x, members):
    outputs = []
    for each in members:
        given = {"scaling": each.scaling, "dropout": each.dropout, "extra": each.extra}
        bias = each.start if each.weight is not None else None
        y = reference.lora_linear(x, each.weight, bias, each.a, each.b, **given)
        outputs.append(y if each.weight is not None else y + each.start)
    return outputs


CASES = {
    "plain": [{"outputs": 9, "rank": 3}, {"outputs": 4, "rank": 8}, {"outputs": 9, "rank": 1}],
    "no bias": [{"outputs": 9, "rank": 3, "bias": False}, {"outputs": 4, "rank": 8}],
    "scales": [{"outputs": 9, "rank": 3}, {"outputs": 4, "rank": 8, "scaling": -2.0}, {"outputs": 4, "rank": 2}],
    "no scale": [{"outputs": 9, "rank": 3, "scaling": 0.0}, {"outputs": 4, "rank": 8, "scaling": 2.0}],
    "frozen pairs": [
        {"outputs": 9, "rank": 3, "extra": 2},
        {"outputs": 4, "rank": 8},
        {"outputs": 5, "rank": 2, "extra": 1},
    ],
    "masks": [{"outputs": 9, "rank": 3, "drop": 1}, {"outputs": 4, "rank": 8, "drop": 2}],
    "some masks": [
        {"outputs": 9, "rank": 3, "drop": 1},
        {"outputs": 4, "rank": 8},
        {"outputs": 3, "rank": 2, "drop": 3},
    ],
    "masks and frozen pairs": [{"outputs": 9, "rank": 3, "drop": 1, "extra": 2}, {"outputs": 4, "rank": 8, "extra": 3}],
    "frozen A": [{"outputs": 9, "rank": 3, "train": False}, {"outputs": 4, "rank": 8}],
    "own base products": [
        {"outputs": 9, "rank": 3, "base": True},
        {"outputs": 4, "rank": 8},
        {"outputs": 6, "rank": 2, "base": True, "drop": 4},
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_same_as_the_definition(case, backend):
    torch.manual_seed(0)
    x = tensor(5, 3, FEATURES)
    members = [member(**each) for each in CASES[case]]
    outputs = ops.lora_linear_group(x, members, backend=backend)
    expected = by_definition(x, members)
    gs = [torch.randn_like(each) for each in outputs]
    wanted = leaves(x, members)
    found = torch.autograd.grad(outputs, wanted, gs)
    truth = torch.autograd.grad(expected, wanted, gs)
    assert len(found) > 4
    for mine, yours in zip((*outputs, *found), (*expected, *truth), strict=True):
        assert mine.shape == yours.shape and mine.dtype == yours.dtype
        if yours.count_nonzero():
            assert relative_error(mine, yours) < 1e-6 and relative_error(mine / 2, yours) > 0.4
        else:
            assert not mine.count_nonzero()


@pytest.mark.parametrize("case", ["plain", "frozen pairs", "masks and frozen pairs", "own base products"])
def test_gradients_in_float64(case):
    torch.manual_seed(1)
    x = tensor(5, 3, FEATURES, dtype=torch.float64)
    members = [member(**each, dtype=torch.float64) for each in CASES[case]]

    def run(*_leaves):
        return ops.lora_linear_group(x, members)

    assert torch.autograd.gradcheck(run, leaves(x, members), atol=1e-7)


def test_only_some_outputs_are_used():
    torch.manual_seed(2)
    x = tensor(5, 3, FEATURES)
    members = [member(9, 3), member(4, 8), member(6, 2, drop=7)]
    outputs = ops.lora_linear_group(x, members)
    expected = by_definition(x, members)
    for used in ([1], [0, 2], [2]):
        wanted = leaves(x, [members[i] for i in used])
        found = torch.autograd.grad([outputs[i].sum() for i in used], wanted, retain_graph=True)
        truth = torch.autograd.grad([expected[i].sum() for i in used], wanted, retain_graph=True)
        assert all(relative_error(*pair) < 1e-6 for pair in zip(found, truth, strict=True))
        others = [each.b for i, each in enumerate(members) if i not in used]
        unused = torch.autograd.grad([outputs[i].sum() for i in used], others, retain_graph=True, allow_unused=True)
        assert all(each is None for each in unused)


def test_frozen_input_and_bfloat16_with_float32_factors():
    torch.manual_seed(3)
    x = tensor(5, 3, FEATURES, dtype=torch.bfloat16, grad=False)
    members = [
        LoraMember(tensor(m, FEATURES, dtype=torch.bfloat16, grad=False), None, tensor(4, FEATURES), tensor(m, 4), 2.0)
        for m in (9, 5)
    ]
    outputs = ops.lora_linear_group(x, members)
    assert all(each.dtype == torch.bfloat16 for each in outputs)
    wanted = [t for each in members for t in (each.a, each.b)]
    found = torch.autograd.grad([each.float().sum() for each in outputs], wanted)
    wide = [LoraMember(each.weight.float(), None, each.a, each.b, 2.0) for each in members]
    truth = torch.autograd.grad([each.sum() for each in by_definition(x.float(), wide)], wanted)
    assert all(each.dtype == torch.float32 for each in found)
    assert all(relative_error(*pair) < 1e-2 for pair in zip(found, truth, strict=True))


def test_what_is_kept_for_the_backward_pass():
    kept = []
    x = tensor(4096, FEATURES)
    members = [member(9, 4), member(5, 4), member(7, 4)]

    def pack(value):
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        ops.lora_linear_group(x, members)
    wide = [each for each in kept if each.shape[0] == 4096]
    assert sorted(each.shape[1] for each in wide) == [12, FEATURES]


def test_compiles_and_transforms():
    torch.manual_seed(4)
    x = tensor(5, 3, FEATURES)
    members = [member(9, 3), member(4, 8)]

    def run(value):
        one, other = ops.lora_linear_group(value, members)
        return one.sum() + other.square().sum()

    expected = run(x)
    (dx,) = torch.autograd.grad(expected, x)
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(x), expected, atol=1e-4)
    assert relative_error(torch.func.grad(run)(x.detach()), dx) < 1e-5
    samples = torch.func.vmap(torch.func.grad(run))(x.detach())
    assert relative_error(samples, dx) < 1e-5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, each: (x, []), "at least one"),
        (lambda x, each: (x, [each, LoraMember(None, None, each.a, each.b, 1.0)]), "where weight is None"),
        (lambda x, each: (x, [each, LoraMember(None, each.start, each.a, each.b, 1.0)]), "start has shape"),
        (lambda x, each: (x[..., :-1], [each, each]), "weight has shape"),
        (lambda x, each: (x, [each, LoraMember(each.weight[:-1], None, each.a, each.b, 1.0)]), "b has shape"),
        (lambda x, each: (x, [each, LoraMember(each.weight, each.start[1:], each.a, each.b, 1.0)]), "start has shape"),
        (lambda x, each: (x.double(), [each, each]), "dtype"),
    ],
)
def test_bad_arguments(change, match):
    x, members = change(tensor(5, 3, FEATURES), member(9, 3))
    with pytest.raises((ValueError, TypeError), match=match):
        ops.lora_linear_group(x, members)
