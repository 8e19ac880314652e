"""Qwen3-Next under `all-linear`: linear attention, experts of one parameter, and shared experts beside them.

PEFT from 0.20 takes the shared experts' `gate_proj`, `up_proj` and `down_proj` for the experts', and leaves them
without an adapter, which is said; without its conversion they have one.
"""

import copy
import json

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model

import lora_kernels as lk
from lora_kernels import cli
from lora_kernels.adapters.layers import left_out_by_peft
from lora_kernels.adapters.view import lora_layers
from lora_kernels.init import METHODS
from tests.adapters.start_models import nudge
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="experts are modules there")
CONVERTS = Version(peft.__version__) >= Version("0.20")
IDS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(16) < torch.tensor([16, 9, 12, 3]).unsqueeze(1)).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = ("gate_proj", "up_proj", "down_proj")


def config():
    return transformers.Qwen3NextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=20, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def bare():
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM(config()).eval()


def whole(monkeypatch, r=2):
    """Adapters on all linear layers and experts, as PEFT before 0.20 makes them."""
    if CONVERTS:
        from peft.utils import transformers_weight_conversion as conversion  # noqa: PLC0415

        monkeypatch.setattr(conversion, "_convert_peft_config_moe", lambda *_: None)
    return get_peft_model(
        bare(), LoraConfig(r=r, lora_alpha=6, target_modules="all-linear", target_parameters=PARAMETERS)
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=MASK).logits


def shared_layers(model):
    return {view.name: view for view in lora_layers(model) if ".shared_expert." in view.name}


def test_statistics_of_shared_experts_are_those_of_all_tokens(monkeypatch):
    model = whole(monkeypatch)
    names = shared_layers(model)
    assert len(names) == 6
    statistics = lk.collect(model, [BATCH], wants=("input_second", "gradient"), progress=False)
    inputs, outputs = {}, {}
    with model.disable_adapter():
        handles = []
        for name, view in names.items():
            layer = view.module.get_base_layer()
            handles.append(layer.register_forward_hook(lambda _, args, y, name=name: note(name, args[0], y)))

        def note(name, x, y):
            inputs[name] = x.detach().reshape(-1, x.shape[-1]).double()
            y.retain_grad()
            outputs[name] = y

        items = int((BATCH["labels"][:, 1:] != -100).sum())
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        (model.eval()(**BATCH).loss * items).backward()
        for handle in handles:
            handle.remove()
    counted = MASK.reshape(-1).bool()
    for name in names:
        layer, x = statistics[name], inputs[name][counted]
        assert layer.tokens == int(counted.sum())
        assert relative_error(layer.input.covariance(center=False) * len(x), x.mT @ x) < 1e-5
        g = outputs[name].grad.reshape(-1, outputs[name].shape[-1]).double()[counted]
        assert relative_error(layer.gradient() * items, g.mT @ x) < 1e-4
    # gate_proj, up_proj and the gate read one tensor, the module's input.
    plan = lk.plan(model, "eva", batch={"input_ids": IDS, "attention_mask": MASK})
    groups = [{name.rpartition("mlp.")[2] for name in entry.layers} for entry in plan.entries]
    assert (
        sum({"shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert_gate"} <= group for group in groups)
        == 2
    )


@pytest.mark.parametrize("method", METHODS)
def test_shared_experts_start_save_and_run_fused(tmp_path, monkeypatch, method):
    model = whole(monkeypatch)
    before = logits(model)
    report = lk.initialize(model, None if method == "pissa" else [BATCH] * 2, method, progress=False)
    if not METHODS[method].moves_function:
        assert relative_error(logits(model), before) < 1e-5
    status = {layer.name: layer for layer in report}
    for name in shared_layers(model):
        assert status[name].status == "initialised"
    narrow = [layer for layer in report if layer.name.endswith("shared_expert_gate")]
    assert [layer.status for layer in narrow] == ["unsupported"] * 2 and "min(m, n) = 1" in narrow[0].notes[0]
    nudge(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert relative_error(logits(PeftModel.from_pretrained(bare(), tmp_path / folder)), expected) < 1e-5
    assert torch.equal(logits(lk.load(bare(), tmp_path / "saved")), expected)
    fast = copy.deepcopy(model)
    lk.accelerate(fast)
    gradients = []
    for run in (model, fast):
        assert relative_error(logits(run), expected) < 1e-5
        run(**BATCH).loss.backward()
        gradients.append({name: value.grad for name, value in run.named_parameters() if ".shared_expert." in name})
    for name, value in gradients[0].items():
        assert value is None or relative_error(gradients[1][name], value) < 1e-4


@pytest.mark.skipif(not CONVERTS, reason="PEFT leaves names of modules as they are")
def test_shared_experts_that_peft_leaves_out_are_named(tmp_path, capsys):
    model = get_peft_model(bare(), LoraConfig(r=2, target_modules="all-linear"))
    assert not shared_layers(model)
    expected = "6 linear layers have no adapter (first: base_model.model.model.layers.0.mlp.shared_expert.gate_proj)"
    assert left_out_by_peft(model, "default").startswith(expected)
    report = lk.initialize(model, [BATCH], "eva", progress=False)
    assert any(sentence.startswith(expected) for sentence in report.advice) and expected in str(report)
    file = tmp_path / "config.json"
    config().to_json_file(file)
    assert cli.main(["plan", "--config", str(file), "--method", "eva", "--task", "causal-lm", "--rank", "2"]) == 0
    assert "left out: 6 linear layers have no adapter" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(not CONVERTS, reason="PEFT leaves names of modules as they are")
def test_what_a_user_left_out_is_not_named(monkeypatch):
    model = get_peft_model(bare(), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS))
    assert left_out_by_peft(model, "default") is None
    assert left_out_by_peft(whole(monkeypatch), "default") is None
    qwen = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8, num_experts=4,
            moe_intermediate_size=24, num_experts_per_tok=2,
        )
    )  # fmt: skip
    model = get_peft_model(qwen, LoraConfig(r=2, target_modules="all-linear"))
    assert left_out_by_peft(model, "default") is None
    assert json.loads(lk.plan(model, "eva").to_json())["passes"] == 1
