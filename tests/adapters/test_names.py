"""Rank and alpha patterns, whatever the names: stock PEFT rebuilds every layer with its own values."""

import copy
import json
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_kernels as lk
from lora_kernels.adapters.layers import is_tied, places
from lora_kernels.adapters.names import config_name, matches, patterns
from tests.adapters.start_models import nudge

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS, "labels": IDS}


class Config:
    def __init__(self, r=4, lora_alpha=8, rank_pattern=None, alpha_pattern=None):
        self.r, self.lora_alpha = r, lora_alpha
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}


def read(pattern, name, default):
    """As PEFT reads a file, whose keys are sorted."""
    keys = sorted(pattern)
    return pattern.get(get_pattern_key(keys, name), default)


NAMES = [
    "q",
    "a.q",
    "b.a.q",
    "b.a.qq",
    "x.q+y",
    "x.q",
    "x[0].q",
    "layers.1.q",
    "layers.11.q",
    "layersx1.q",
    "r",
    "a(b",
    "a",
]


@pytest.mark.parametrize("seed", range(40))
def test_every_layer_is_read_with_its_own_values(seed):
    chance = random.Random(seed)
    names = chance.sample(NAMES, chance.randint(1, len(NAMES)))
    layers = {name: (chance.choice((2, 4, 6)), chance.choice((8, 3.5))) for name in names}
    users = {chance.choice(["q", "a.q", "layers.1.*q", "x.*", "r", "no", "a(b"]): chance.choice((2, 4, 6))}
    config = Config(rank_pattern=users)
    ranks, alphas = patterns(layers, config)
    for name, (rank, alpha) in layers.items():
        assert read(ranks, name, config.r) == rank and read(alphas, name, config.lora_alpha) == alpha
        for pattern in (ranks, alphas):  # no match is another's
            assert len({pattern[key] for key in pattern if matches(key, name)}) <= 1
    assert 4 not in ranks.values() and 8 not in alphas.values()


def test_keys_of_the_user_stay_where_they_are_true():
    layers = {f"layers.{number}.{name}": (2 if name == "q" else 4, 8) for number in range(3) for name in "qv"}
    ranks, alphas = patterns(layers, Config(rank_pattern={"q": 2}))
    assert (ranks, alphas) == ({"q": 2}, {})
    doubled = {name: (2 * rank, 2 * alpha) for name, (rank, alpha) in layers.items()}
    assert patterns(doubled, Config(8, 16, {"q": 2}))[0] == {"q": 4}
    layers["layers.1.q"] = (6, 8)
    ranks, _ = patterns(layers, Config(rank_pattern={"q": 2}))
    assert ranks == {"layers.0.q": 2, "layers.1.q": 6, "layers.2.q": 2}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.a = nn.Linear(16, 16), nn.ModuleDict({"q": nn.Linear(16, 16), "q-x": nn.Linear(16, 16)})
        self.b = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(16, 16)})})

    def forward(self, x):
        return self.q(x) + self.a["q"](x.relu()) + self.a["q-x"](x.abs()) + self.b["a"]["q"](x[:, :1].expand(-1, 16))


@pytest.mark.parametrize("method", [lk.init.EVA(rho=3.0, min_rank=1), lk.init.EVA(rho=3.0, min_rank=0), "pissa"])
def test_names_that_are_tails_of_others(tmp_path, method):
    targets = ["q", "a.q-x"]
    model = get_peft_model(Nested(), LoraConfig(r=4, target_modules=targets, alpha_pattern={"a.q": 2}))
    data = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    lk.initialize(model, data, method=method, forward=lambda net, x: net(x), progress=False, unreached="raise")
    nudge(model)
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "exported")
    for name in ("saved", "exported"):
        read_again = PeftModel.from_pretrained(Nested(), tmp_path / name)
        torch.testing.assert_close(read_again(data[0]), model(data[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lk.load(Nested(), tmp_path / "saved")(data[0]), model(data[0]), rtol=0, atol=0)


def qwen():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes, num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            vocab_size=61,
        )
    ).eval()  # fmt: skip


def mixtral():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=61)).eval()


EXPERTS = {
    "parameters": (
        qwen,
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "alpha_pattern": {"experts.down_proj": 2},
            "rank_pattern": {"experts.gate_up_proj": 2, "layers.1.self_attn.q_proj": 3},
        },
    ),
    "all-linear": (mixtral, {"target_modules": "all-linear"}),
}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("method", ["eva", "lora_ga", "pissa"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_go_by_the_paths_of_their_parameters(tmp_path, kind, method):
    make, settings = EXPERTS[kind]
    model = get_peft_model(make(), LoraConfig(r=4, lora_alpha=8, **copy.deepcopy(settings)))
    names = [config_name(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if method == "lora_ga" and any(name.endswith("block_sparse_moe.gate") for name in names):
        pytest.skip("transformers 4 has routers as linear layers, of fewer outputs than LoRA-GA needs")
    assert len(set(names)) == len(names) and not any("base_layer" in name for name in names)
    before = logits(model)
    lk.initialize(model, [BATCH] * 2, method=method, progress=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    nudge(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.05
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "exported")
    for name in ("saved", "exported"):
        stock = PeftModel.from_pretrained(make(), tmp_path / name)
        torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(lk.load(make(), tmp_path / "saved")), expected)


def llama(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=61, **more)).eval()


def test_an_export_lists_its_modules(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj"))
    nudge(model)
    lk.export(model, tmp_path / "all")
    assert sorted(json.loads((tmp_path / "all" / "adapter_config.json").read_text())["target_modules"]) == [
        "q_proj",
        "v_proj",
    ]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "all")), logits(model))
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=r".*layers\.1\.self_attn\.q_proj"))
    nudge(model)
    lk.export(model, tmp_path / "one")
    listed = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert listed == ["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "one")), logits(model))


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_tied_factors_are_left_as_they_are(tmp_path, method):
    targets = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=4, **targets))
    head = model.base_model.model.lm_head
    if not is_tied(head.lora_B["default"].weight, places(model)):
        pytest.skip("this PEFT ties no factors")
    report = lk.initialize(model, [BATCH], method=method, progress=False)
    head = next(layer for layer in report.layers if layer.name.endswith("lm_head"))
    assert head.status == "unsupported" and "those of another layer" in head.notes[0]
    nudge(model)
    model.save_pretrained(tmp_path)
    read_again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(logits(read_again), logits(model), rtol=1e-4, atol=1e-5)


def test_a_tied_base_is_not_mutated():
    model = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    before = logits(model)
    with pytest.raises(ValueError, match='lm_head has a base weight that another layer has, too: only base="intact"'):
        lk.initialize(model, method="pissa", base="mutate", progress=False)
    assert torch.equal(logits(model), before)
    lk.initialize(model, method="pissa", progress=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
