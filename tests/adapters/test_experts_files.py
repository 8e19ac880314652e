"""Adapters on the experts of every mixture that PEFT converts: what is saved and exported is the same function."""

import json

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lora_kernels as lk
from lora_kernels.adapters.view import lora_layers
from lora_kernels.init import METHODS
from tests.adapters.start_models import nudge
from tests.conftest import relative_error

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "DeepseekV3": {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "Glm4Moe": {**ROUTED, "n_group": 1, "topk_group": 1, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "MiniMax": {
        "num_local_experts": 4, "head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Llama4Text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
}  # fmt: skip
# Before, `all-linear` leaves out the experts of all, or these are modules.
CONVERTS = Version(peft.__version__) >= Version("0.20") and Version(transformers.__version__).major >= 5
PARAMETERS = {"GptOss": "mlp.experts", "Llama4Text": "feed_forward.experts"}  # `all-linear` leaves them out
IDS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(1))


def make(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()


def adapted(name):
    """Ranks and alphas of some experts' own, by keys that are tails of names; rsLoRA where parameters are named."""
    if name not in PARAMETERS:
        return get_peft_model(make(name), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    experts = PARAMETERS[name]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj"],
        target_parameters=[f"{experts}.gate_up_proj", f"{experts}.down_proj"],
        rank_pattern={f"{experts}.down_proj": 2},
        alpha_pattern={f"layers.1.{experts}.gate_up_proj": 3},
    )
    return get_peft_model(make(name), config)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_exported_experts_are_the_same_function(tmp_path, name, method):
    model = adapted(name)
    before = logits(model)
    data = None if method == "pissa" else [{"input_ids": IDS, "labels": IDS}] * 2
    report = lk.initialize(model, data, method, progress=False)
    if not METHODS[method].moves_function:
        assert relative_error(logits(model), before) < 1e-5
    experts = [view for view in lora_layers(model) if view.parameter_name is not None]
    status = {layer.name: layer.status for layer in report}
    assert (len(experts) >= 2) == (CONVERTS or name in PARAMETERS)
    # Llama 4 routes by itself, and before transformers 5 all do.
    started = name != "Llama4Text" and Version(transformers.__version__).major >= 5
    routed = [view for view in experts if view.parameter_name != "weight"]  # (routers are parameters, too)
    assert {status[view.name] for view in routed} <= {"initialised" if started else "unsupported"}
    assert "initialised" in status.values()
    nudge(model)
    expected = logits(model)
    assert relative_error(expected, before) > 0.02
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert relative_error(logits(PeftModel.from_pretrained(make(name), tmp_path / folder)), expected) < 1e-5
    assert torch.equal(logits(lk.load(make(name), tmp_path / "saved")), expected)
    # Every expert's part is in the file, and moves the function by far more than files may.
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert bool(config["target_parameters"]) == bool(experts)
    assert all(f"{view.name}.lora_B.weight" in tensors for view in experts)
    for view in experts:
        view.module.lora_B["default"].weight.data.zero_()
    assert not experts or relative_error(logits(model), expected) > 3e-4


def experts_alone(name, r=4):
    experts = PARAMETERS.get(name, "mlp.experts")
    names = [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    return get_peft_model(make(name), LoraConfig(r=r, lora_alpha=6, target_modules=[], target_parameters=names))


REGISTRY = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="experts are modules there")


@REGISTRY
@pytest.mark.parametrize("method", [None, "pissa", "lora_ga", "lora_one"])
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_an_adapter_of_experts_alone_is_exported(tmp_path, name, method):
    model = experts_alone(name)
    if method is not None:
        lk.initialize(model, None if method == "pissa" else [{"input_ids": IDS, "labels": IDS}], method, progress=False)
    nudge(model)
    expected = logits(model)
    written = lk.export(model, tmp_path)
    joined = 8 if method in ("pissa", "lora_ga") else 4
    assert [(layer.rank, layer.error) for layer in written.values()] == [(joined, 0.0)] * 4
    assert relative_error(logits(PeftModel.from_pretrained(make(name), tmp_path)), expected) < 1e-5
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == joined and not config["rank_pattern"] and not config["target_modules"]


@REGISTRY
@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_every_expert_is_cut_to_its_best_approximation(tmp_path, name):
    """`rank=` held for linear layers alone: a start of experts doubled what it was to cut."""
    model = experts_alone(name)
    lk.initialize(model, None, "pissa", progress=False)
    nudge(model)
    written = lk.export(model, tmp_path, rank=3)
    cut = PeftModel.from_pretrained(make(name), tmp_path)
    views = [view for view in lora_layers(model) if view.parameter_name is not None]
    for view, other in zip(views, lora_layers(cut), strict=True):
        assert other.rank("default") == 3 == written[view.name].rank
        errors = []
        pairs = zip(*(layer.module.get_delta_weight("default").double() for layer in (view, other)), strict=True)
        for whole, small in pairs:
            u, s, vh = torch.linalg.svd(whole)
            best = (u[:, :3] * s[:3]) @ vh[:3]
            assert relative_error(small, best) < 1e-4
            errors.append(float(s[3:].norm() / s.norm()))
        assert written[view.name].error == pytest.approx(max(errors), rel=1e-3) and max(errors) > 1e-2


@REGISTRY
def test_servers_that_read_experts_are_named_before_anything_is_written(tmp_path):
    model = experts_alone("GptOss")
    for serving in (True, "vllm", "llama.cpp"):
        with pytest.raises(ValueError, match=r"merge the adapter.*vLLM alone reads experts.*gpt-oss.*SGLang leaves"):
            lk.export(model, tmp_path / "out", serving=serving)
    assert not (tmp_path / "out").exists()


@REGISTRY
def test_a_plain_export_is_what_vllm_computes_of_experts(tmp_path):
    """`reshape(experts, -1, n)` of A and `reshape(m, -1, experts)` of B, gate_up_proj under `experts.base_layer`."""
    model = experts_alone("GptOss")
    lk.initialize(model, None, "pissa", progress=False)
    nudge(model)
    lk.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for view in lora_layers(model):
        assert view.name.endswith(".base_layer") == (view.parameter_name == "gate_up_proj")
        a, b = (tensors[f"{view.name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        change = scaling * b.reshape(b.shape[0], -1, 4).permute(2, 0, 1) @ a.reshape(4, -1, a.shape[1])
        expected = view.module.get_delta_weight("default")
        direct = change.shape == expected.shape and relative_error(change, expected) < 1e-4
        assert direct or relative_error(change.mT, expected) < 1e-4
