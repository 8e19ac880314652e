"""LoRA-Pro on the factors of many experts in two matrices: each expert's pair is treated as that of a layer."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_kernels as lk
from lora_kernels.adapters.experts import join_experts, split_experts
from lora_kernels.adapters.view import lora_layers
from lora_kernels.api import learning_rate
from lora_kernels.ops import lora_pro_adam_
from lora_kernels.ops.lora_pro_adam import op
from lora_kernels.runtime.modes import observation_mode
from lora_kernels.training.lora_pro.model import find_pairs
from tests.adapters.start_models import nudge
from tests.conftest import relative_error
from tests.training.lora_pro_cases import ByTheBook, full_gradients

MODES = ["efficient", "full"]
# experts, m, n, r: experts != r, square matrices, as many experts as ranks, one expert.
CASES = [(5, 12, 17, 3), (3, 11, 11, 4), (4, 8, 8, 4), (1, 9, 6, 2), (6, 5, 7, 1)]


def packed(pairs):
    """PEFT's matrices, written out: rows of A by expert and rank, columns of B by rank and expert."""
    a, b = (torch.stack([pair[which].detach() for pair in pairs]) for which in (0, 1))
    experts, rank, _ = a.shape
    first, second = a.new_zeros(experts * rank, a.shape[2]), b.new_zeros(b.shape[1], rank * experts)
    for expert in range(experts):
        for k in range(rank):
            first[expert * rank + k], second[:, k * experts + expert] = a[expert, k], b[expert, :, k]
    return nn.Parameter(first), nn.Parameter(second)


def pairs_of(case, dtype=torch.float64, b_scale=0.3, seed=0):
    experts, m, n, r = case
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            nn.Parameter((torch.randn(r, n, generator=generator, dtype=torch.float64) / n**0.5).to(dtype)),
            nn.Parameter((b_scale * torch.randn(m, r, generator=generator, dtype=torch.float64)).to(dtype)),
        )
        for _ in range(experts)
    ]


class Mixture:
    """Some parameters of experts, and the same pairs as layers of their own."""

    def __init__(self, cases=CASES, dtype=torch.float64, b_scale=0.3, **options):
        self.scaling = [0.7 + 0.4 * index for index in range(len(cases))]
        self.cases, self.layers = cases, [pairs_of(case, dtype, b_scale, index) for index, case in enumerate(cases)]
        self.stacks = [packed(pairs) for pairs in self.layers]
        group = {"pairs": self.stacks, "scaling": self.scaling, "experts": [case[0] for case in cases]}
        self.optimizer = lk.training.LoraPro([group], lr=0.02, weight_decay=0.1, **options)
        flat = [(pair, s) for pairs, s in zip(self.layers, self.scaling, strict=True) for pair in pairs]
        group = {"pairs": [pair for pair, _ in flat], "scaling": [s for _, s in flat]}
        self.reference = lk.training.LoraPro([group], lr=0.02, weight_decay=0.1, **options)

    def full(self, step):
        shapes = [(m, n, r) for experts, m, n, r in self.cases for _ in range(experts)]
        return full_gradients(step, shapes)

    def set_gradients(self, step):
        full = iter(self.full(step))
        for stack, pairs, s in zip(self.stacks, self.layers, self.scaling, strict=True):
            for a, b in pairs:
                g = next(full)
                a.grad, b.grad = (
                    (s * b.detach().double().T @ g).to(a.dtype),
                    (s * g @ a.detach().double().T).to(b.dtype),
                )
            gradients = packed([(a.grad, b.grad) for a, b in pairs])
            for parameter, gradient in zip(stack, gradients, strict=True):
                parameter.grad = gradient.detach()

    def step(self, number):
        self.set_gradients(number)
        self.optimizer.step()
        self.reference.step()

    def errors(self):
        for stack, pairs in zip(self.stacks, self.layers, strict=True):
            for mine, expected in zip(stack, packed(pairs), strict=True):
                yield relative_error(mine.detach(), expected.detach())


def values(mixture):
    return [value.detach().clone() for stack in mixture.stacks for value in stack]


@pytest.mark.parametrize("case", CASES)
def test_matrices_of_many_experts_are_split_and_joined_as_peft_orders_them(case):
    pairs = [pairs_of(case, seed=seed) for seed in range(3)]
    first, second = (torch.stack([packed(layers)[which].detach() for layers in pairs]) for which in (0, 1))
    a, b = split_experts(first, second, case[0])
    for which, stack in enumerate((a, b)):
        assert torch.equal(stack, torch.stack([pair[which].detach() for layers in pairs for pair in layers]))
    assert all(torch.equal(one, two) for one, two in zip(join_experts(a, b, case[0]), (first, second), strict=True))


@pytest.mark.parametrize("b_scale", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_experts_step_as_layers_of_their_own(mode, b_scale):
    mixture = Mixture(b_scale=b_scale, mode=mode)
    book = ByTheBook(
        [pair for pairs in mixture.layers for pair in pairs],
        [s for pairs, s in zip(mixture.layers, mixture.scaling, strict=True) for _ in pairs],
        0.02,
        mode,
        weight_decay=0.1,
    )
    before = values(mixture)
    for step in range(6):
        mixture.step(step)
        book.step(mixture.full(step))
    assert all(not torch.equal(one, two) for one, two in zip(before, values(mixture), strict=True))
    assert max(mixture.errors()) < 1e-11
    if not b_scale:
        return  # (Adam's first step of B is a sign: the factors of some experts then lose their rank)
    truth = iter(book.pairs)
    for stack, pairs in zip(mixture.stacks, mixture.layers, strict=True):
        for mine, expected in zip(stack, packed([next(truth) for _ in pairs]), strict=True):
            assert relative_error(mine.detach(), expected.detach()) < 1e-9


def test_one_eigendecomposition_serves_all_experts(monkeypatch):
    from lora_kernels.training.lora_pro import adjustment  # noqa: PLC0415

    calls, eigh = [], adjustment.eigh
    monkeypatch.setattr(adjustment, "eigh", lambda grams: calls.append(grams.shape) or eigh(grams))
    mixture = Mixture(cases=[(5, 12, 17, 3), (7, 9, 6, 3)])
    mixture.set_gradients(0)
    mixture.optimizer.step()
    assert calls == [(2, 12, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_call_of_adam_serves_all_experts_of_a_parameter(dtype, monkeypatch):
    """And gives what a call for each expert gives; bfloat16 moments take the random bits of the same rows."""
    state = torch.bfloat16 if dtype == torch.bfloat16 else None
    outcomes, shapes = [], []

    def whole(m, *tensors, **numbers):
        shapes.append(tuple(m.shape))
        return lora_pro_adam_(m, *tensors, **numbers)

    def by_expert(*tensors, row_offset, row_step, **numbers):
        parts = [
            lora_pro_adam_(*parts, row_offset=row_offset + expert * row_step, **numbers)
            for expert, parts in enumerate(zip(*tensors, strict=True))
        ]
        return tuple(map(torch.stack, zip(*parts, strict=True)))

    for adam in (whole, by_expert):
        monkeypatch.setattr(op, "lora_pro_adam_", adam)
        torch.manual_seed(0)
        mixture = Mixture(dtype=dtype, mode="full", state_dtype=state)
        for step in range(3):
            mixture.set_gradients(step)
            mixture.optimizer.step()
        moments = [mixture.optimizer.state[b][key] for _, b in mixture.stacks for key in ("exp_avg", "exp_avg_sq")]
        outcomes.append([*values(mixture), *moments])
    assert sorted(shapes) == sorted([case[:3] for case in CASES] * 3)
    for one, other in zip(*outcomes, strict=True):
        assert relative_error(one, other) < (1e-2 if state else 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_short_parameters_of_experts_are_rounded_once(mode):
    mixture = Mixture(dtype=torch.bfloat16, mode=mode)
    mixture.step(0)
    assert max(mixture.errors()) < 2**-8


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("options", [{}, {"mode": "full"}, {"mode": "full", "state_dtype": torch.bfloat16}])
def test_a_resumed_run_goes_on_to_the_same_bits(options, rounding, dtype):
    torch.manual_seed(0)
    one = Mixture(dtype=dtype, rounding=rounding, **options)
    for step in range(2):
        one.step(step)
    for (experts, m, n, r), (a, b) in zip(one.cases, one.stacks, strict=True):
        expected = (m, experts * n) if "mode" in options else (m, r * experts)
        assert one.optimizer.state[b]["exp_avg"].shape == expected
        assert "mode" in options or one.optimizer.state[a]["exp_avg"].shape == (experts * r, n)
    torch.manual_seed(1)
    two = Mixture(dtype=dtype, rounding=rounding, **options)
    with torch.no_grad():
        for mine, value in zip(two.stacks, one.stacks, strict=True):
            for parameter, other in zip(mine, value, strict=True):
                parameter.copy_(other)
    two.optimizer.load_state_dict(through_a_file(one.optimizer.state_dict()))
    for mixture in (one, two):
        for parameters, gradients in zip(mixture.stacks, one.stacks, strict=True):
            for parameter, other in zip(parameters, gradients, strict=True):
                parameter.grad = other.grad.clone()
        mixture.optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(values(one), values(two), strict=True))


def test_bfloat16_moments_of_equal_experts_are_rounded_apart():
    """Each expert has random bits of its own, and they keep the mean."""
    a, b = pairs_of((1, 64, 64, 4), torch.float32)[0]
    stack = packed([(a, b)] * 8)
    options = {"mode": "full", "state_dtype": torch.bfloat16}
    optimizer = lk.training.LoraPro([{"pairs": [stack], "scaling": 1.0, "experts": 8}], lr=0.0, **options)
    (g,) = full_gradients(0, [(64, 64, 4)])
    grads = (b.detach().double().T @ g).float(), (g @ a.detach().double().T).float()
    for parameter, gradient in zip(stack, packed([grads] * 8), strict=True):
        parameter.grad = gradient.detach()
    optimizer.step()
    moments = optimizer.state[stack[1]]["exp_avg"].view(64, 8, 64).float()
    exact = lk.training.LoraPro([{"pairs": [(a, b)], "scaling": 1.0}], lr=0.0, mode="full")
    a.grad, b.grad = grads
    exact.step()
    truth = exact.state[b]["exp_avg"]
    assert all(not torch.equal(moments[:, 0], moments[:, expert]) for expert in range(1, 8))
    errors = [relative_error(moments[:, expert], truth) for expert in range(8)]
    assert relative_error(moments.mean(1), truth) < 0.6 * min(errors)


def test_stochastic_rounding_moves_experts_that_rounding_to_nearest_would_leave():
    moved = {}
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(3)
        mixture = Mixture(cases=[(4, 40, 40, 3)], dtype=torch.bfloat16, rounding=rounding)
        for group in mixture.optimizer.param_groups:
            group.update(lr=1e-6, weight_decay=0.0)
        before = values(mixture)
        for step in range(5):
            mixture.set_gradients(step)
            mixture.optimizer.step()
        moved[rounding] = [float((x != y).float().mean()) for x, y in zip(before, values(mixture), strict=True)]
    assert all(stochastic > nearest for stochastic, nearest in zip(moved["stochastic"], moved["nearest"], strict=True))


def test_a_number_of_experts_that_does_not_fit_is_refused():
    a, b = packed(pairs_of((5, 12, 17, 3)))
    for experts, message in (
        (4, "has 15 rows, but must have as many for each of 4 experts"),
        (0, "experts"),
        ([5, 5], "experts has 2 entries, but must be a number or one per pair"),
    ):
        with pytest.raises(ValueError, match=message):
            lk.training.LoraPro([{"pairs": [(a, b)], "scaling": 1.0, "experts": experts}], lr=0.1)
    with pytest.raises(ValueError, match="experts belongs to a group with pairs"):
        lk.training.LoraPro([{"params": [a, b], "experts": 5}], lr=0.1)
    with pytest.raises(ValueError, match="saved in another mode, or for other parameters"):
        one, two = (Mixture(cases=[case], mode="full") for case in ((5, 12, 17, 3), (3, 12, 17, 5)))
        one.step(0)
        two.optimizer.load_state_dict(one.optimizer.state_dict())


# -- PEFT's own layers -------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Of both layouts; `(experts, n, m)` where transposed."""

    def __init__(self, experts, m, n, *, transposed):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        shape = (experts, n, m) if transposed else (experts, m, n)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / n**0.5)
        self.is_transposed = transposed

    def forward(self, x):
        return torch.einsum("enm,ebn->ebm" if self.is_transposed else "emn,ebn->ebm", self.weight, x)


class Layers(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for index, weight in enumerate(weights):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
            layer.weight.data.copy_(weight)
            setattr(self, f"expert{index}", layer)

    def forward(self, x):
        return torch.stack([getattr(self, f"expert{index}")(rows) for index, rows in enumerate(x)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(3, 7, 10, 4), (5, 8, 8, 2)])
def test_pefts_experts_train_as_ordinary_layers(sizes, transposed, mode):
    experts, m, n, r = sizes
    base = Experts(experts, m, n, transposed=transposed)
    layers = Layers([weight.T if transposed else weight for weight in base.weight.detach()])
    one = get_peft_model(nn.ModuleDict({"experts": base}), LoraConfig(r=r, target_parameters=["experts.weight"]))
    two = get_peft_model(layers, LoraConfig(r=r, target_modules=r"expert\d"))
    ((_, wrapper),) = [view for view in lora_layers(one) if view.parameter_name]
    generator = torch.Generator().manual_seed(8)
    for parameter in (wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    scaling = wrapper.scaling["default"]
    delta = wrapper.get_delta_weight("default").detach() / scaling
    for index, (_, layer) in enumerate(lora_layers(two)):
        # The true orientation: A meets the inputs, whatever PEFT calls it.
        first = wrapper.lora_A["default"].weight.detach().view(experts, r, -1)[index]
        second = wrapper.lora_B["default"].weight.detach()[:, index::experts]
        direct = first.shape[1] == n and torch.allclose(second @ first, delta[index].T if transposed else delta[index])
        a, b = (first, second) if direct else (second.T, first.T)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.clone(), b.clone()
    x = torch.randn(experts, 6, n, generator=generator, dtype=torch.float64)
    y = torch.randn(experts, 6, m, generator=generator, dtype=torch.float64)
    forwards = (lambda: one.get_submodule("base_model.model.experts")(x)), (lambda: two(x))
    assert relative_error(forwards[0]().detach(), forwards[1]().detach()) < 1e-12
    for model, forward in zip((one, two), forwards, strict=True):
        optimizer = lk.create_lora_pro_optimizer(model, lr=0.02, mode=mode, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (forward() - y).square().mean().backward()
            optimizer.step()
    for index, (_, layer) in enumerate(lora_layers(two)):
        delta = wrapper.get_delta_weight("default").detach()[index]
        expected = layer.get_delta_weight("default").detach()
        assert relative_error(delta.T if transposed else delta, expected) < 1e-7


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "num_experts_per_tok": 2,
}  # fmt: skip
IDS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(1))


def mixture_model(name):
    torch.manual_seed(0)
    if name == "Qwen3Moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24))
    else:
        model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, intermediate_size=24))
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=names))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("mode", "rate"), [("efficient", 3e-2), ("full", 5e-3)])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_a_mixture_learns_and_resumes_to_the_same_bits(name, mode, rate):
    model = mixture_model(name)
    optimizer = lk.create_lora_pro_optimizer(model, lr=rate, mode=mode)
    assert sorted(pair.experts for pair in optimizer._pairs) == [1, 4, 4]
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = train(model, optimizer, 10)
    assert losses[-1] < 0.97 * losses[0]
    assert all(not torch.equal(value, model.get_parameter(key)) for key, value in before.items())
    twin = copy.deepcopy(model)
    other = lk.create_lora_pro_optimizer(twin, lr=rate, mode=mode)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for run in ((model, optimizer), (twin, other)):
        train(*run, 2)
    for key in before:
        assert torch.equal(model.get_parameter(key), twin.get_parameter(key))


@pytest.mark.parametrize("name", ["lora_pro", "lora_pro_full"])
def test_a_suggested_rate_is_along_the_optimizers_own_step(name):
    model = mixture_model("GptOss").eval()
    nudge(model)
    data = [{"input_ids": IDS, "labels": IDS}]
    probe = learning_rate._Probe(model, None, None, "auto")
    pairs = find_pairs(model)
    with observation_mode(model, gradients=True):
        steps = learning_rate._first_step(probe, name, pairs, probe.gradients(data))
    before = [value.detach().clone() for value in probe.parameters]
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-3, mode="full" if name == "lora_pro_full" else "efficient")
    model(**data[0]).loss.backward()
    optimizer.step()
    for value, start, step in zip(probe.parameters, before, steps, strict=True):
        assert torch.linalg.norm(start + 1e-3 * step - value) <= 1e-2 * torch.linalg.norm(value - start)
