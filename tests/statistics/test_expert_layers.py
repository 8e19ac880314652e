"""Experts as layers: statistics are those of the rows that are routed to each, starts those of each alone."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_kernels as lk
from lora_kernels.adapters.experts import expert_layers, observed, why_unseen
from lora_kernels.adapters.view import lora_layers
from lora_kernels.init import EVA, METHODS
from tests.adapters.test_experts_files import PARAMETERS, logits, make
from tests.conftest import relative_error

moe = pytest.importorskip("transformers.integrations.moe", reason="experts are a registry's since transformers 5")
pytestmark = pytest.mark.skipif(not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"), reason="transformers has no registry")

NAMES = ["Qwen3Moe", "GptOss", "Mixtral", "DeepseekV3", "Glm4Moe", "Olmoe", "MiniMax"]
IDS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(16) < torch.tensor([16, 9, 12, 3]).unsqueeze(1)).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def adapted(name, r=2, **changes):
    experts = PARAMETERS.get(name, "mlp.experts")
    config = LoraConfig(
        r=r,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=[f"{experts}.gate_up_proj", f"{experts}.down_proj"],
        **changes,
    )
    return get_peft_model(make(name), config)


def views(model):
    return [view for view in lora_layers(model) if view.parameter_name is not None]


class Recorder:
    """The reference: every expert by itself in plain torch, its input rows and their output gradients kept."""

    def __init__(self, model):
        self.inputs, self.outputs, self.names = {}, {}, {}
        for view in views(model):
            base = view.module
            while hasattr(base, "parameter_name"):
                base = base.base_layer
            self.names[base, view.module.parameter_name] = view.name

    def __call__(self, module, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for token in range(hidden.shape[0]):
            for choice in range(index.shape[1]):
                expert = int(index[token, choice])
                inner = self.product(module, "gate_up_proj", hidden[token], expert, token)
                inner = module._apply_gate(inner.unsqueeze(0)).squeeze(0)
                out = self.product(module, "down_proj", inner, expert, token) * weights[token, choice]
                result = result.index_add(0, torch.tensor([token]), out.unsqueeze(0))
        return result

    def product(self, module, parameter, x, expert, token):
        weight = getattr(module, parameter)[expert]
        y = (weight.mT if module.is_transposed else weight) @ x
        if module.has_bias:
            y = y + getattr(module, f"{parameter}_bias")[expert]
        key = f"{self.names[module, parameter].replace('.base_layer', '')}.{parameter}.{expert}"
        self.inputs.setdefault(key, []).append((token, x.detach().double()))
        if y.requires_grad:
            y.register_hook(lambda g: self.outputs.setdefault(key, []).append((token, x.detach().double(), g.double())))
        return y


def reference(model, monkeypatch):
    """Sums by expert of the counted tokens of BATCH: x x^T, the gradient of the summed loss, counts."""
    recorder = Recorder(model)
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS, "recorded", recorder)
    config = model.get_base_model().config
    before, config._experts_implementation = config._experts_implementation, "recorded"
    with model.disable_adapter():
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        items = int((BATCH["labels"][:, 1:] != -100).sum())
        (model(**BATCH).loss * items).backward()
    config._experts_implementation = before
    counted = MASK.reshape(-1).bool()
    sums = {}
    for key, rows in recorder.inputs.items():
        x = [value for token, value in rows if counted[token]]
        outputs = [(value, g) for token, value, g in recorder.outputs.get(key, ()) if counted[token]]
        gradient = sum(torch.outer(g, value) for value, g in outputs) if outputs else None
        sums[key] = (sum(torch.outer(value, value) for value in x) if x else None, gradient, len(x))
    return sums, items


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_routed_rows(name, monkeypatch):
    model = adapted(name)
    twin = copy.deepcopy(model)
    statistics = lk.collect(model, [BATCH], wants=("input_second", "gradient", "fisher"), progress=False)
    expected, items = reference(twin, monkeypatch)
    experts = [view.module.num_experts for view in views(model)]
    keys = [key for key in statistics if ".experts." in key]
    assert len(keys) == sum(experts) and set(expected) <= set(keys)
    reached = 0
    for key in keys:
        second, gradient, count = expected.get(key, (None, None, 0))
        assert statistics[key].tokens == count
        if count == 0:
            continue
        reached += 1
        assert relative_error(statistics[key].input.covariance(center=False) * count, second) < 1e-5
        assert relative_error(statistics[key].gradient() * items, gradient) < 1e-4
    assert reached >= 4
    # All is as it was, and the experts run as ever.
    assert torch.equal(logits(model), logits(adapted(name)))
    assert all(type(module.config).__name__ != "OtherConfig" for module in model.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_accelerated_experts_are_observed_alike(implementation):
    plain = adapted("Qwen3Moe")
    fast = copy.deepcopy(plain)
    fast.get_base_model().config._experts_implementation = implementation
    lk.accelerate(fast)
    one, other = (lk.collect(model, [BATCH], progress=False) for model in (plain, fast))
    for key in one:
        if one[key].tokens:
            assert relative_error(other[key].input.covariance(), one[key].input.covariance()) < 1e-5


def test_samples_may_count_alike():
    """`weighting="sample"`: each routed row has the factor of its sample."""
    model = adapted("Qwen3Moe")
    whole = lk.collect(model, [BATCH], wants="gradient", weighting="sample", progress=False)
    alone = [
        lk.collect(
            model,
            [{key: value[sample : sample + 1] for key, value in BATCH.items()}],
            wants="gradient",
            weighting="sample",
            progress=False,
        )
        for sample in range(4)
    ]
    compared = 0
    for key in whole:
        if ".experts." in key and whole[key].tokens:
            parts = [each[key].gradient() for each in alone if each[key].has_gradient]
            assert relative_error(whole[key].gradient(), sum(parts) / 4) < 1e-4
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_expert_starts_as_a_layer_of_its_own(name, method):
    """The method on a plain layer with the statistics of one expert gives that expert's part of PEFT's matrices."""
    model = adapted(name)
    chosen = METHODS[method]()
    wants = method if chosen.wants else "input_second"
    statistics = lk.collect(model, [BATCH], wants=wants, progress=False, sketch_size=64)
    given = statistics if chosen.wants else None
    report = lk.initialize(model, None, chosen, statistics=given, progress=False)
    compared = 0
    for view in views(model):
        layers = expert_layers(view.name, view.module)
        status = {layer.name: layer for layer in report}[view.name]
        assert status.status == "initialised" and "experts initialised" in status.notes[0]
        for key, layer in layers.items():
            if statistics[key].tokens < 2:
                continue
            base = {key: _base(layer)}
            alone = chosen.factors(statistics, {key: 2}, base=base)[key]
            if alone.solver == "stock":
                continue
            product = alone.factors.B.double() @ alone.factors.A.double()
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            if method == "eva":
                assert not b.any()
                assert relative_error(a.mT @ a, alone.factors.A.double().mT @ alone.factors.A.double()) < 1e-4
            else:
                assert relative_error(b @ a, product) < 1e-4
            # What PEFT adds to the parameter is this product.
            delta = view.module.get_delta_weight("default")[layer.expert].double()
            delta = delta.mT if layer.transposed else delta
            scaling = view.module.scaling["default"]
            if chosen.offsets_base:  # at the start the frozen part takes all of it off
                assert delta.abs().max() < 1e-6 * scaling * (b @ a).abs().max()
            elif b.any():
                assert relative_error(delta, scaling * b @ a) < 1e-5
            compared += 1
    assert compared >= 6


def _base(layer):
    from lora_kernels.init.problem import BaseLayer  # noqa: PLC0415

    return BaseLayer(lambda: layer.get_base_layer().weight.float(), layer.scaling["default"])


@pytest.mark.parametrize("method", ["eva", "lora_one"])
def test_a_started_adapter_saves_and_loads(tmp_path, method):
    model = adapted("Qwen3Moe")
    lk.initialize(model, [BATCH] * 2, method, progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert relative_error(logits(PeftModel.from_pretrained(make("Qwen3Moe"), tmp_path)), expected) < 1e-6
    assert torch.equal(logits(lk.load(make("Qwen3Moe"), tmp_path)), expected)


def test_experts_that_no_token_reaches_keep_their_values():
    model = adapted("Qwen3Moe")
    before = {view.name: view.module.lora_A["default"].weight.clone() for view in views(model)}
    few = {"input_ids": IDS[:1, :1]}
    with pytest.warns(RuntimeWarning, match="does not reach"):
        report = lk.initialize(model, [few], "eva", progress=False)
    for view in views(model):
        row = {layer.name: layer for layer in report}[view.name]
        assert "keep their values" in " ".join(row.notes)
        changed = 0
        for layer in expert_layers(view.name, view.module).values():
            old = before[view.name]
            rank = old.shape[0] // view.module.num_experts
            if layer.direct:
                same = torch.equal(layer.lora_A["default"].weight, old[layer.expert * rank : (layer.expert + 1) * rank])
                changed += not same
        assert changed <= 2  # the experts of one token


def test_experts_that_saw_fewer_tokens_than_their_rank_are_counted():
    model = adapted("Qwen3Moe", r=8)
    few = {"input_ids": IDS[:1, :6]}
    statistics = lk.collect(model, [few], progress=False)
    report = lk.initialize(model, None, "eva", statistics=statistics, progress=False, unreached="warn")
    for view in views(model):
        tokens = [statistics[name].tokens for name in expert_layers(view.name, view.module)]
        expected = sum(0 < count < 8 for count in tokens)
        notes = {layer.name: layer.notes for layer in report}[view.name]
        assert expected and f"{expected} saw fewer tokens than their rank" in notes


def test_what_leaves_experts_as_they_are_is_said():
    model = adapted("Qwen3Moe")
    report = lk.initialize(model, None, "pissa", base="mutate", progress=False)
    reasons = {layer.name: layer.notes for layer in report if layer.status == "unsupported"}
    assert set(reasons) == {view.name for view in views(model)}
    assert all("mutate" in notes[0] for notes in reasons.values())
    model = adapted("Qwen3Moe")
    report = lk.initialize(model, [BATCH], EVA(rho=2.0), progress=False)
    reasons = [layer.notes[0] for layer in report if layer.status == "unsupported"]
    assert len(reasons) == 4 and all("one rank for all" in reason for reason in reasons)


def nudge(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_frozen_start_of_experts_is_one_with_the_adapter(name, implementation):
    """Accelerated, merged, unmerged, scaled, disabled, copied and deleted, it is what PEFT's own layers compute."""
    model = adapted(name)
    before = logits(model)
    lk.initialize(model, [BATCH] * 2, "lora_ga", progress=False)
    assert relative_error(logits(model), before) < 1e-5
    frozen = {key: value.clone() for key, value in model.named_buffers() if ".lora_start." in key}
    assert len([key for key in frozen if ".experts." in key]) == 2 * len(views(model))
    nudge(model)
    fast = copy.deepcopy(model)
    fast.get_base_model().config._experts_implementation = implementation
    lk.accelerate(fast)
    gradients = []
    for each in (model, fast):
        each.train()
        each(**BATCH).loss.backward()
        gradients.append({key: value.grad for key, value in each.named_parameters() if value.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) and any(".experts." in key for key in gradients[0])
    for key, value in gradients[0].items():
        assert relative_error(gradients[1][key], value) < 1e-4, key
    expected = logits(model)
    assert relative_error(logits(fast), expected) < 1e-5 < relative_error(expected, before)
    for each in (model, fast):
        each.merge_adapter()
        assert relative_error(logits(each), expected) < 1e-5
        each.unmerge_adapter()
        assert relative_error(logits(each), expected) < 1e-5
        with each.disable_adapter():
            assert relative_error(logits(each), before) < 1e-5
        for view in lora_layers(each):
            view.module.set_scale("default", 2.0)
    assert relative_error(logits(fast), logits(model)) < 1e-5 < relative_error(logits(model), expected)
    for key, value in model.named_buffers():
        assert key not in frozen or torch.equal(value, frozen[key])
    model.add_adapter("other", model.peft_config["default"].__class__(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert relative_error(logits(model), before) < 1e-5
    assert not any(".lora_start." in key for key, _ in model.named_buffers())


def test_the_plan_counts_every_expert():
    model = adapted("Qwen3Moe")
    plan = lk.plan(model, "eva", batch=BATCH)
    names = [name for entry in plan.entries for name in entry.layers]
    assert sum(".experts." in name for name in names) == sum(view.module.num_experts for view in views(model))
    n, expert = 32, next(entry for entry in plan.entries if ".experts.gate_up_proj.0" in entry.layers[0])
    assert expert.bytes >= 4 * n * n


def test_what_cannot_be_seen_is_named():
    llama4 = adapted("Llama4Text")
    assert all(
        "registry" in why_unseen(view.module, "default") or "routes" in why_unseen(view.module, "default")
        for view in views(llama4)
    )
    report = lk.initialize(llama4, [BATCH], "eva", progress=False)
    assert {layer.status for layer in report if "experts" in layer.name} == {"unsupported"}


def test_a_failing_pass_puts_the_config_back():
    model = adapted("Qwen3Moe")
    configs = {module: module.config for module in model.modules() if hasattr(module, "config")}
    layer = next(iter(expert_layers(*views(model)[0]).values()))
    with pytest.raises(KeyError), observed([layer]):
        raise KeyError
    assert all(module.config is config for module, config in configs.items())
