"""Accelerated experts against PEFT's own: the same numbers, the same files, and a reason where they run eager."""

import contextlib
import copy
import pickle
import random
import threading
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")
if not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
    pytest.skip("no registry of experts", allow_module_level=True)

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters.experts import by_expert, chain_of
from lora_kernels.training import experts as fused_experts
from lora_kernels.training.experts import FusedExperts, experts_reason
from tests.adapters.test_experts_files import IDS, MODELS, SIZES
from tests.conftest import relative_error
from tests.helpers.accuracy import assert_accurate, rounding

TWO_ADAPTERS = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="this PEFT takes one adapter of parameters alone"
)
KINDS = ("Qwen3Moe", "GptOss", "Mixtral", "DeepseekV3")
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def wrapped(kind="Qwen3Moe", implementation="grouped_mm", *, base=None, targets=EXPERTS, **settings):
    torch.manual_seed(0)
    if base is None:
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MODELS[kind], **settings.pop("sizes", {})})
        base = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
        with contextlib.suppress(ValueError):  # Llama 4 does not know them
            base.set_experts_implementation(implementation)
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], **settings}
    model = get_peft_model(base, LoraConfig(target_parameters=targets, **options))
    return shaken(model)


def shaken(model):
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1)
            elif name.endswith("_bias"):
                value.normal_(0, 0.2)
    return model


def experts_of(model):
    """The outermost wrapper of the last layer's experts."""
    return [module for name, module in model.named_modules() if name.endswith("mlp.experts")][-1]


def accelerated(model, **settings):
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.accelerate(model, guard=False, **settings)
    return model


def routed(experts, tokens, top, dtype=torch.float32, only=None):
    """Inputs, experts of each token and their weights; `only` some experts."""
    base = experts.get_base_layer()
    x = torch.randn(tokens, SIZES["hidden_size"]).to(dtype)
    places = torch.rand(tokens, base.num_experts)
    if only is not None:
        places[:, only] += 1
    weights, index = places.topk(top, dim=-1)
    return x, index, weights.to(dtype)


def run(experts, x, index, weights):
    """Output and gradients: of inputs, weights and factors."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    factors = {
        name.removeprefix("_orig_mod."): value
        for name, value in experts.named_parameters()
        if "lora_" in name and value.requires_grad
    }
    out = experts(x, index, weights)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    grads = torch.autograd.grad(out, [x, weights, *factors.values()], g, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(("x", "weights", *factors), grads, strict=True))}


def compare(stock, fused, inputs):
    """Against float64, and twice the error of stock; all parts."""
    wide = copy.deepcopy(stock).double()
    with eager(wide):
        truth = run(wide, inputs[0].double(), inputs[1], inputs[2].double())
    expected, found = run(stock, *inputs), run(fused, *inputs)
    dtype = inputs[0].dtype
    for part, exact in truth.items():
        assert found[part].dtype == expected[part].dtype and found[part].shape == exact.shape, part
        # Two products and a gate on the way, each rounded.
        bar = 4 * (torch.finfo(dtype).eps + rounding(torch.float32, inputs[0].shape[0]))
        assert_accurate(found[part], exact, bar, plain=expected[part], what=part)


@contextlib.contextmanager
def eager(experts):
    base = chain_of(experts)[-1].base_layer
    before, base.config = base.config, copy.copy(base.config)
    base.config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        base.config = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_like_stock(kind, implementation, dtype, monkeypatch):
    stock = wrapped(kind, implementation, rank_pattern={"mlp.experts.down_proj": 2})
    stock = stock.to(dtype)
    fused = accelerated(stock)
    stock, fused = experts_of(stock), experts_of(fused)
    calls = []
    monkeypatch.setattr(type(fused).__mro__[3], "_activate_lora", lambda *_: calls.append(1))
    assert isinstance(fused, FusedExperts) and experts_reason(fused) is None
    assert {wrapper.r["default"] for wrapper in chain_of(fused)} == {2, 3}
    inputs = routed(fused, 50, 2, dtype)
    run(fused, *inputs)
    monkeypatch.undo()
    assert not calls, "the weights of all experts are made"
    for only in (None, [1], [0, 3]):
        compare(stock, fused, routed(fused, 50, 2 if only is None else len(only), dtype, only))
    compare(stock, fused, routed(fused, 1, 1, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_models(kind):
    stock = wrapped(kind)
    fused = accelerated(stock)
    results = []
    for model in (stock, fused):
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append((out.logits.detach(), grads))
    assert relative_error(results[1][0], results[0][0]) < 1e-5
    assert results[0][1].keys() == results[1][1].keys() and any("experts" in name for name in results[0][1])
    for name, grad in results[0][1].items():
        assert relative_error(results[1][1][name], grad) < 2e-4, name


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("rank", [2, 4])
def test_factors_are_those_of_pefts_delta(kind, rank):
    """As many experts as ranks, and others; a square matrix, whose transpose would fit as well."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 32 if kind == "GptOss" else 48}
    model = wrapped(kind, r=rank, sizes=sizes)
    for wrapper in chain_of(experts_of(model)):
        transposed = wrapper.get_base_layer().is_transposed
        a, b = by_expert(wrapper, wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight)
        delta = wrapper.get_delta_weight("default").double()
        expected = delta.mT if transposed else delta
        found = wrapper.scaling["default"] * b.double() @ a.double()
        assert_accurate(found, expected.detach(), rounding(torch.float32, rank))
        assert a.shape[0] == 4 and a.shape[1] == rank


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_nothing_of_the_size_of_all_experts_is_made(implementation):
    model = wrapped("Qwen3Moe", implementation, sizes={"num_experts": 32}, r=2)
    inputs = routed(experts_of(model), 6, 2)
    limit = experts_of(model).get_base_layer().down_proj.numel()

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            for result in results if isinstance(results, tuple) else (results,):
                if isinstance(result, torch.Tensor) and result._base is None and not func.is_view:
                    self.size = max(self.size, result.numel())
            return results

    sizes = []
    for each in (model, accelerated(model)):
        with Largest() as largest:
            run(experts_of(each), *inputs)
        sizes.append(largest.size)
    assert sizes[0] >= limit > 4 * sizes[1]


def both(model):
    return experts_of(model), experts_of(accelerated(model))


def same(stock, fused, inputs, tolerance=1e-5):
    expected, found = run(stock, *inputs), run(fused, *inputs)
    for part, value in expected.items():
        assert torch.equal(value, found[part]) or relative_error(found[part], value) < tolerance, part
    return expected["out"]


@TWO_ADAPTERS
def test_adapters_are_merged_disabled_switched_and_added_up():
    model = wrapped()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS))
    shaken(model)
    fused = accelerated(model)
    pair, inputs = (experts_of(model), experts_of(fused)), routed(experts_of(model), 20, 2)
    outputs = [same(*pair, inputs)]
    for models in (model, fused):
        models.set_adapter("other")
    outputs.append(same(*pair, inputs))
    for models in (model, fused):
        models.base_model.set_adapter(["default", "other"])
    outputs.append(same(*pair, inputs))
    for models in (model, fused):
        models.merge_adapter()
    merged = [each(*inputs) for each in pair]
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-5, atol=1e-6)
    assert relative_error(merged[0].detach(), outputs[-1]) < 1e-5
    for models in (model, fused):
        models.unmerge_adapter()
    same(*pair, inputs)
    # One parameter merged, the other not.
    for each in pair:
        chain_of(each)[1].merge()
    torch.testing.assert_close(pair[1](*inputs), pair[0](*inputs), rtol=1e-5, atol=1e-6)
    for each in pair:
        chain_of(each)[1].unmerge()
    with model.disable_adapter(), fused.disable_adapter():
        outputs.append(same(*pair, inputs))
    for models in (model, fused):
        models.delete_adapter("other")
        models.set_adapter("default")
    assert relative_error(same(*pair, inputs), outputs[0]) < 1e-5
    assert all(relative_error(one, two) > 1e-3 for i, one in enumerate(outputs) for two in outputs[:i])


@TWO_ADAPTERS
def test_a_checkpoint_recomputes_and_refuses_another_adapter():
    model = wrapped()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], target_parameters=EXPERTS))
    _, fused = both(model)
    inputs = routed(fused, 20, 2)
    expected = run(fused, *inputs)
    for reentrant in (False, True):
        x = inputs[0].detach().requires_grad_()
        out = checkpoint(fused, x, *inputs[1:], use_reentrant=reentrant)
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        x.grad = None
        out.backward(g)
        assert torch.equal(out.detach(), expected["out"]) and torch.equal(x.grad, expected["x"])
    out = checkpoint(fused, inputs[0].detach().requires_grad_(), *inputs[1:], use_reentrant=False)
    for wrapper in chain_of(fused):
        wrapper.set_adapter("other")
    with pytest.raises(RuntimeError, match="other adapters active"):
        out.sum().backward()


def test_training_mode_autocast_and_float32_factors():
    """PEFT keeps float32 factors of a bfloat16 model, and casts them for its sum of weights."""
    model = wrapped()
    for name, value in model.named_parameters():
        if "lora_" not in name:
            value.data = value.data.bfloat16()
    stock, fused = both(model)
    x, index, weights = routed(fused, 40, 2, torch.bfloat16)
    compare(stock, fused, (x, index, weights))
    stock, fused = both(wrapped())
    inputs = routed(fused, 40, 2)
    for implementation in IMPLEMENTATIONS:
        for each in (stock, fused):
            each.get_base_layer().config._experts_implementation_internal = implementation
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, found = stock(*inputs), fused(*inputs)
        assert expected.dtype == found.dtype
        assert relative_error(found.detach(), expected.detach()) < 2e-2


def test_files_copies_and_classes():
    model = wrapped("Qwen3Moe", sizes={"num_experts": 2}, r=4)  # twice the rank, as of adapters with parts
    fused = accelerated(model)
    assert list(model.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(model.state_dict())
    inputs = routed(experts_of(model), 10, 2)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(experts_of(other), FusedExperts)
        same(experts_of(model), experts_of(other), inputs)
    assert type(experts_of(fused)).__name__ == "ParamWrapper"
    assert lk.restore(fused) == lk.restore(copy.deepcopy(accelerated(model)))
    assert not isinstance(experts_of(fused), FusedExperts)
    same(experts_of(model), experts_of(fused), inputs, 1e-9)


def test_saved_and_loaded(tmp_path):
    model = accelerated(wrapped())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**SIZES, **MODELS["Qwen3Moe"]}))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert relative_error(model.eval()(input_ids=IDS).logits, loaded.eval()(input_ids=IDS).logits) < 1e-5


def test_unloaded_experts_are_stock_again():
    model = accelerated(wrapped())
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert relative_error(merged.eval()(input_ids=IDS).logits, expected) < 1e-5
    assert not any(isinstance(module, FusedExperts) for module in merged.modules())
    assert type(merged.model.layers[0].mlp.experts.config) is transformers.Qwen3MoeConfig


def test_reference_mode_runs_pefts_own():
    stock, fused = both(wrapped())
    inputs = routed(fused, 10, 2)
    with lk.training.reference_mode():
        expected, found = run(stock, *inputs), run(fused, *inputs)
    assert all(torch.equal(found[part], value) for part, value in expected.items())


def test_compiles_without_a_break():
    _, fused = both(wrapped())
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for tokens in (10, 13):
        inputs = routed(fused, tokens, 2)
        same(fused, compiled, inputs)


def reasons(model, **settings):
    """The warning of `accelerate`, whose layers then do what stock ones do."""
    other = copy.deepcopy(model)
    with pytest.warns(RuntimeWarning) as caught:
        report = lk.accelerate(other, guard=False, **settings)
    eager = {path.name: path.reason for path in report if path.path == "eager"}
    with torch.no_grad():
        assert relative_error(other.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits) < 1e-5
    assert all(path.reason in str(caught[0].message) for path in report if path.path == "eager")
    return eager


def test_what_runs_eager_and_why():
    hooked = wrapped()
    chain_of(experts_of(hooked))[1].register_forward_hook(lambda *_: None)
    assert "is hooked into" in next(iter(reasons(hooked).values()))
    quiet = wrapped()
    factor = experts_of(quiet).lora_A["default"]
    factor.register_forward_hook(lambda *_: None)
    assert "the factors of adapter 'default'" in next(iter(reasons(quiet).values()))
    llama = wrapped("Llama4Text", targets=["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"])
    found = reasons(llama)
    assert len(found) == 4 and all("takes no implementation" in reason for reason in found.values())
    with pytest.raises(ValueError, match="4 layers would not be accelerated"):
        lk.accelerate(llama, strict=True)
    biased = wrapped("GptOss", targets=["mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj"])
    # Of the two wrappers the outer one's parameter is no product, so both run eager.
    kinds = set(reasons(biased).values())
    assert any("gate_up_proj_bias is not the weight of a product" in reason for reason in kinds)


def test_implementations_that_are_not_known_run_eager(monkeypatch):
    def own(module, hidden_states, top_k_index, top_k_weights):
        return moe.grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)

    moe.ALL_EXPERTS_FUNCTIONS.register("test_own", own)
    try:
        model = wrapped()
        model.base_model.model.set_experts_implementation("test_own")
        assert "the experts' implementation is 'test_own'" in next(iter(reasons(model).values()))
    finally:
        moe.ALL_EXPERTS_FUNCTIONS._global_mapping.pop("test_own", None)
        moe.ALL_EXPERTS_FUNCTIONS._local_mapping.pop("test_own", None)
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", own)
    assert "'grouped_mm' is replaced" in next(iter(reasons(wrapped()).values()))


def test_experts_that_do_not_ask_the_registry_run_pefts_own():
    _, fused = both(wrapped())
    base, inputs = fused.get_base_layer(), routed(fused, 10, 2)
    expected = fused(*inputs)

    class Own(type(base)):
        def forward(self, *args):
            return moe.grouped_mm_experts_forward(self, *args)

    base.__class__ = Own
    with pytest.warns(RuntimeWarning, match="does not ask transformers' registry"):
        found = fused(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_changed_state_is_seen_and_said():
    _, fused = both(wrapped())
    inputs = routed(fused, 10, 2)
    expected = fused(*inputs)
    fused.get_base_layer()._is_expert_parallel = True
    with pytest.warns(RuntimeWarning, match="shared out over processes"):
        torch.testing.assert_close(fused(*inputs), expected, rtol=1e-5, atol=1e-6)
    fused.get_base_layer()._is_expert_parallel = False
    assert torch.equal(fused(*inputs), expected)
    assert fused.get_base_layer().config.__class__ is transformers.Qwen3MoeConfig


def test_hooks_of_the_module_of_experts_run():
    model = wrapped()
    seen = []
    for each in (model, fused := accelerated(model)):
        experts_of(each).get_base_layer().register_forward_hook(lambda _m, _args, out: seen.append(1) or 2 * out)
    same(experts_of(model), experts_of(fused), routed(experts_of(fused), 10, 2))
    assert len(seen) == 2


def test_threads_may_share_hooked_experts():
    """Each call of the module of experts tells it what to do, while another is under way."""
    _, fused = both(wrapped())
    base, inputs = fused.get_base_layer(), routed(fused, 30, 2)
    expected, found = fused(*inputs).detach(), []
    barrier = threading.Barrier(2, timeout=30)
    # All are told before one runs, and none goes before all have run.
    handles = [
        register(lambda *_: [barrier.wait(), None][1])
        for register in (base.register_forward_pre_hook, base.register_forward_hook)
    ]
    threads = [threading.Thread(target=lambda: found.append(fused(*inputs).detach())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    assert len(found) == 2 and all(torch.equal(each, expected) for each in found)
    assert base.config.__class__ is transformers.Qwen3MoeConfig
    assert torch.equal(fused(*inputs).detach(), expected)


def test_a_thread_beside_a_call_runs_pefts_own():
    """What one thread asks of a module of experts holds for that thread alone."""
    _, fused = both(wrapped())
    base, inputs, found = fused.get_base_layer(), routed(fused, 30, 2), []

    def beside(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: found.append(base(*inputs).detach()))
            thread.start()
            thread.join()

    expected = base(*inputs).detach()
    base.register_forward_pre_hook(beside)
    fused(*inputs)
    assert len(found) == 1 and torch.equal(found[0], expected)


def test_a_global_hook_is_seen():
    stock, fused = both(wrapped())
    inputs, seen = routed(fused, 10, 2), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        stock(*inputs)
        expected = list(seen)
        seen.clear()
        fused(*inputs)
        assert seen == expected
    finally:
        handle.remove()


def test_second_derivatives_and_transforms_are_refused():
    _, fused = both(wrapped())
    x, index, weights = routed(fused, 10, 2)
    with pytest.raises(RuntimeError, match="twice.*reference_mode"):
        torch.autograd.grad(fused(x, index, weights).sum(), fused.lora_A["default"].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="torch.func transforms.*reference_mode"):
        torch.func.grad(lambda x: fused(x, index, weights).sum())(x)
    implementation = moe.ALL_EXPERTS_FUNCTIONS["lora_kernels"]
    with pytest.raises(ValueError, match="for accelerated LoRA layers alone"):
        implementation(fused.get_base_layer(), x, index, weights)


def test_verify_says_what_it_leaves_out():
    model = accelerated(wrapped())
    report = lk.verify(model, {"input_ids": IDS, "labels": IDS})
    assert report.ok and {name.rsplit(".", 2)[-1] for name in report.skipped} <= {"experts", "base_layer"}
    assert set(report.skipped.values()) == {"experts are compared by the loss alone"}
    assert abs(report.loss[0] - report.loss[1]) < 1e-5


def test_no_tokens():
    stock, fused = both(wrapped())
    x = torch.zeros(0, SIZES["hidden_size"])
    index, weights = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert fused(x, index, weights).shape == stock(x, index, weights).shape == (0, SIZES["hidden_size"])
    assert isinstance(fused, nn.Module)


def own_experts(**traits):
    """A module of experts of a kind that few models have, as transformers would decorate it, and its model."""
    gated, transposed = traits.get("has_gate", True), traits.get("is_transposed", False)
    size, inner, count = SIZES["hidden_size"], 12, 4

    @moe.use_experts_implementation(**traits)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = count, nn.functional.silu
            first, shapes = (
                ("gate_up_proj" if gated else "up_proj"),
                ((2 * inner if gated else inner, size), (size, inner)),
            )
            for name, shape in zip((first, "down_proj"), shapes, strict=True):
                weight = torch.randn(count, *shape) * shape[1] ** -0.5
                self.register_parameter(name, nn.Parameter(weight.mT.contiguous() if transposed else weight))
                if traits.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(count, shape[0])))
            if traits.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(size)

        if not traits.get("is_concatenated", True):

            def _apply_gate(self, gate_up):
                return torch.sigmoid(gate_up[..., ::2]) * gate_up[..., 1::2]

        def forward(self, *args):
            return moe.batched_mm_experts_forward(self, *args)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            config = transformers.PretrainedConfig()
            config._experts_implementation = "grouped_mm"
            self.mlp = nn.Module()
            self.mlp.experts = Experts(config)

    return Model(), "gate_up_proj" if gated else "up_proj"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "traits",
    [
        {"has_gate": False},
        {"has_post_expert_norm": True, "has_bias": True},
        {"is_transposed": True},
        {"is_transposed": True, "has_gate": False, "has_bias": True},
        {"is_concatenated": False},
    ],
    ids=str,
)
def test_every_kind_of_experts(traits, implementation):
    base, first = own_experts(**traits)
    model = wrapped(base=base, targets=[f"mlp.experts.{first}", "mlp.experts.down_proj"], target_modules=[])
    stock = experts_of(model)
    fused = copy.deepcopy(stock)
    report = lk.accelerate(fused, guard=False)
    assert {path.path for path in report} == {"delta"}
    for each in (stock, fused):
        each.get_base_layer().config._experts_implementation = implementation
    compare(stock, fused, routed(fused, 30, 2))


@pytest.mark.parametrize("targets", [EXPERTS[:1], EXPERTS[1:]], ids=str)
def test_one_parameter_alone(targets):
    model = wrapped(targets=targets)
    stock, fused = both(model)
    assert len(chain_of(fused)) == 1
    compare(stock, fused, routed(fused, 30, 2))


def test_same_input_same_bits():
    _, fused = both(wrapped())
    inputs = routed(fused, 60, 4)
    first, second = run(fused, *inputs), run(fused, *inputs)
    assert all(torch.equal(first[part], second[part]) for part in first)


def _operation(draw, names):
    """What a step of a random sequence does to a model with adapters of these names, and what is left of them."""
    kind = draw.choice(("add", "set", "delete", "merge", "unmerge", "disable", "enable", "scale", "inner", "mode"))
    if kind == "add" and len(names) < 4:
        name, rank = f"more{draw.randrange(10**6)}", draw.choice((1, 2, 5))
        settings = {"r": rank, "target_modules": ["q_proj"], "target_parameters": EXPERTS, "init_lora_weights": False}
        return [*names, name], lambda model: (torch.manual_seed(rank), model.add_adapter(name, LoraConfig(**settings)))
    if kind == "set":
        chosen = draw.sample(names, draw.randint(1, len(names)))
        return names, lambda model: model.base_model.set_adapter(chosen)
    if kind == "delete" and len(names) > 1:
        name = draw.choice(names)
        left = [other for other in names if other != name]
        steps = lambda model: (model.unmerge_adapter(), model.delete_adapter(name), model.base_model.set_adapter(left))  # noqa: E731
        return left, steps
    if kind == "merge":
        return names, lambda model: model.merge_adapter()
    if kind == "unmerge":
        return names, lambda model: model.unmerge_adapter()
    if kind in ("disable", "enable"):
        return names, lambda model: getattr(model.base_model, f"{kind}_adapter_layers")()
    if kind == "scale":
        name, factor = draw.choice(names), draw.choice((0.0, -1.0, 0.5))
        return names, lambda model: [wrapper.set_scale(name, factor) for wrapper in chain_of(experts_of(model))]
    if kind == "inner":
        step = draw.choice(("merge", "unmerge"))
        return names, lambda model: getattr(chain_of(experts_of(model))[1], step)()
    training = draw.random() < 0.5
    return names, lambda model: model.train(training)


@TWO_ADAPTERS
@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_of_adapter_operations(seed):
    draw, model = random.Random(seed), wrapped(KINDS[seed % 2], IMPLEMENTATIONS[seed % 3])
    fused, names = accelerated(model), ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of merging what is merged
        for _ in range(15):
            names, operation = _operation(draw, names)
            for each in (model, fused):
                operation(each)
            stock, mine = experts_of(model), experts_of(fused)
            inputs = routed(stock, 12, 2)
            expected, found = run(stock, *inputs), run(mine, *inputs)
            assert expected.keys() == found.keys()
            for part, value in expected.items():
                assert torch.equal(value, found[part]) or relative_error(found[part], value) < 1e-4, part


@pytest.mark.parametrize(
    "dtypes", [(torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=str
)
def test_rows_of_tokens_are_taken_and_summed_up_with_their_gradients(dtypes):
    """Against the plain formula in float64; what is summed is not rounded before."""
    tokens, k, n = 7, 3, 10
    kind, of_weights = dtypes
    x = torch.randn(tokens, n).to(kind).requires_grad_()
    weights = torch.rand(tokens, k).to(of_weights).requires_grad_()
    order = torch.randperm(tokens * k)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    places = places.view(tokens, k)
    rows = fused_experts._Rows.apply(x, order // k, places)
    factors = torch.randn(tokens * k, n).to(kind)
    out = fused_experts._Combined.apply(rows * factors, weights, places)
    g = torch.randn(tokens, n).to(out.dtype)
    found = (out, *torch.autograd.grad(out, (x, weights), g))
    exact = [value.detach().double().requires_grad_() for value in (x, weights)]
    rounded = (x.detach()[order // k] * factors).double()
    products = exact[0][order // k] * factors.double()
    products = products + (rounded - products).detach()
    truth = (products[places] * exact[1].unsqueeze(-1)).sum(1)
    truths = (truth, *torch.autograd.grad(truth, exact, g.double()))
    assert [value.dtype for value in found[1:]] == [kind, of_weights]
    for one, other in zip(found, truths, strict=True):
        assert relative_error(one.detach(), other.detach()) < (1e-14 if kind == torch.float64 else 2e-2)
    assert relative_error(out.detach(), truth.detach()) < (1e-14 if kind == torch.float64 else 1e-6)
