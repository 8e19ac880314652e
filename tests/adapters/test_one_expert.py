"""A parameter of a single expert: PEFT adds `B A` to its one matrix as it is stored. And calls without any row."""

import copy
import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

import lora_kernels as lk
from lora_kernels.adapters import parts
from lora_kernels.adapters.experts import expert_layers, observed, why_unseen
from lora_kernels.adapters.view import lora_layers
from lora_kernels.init import METHODS
from lora_kernels.init.problem import BaseLayer
from tests.adapters.start_models import nudge
from tests.adapters.test_experts_files import IDS, SIZES, make
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="experts are modules there")
BATCH = {"input_ids": IDS, "labels": IDS}
SWAPS = "_did_swap_in_out_features" in inspect.getsource(ParamWrapper)
# PEFT before 0.20 fails at its own forward of one expert that is not square, in the layout of most models.
NAMES = ["Qwen3Moe"] * SWAPS + ["GptOss"]
ONE = {"num_experts_per_tok": 1, "head_dim": 8}


def bare(name):
    """Qwen's layout is `(1, m, n)`; gpt-oss's is transposed, which PEFT adds to where it is square."""
    torch.manual_seed(0)
    if name == "Qwen3Moe":
        settings = {**SIZES, **ONE, "num_experts": 1, "moe_intermediate_size": 24}
    else:
        settings = {**SIZES, **ONE, "num_local_experts": 1, "intermediate_size": 32}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()


def adapted(name, r=4, parameters=None):
    parameters = parameters or {"Qwen3Moe": ["gate_up_proj", "down_proj"], "GptOss": ["down_proj"]}[name]
    names = [f"mlp.experts.{parameter}" for parameter in parameters]
    return get_peft_model(bare(name), LoraConfig(r=r, lora_alpha=6, target_modules=["q_proj"], target_parameters=names))


def of_many(name):
    names = [f"mlp.experts.{parameter}" for parameter in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], target_parameters=names)
    return get_peft_model(make(name), config)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def experts(model):
    views = [view for view in lora_layers(model) if view.parameter_name is not None]
    return [(view, *pair) for view in views for pair in expert_layers(view.name, view.module).items()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_a_layer_saves_and_exports(tmp_path, name, method):
    model, chosen = adapted(name), METHODS[method]()
    before = logits(model)
    statistics = lk.collect(model, [BATCH] * 2, wants=method if chosen.wants else "input_second", progress=False)
    report = lk.initialize(model, None, chosen, statistics=statistics if chosen.wants else None, progress=False)
    if not chosen.moves_function:
        assert relative_error(logits(model), before) < 1e-5
    assert {layer.status for layer in report} == {"initialised"}
    for view, key, layer in experts(model):
        base = BaseLayer(lambda layer=layer: layer.get_base_layer().weight.float(), layer.scaling["default"])
        alone = chosen.factors(statistics, {key: 4}, base={key: base})[key].factors
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        if b.any():
            assert relative_error(b @ a, alone.B.double() @ alone.A.double()) < 1e-4
        else:
            assert relative_error(a.mT @ a, alone.A.double().mT @ alone.A.double()) < 1e-4
        assert (parts.start(view.module, "default") is not None) == chosen.offsets_base
    nudge(model)
    expected = logits(model)
    assert relative_error(expected, before) > 0.01
    # PEFT's weight and the factors of the layer agree on what is added.
    for view, _, layer in experts(model):
        if parts.start(view.module, "default") is None:
            delta = view.module.get_delta_weight("default").detach().double()
            product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            assert relative_error(delta.mT if layer.transposed else delta, 1.5 * product) < 1e-5
    fast = copy.deepcopy(model)
    lk.accelerate(fast)
    assert relative_error(logits(fast), expected) < 1e-5
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert relative_error(logits(PeftModel.from_pretrained(bare(name), tmp_path / folder)), expected) < 1e-5
    assert torch.equal(logits(lk.load(bare(name), tmp_path / "saved")), expected)
    assert relative_error(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize("method", ["pissa", "eva"])
def test_gradients_of_the_fused_layer_are_those_of_peft(method):
    gradients = []
    for fused in (False, True):
        model = adapted("GptOss")
        lk.initialize(model, None if method == "pissa" else [BATCH], method, progress=False)
        nudge(model)
        if fused:
            assert "2 delta" in lk.accelerate(model).summary()
        model(**BATCH).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.requires_grad})
    for key, value in gradients[0].items():
        assert relative_error(gradients[1][key], value) < 1e-4


def test_it_is_diagnosed_and_trains_with_lora_pro():
    model = adapted(NAMES[0])
    lk.initialize(model, [BATCH], "lora_ga", progress=False)
    optimizer = lk.create_lora_pro_optimizer(model, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    diagnosis = lk.diagnose(model, [BATCH], weight_decay=0.1, progress=False)
    assert all(summary.count == 1 and summary.ratio > 0 for summary in diagnosis.experts)


def test_an_update_of_the_transposed_shape_is_refused_with_the_reason():
    """PEFT fails at its own forward there: `(1, n, m)` of an n that is not m."""
    model = adapted("GptOss", parameters=["gate_up_proj"])
    wrapper = next(view.module for view in lora_layers(model) if view.parameter_name is not None)
    assert "transposed shape" in why_unseen(wrapper, "default")
    with pytest.raises(RuntimeError, match="size"):
        logits(model)
    report = lk.initialize(model, None, "pissa", progress=False)
    reasons = [layer.notes[0] for layer in report if layer.status == "unsupported"]
    assert len(reasons) == 2 and all("cannot be added" in reason for reason in reasons)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_may_be_called_without_rows(transposed):
    """`torch.cat` of no parts: a branch whose tokens are all another's, say."""
    model = of_many("GptOss" if transposed else "Qwen3Moe")
    views = [view for view in lora_layers(model) if view.parameter_name == "down_proj"]
    layers = [layer for view in views for layer in expert_layers(view.name, view.module).values()]
    base = views[0].module
    while hasattr(base, "parameter_name"):
        base = base.base_layer
    x, choice, weights = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    with observed(layers):
        assert base(x, choice, weights).shape == (0, 32)
        assert base(torch.randn(3, 32), torch.ones(3, 2, dtype=torch.long), torch.ones(3, 2)).shape == (3, 32)
    assert base(torch.randn(3, 32), choice.new_ones(3, 2), torch.ones(3, 2)).any()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_experts_may_be_called_without_rows(implementation):
    model = of_many("Qwen3Moe")
    model.get_base_model().config._experts_implementation = implementation
    lk.accelerate(model)
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.zeros(1, 0, 32, requires_grad=True)
    mlp(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("wants", ["input_second", "gradient", "lora_da"])
def test_statistics_are_collected_where_a_call_has_no_rows(wants, monkeypatch):
    """A model that calls its experts a second time, for rows that this batch has none of."""
    model = of_many("Qwen3Moe")
    once = lk.collect(model, [BATCH], wants=wants, progress=False)
    inner = model.get_base_model()
    forward, mlp = inner.forward, inner.model.layers[0].mlp

    def twice(*args, **kwargs):
        out = forward(*args, **kwargs)
        none = out.logits.new_zeros(1, 0, 32)
        out.loss = out.loss + mlp(none).square().sum()
        return out

    monkeypatch.setattr(inner, "forward", twice)
    both = lk.collect(model, [BATCH], wants=wants, progress=False, mask=None)
    compared = 0
    for name, layer in once.items():
        assert layer.tokens == both[name].tokens
        for mean in ("input_covariance", "gradient"):
            if layer.tokens and (layer.has_gradient if mean == "gradient" else wants != "gradient"):
                compared += 1
                assert relative_error(getattr(both[name], mean)(), getattr(layer, mean)()) < 1e-5
    assert compared >= 10
