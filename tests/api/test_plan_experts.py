"""`lora-kernels plan` for mixtures, from configs alone: what sums of experts take, and what of them is sketched."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from lora_kernels import cli
from lora_kernels.api import transformers as models

pytestmark = pytest.mark.skipif(Version(transformers.__version__).major < 5, reason="experts are modules there")

# The widths of Qwen3-30B-A3B and of gpt-oss-20b, of fewer layers.
CONFIGS = {
    "Qwen3Moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8,
    },
    "GptOss": {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
}  # fmt: skip
# Experts, inputs and outputs of gate_up_proj and down_proj; k.
SHAPES = {"Qwen3Moe": (128, (2048, 1536), (768, 2048), 8), "GptOss": (32, (2880, 5760), (2880, 2880), 4)}


@pytest.fixture(params=CONFIGS)
def config(request, tmp_path):
    made = getattr(transformers, f"{request.param}Config")(**CONFIGS[request.param])
    made.architectures = [f"{request.param}ForCausalLM"]
    file = tmp_path / "config.json"
    made.to_json_file(file)
    return request.param, file


def plan(file, capsys, *options):
    assert cli.main(["plan", "--config", str(file), *options]) == 0
    return capsys.readouterr()


def of_experts(entries, statistic, parameter):
    return [
        entry for entry in entries if entry["statistic"] == statistic and f".experts.{parameter}." in entry["layers"][0]
    ]


def test_every_expert_has_exact_sums_where_they_fit(config, capsys):
    name, file = config
    printed = plan(file, capsys, "--method", "lora_da", "--json")
    assert "forward pass without weights failed" not in printed.err
    written = json.loads(printed.out)
    experts, *shapes, _ = SHAPES[name]
    for parameter, (n, m) in zip(("gate_up_proj", "down_proj"), shapes, strict=True):
        for statistic, size in (("input_second", 4 * (n * n + n) + 8), ("gradient", 4 * m * n + 8)):
            entries = of_experts(written["entries"], statistic, parameter)
            assert len(entries) == 2 * experts == len({entry["layers"][0] for entry in entries})
            assert {(entry["form"], entry["bytes"]) for entry in entries} == {("exact", size)}
    # Linear layers that read the same tensor are found without weights.
    shared = [entry["layers"] for entry in written["entries"] if entry["statistic"] == "input_second"]
    assert written["shared"] and sum(len(layers) == 3 for layers in shared) == 2
    assert written["total_bytes"] == sum(entry["bytes"] for entry in written["entries"])


@pytest.mark.parametrize(("rank", "columns"), [(16, 64), (48, 96)])
def test_sketches_are_chosen_and_said_and_follow_the_rank(config, capsys, rank, columns):
    name, file = config
    options = ("--method", "eva", "--budget", "1GB", "--rank", str(rank))
    written = json.loads(plan(file, capsys, *options, "--json").out)
    assert written["sketch_size"] == columns and max(written["pass_bytes"]) <= 10**9
    sketches = [entry for entry in written["entries"] if entry["form"] == "sketch"]
    experts, (n, m), (p, q), k = SHAPES[name]
    assert len(of_experts(sketches, "input_second", "gate_up_proj")) > 0
    text = plan(file, capsys, *options).out
    assert f"{len(sketches)} of {len(written['entries'])} sums are sketches of {columns} columns" in text
    assert "model.layers.*.mlp.experts.gate_up_proj.*" in text and "base_model" not in text
    assert f"experts: 4 parameters of {experts};" in text and f"{k} experts per token" in text
    inside = 2 * experts * rank * (m + n + p + q)
    assert f"{inside / 1e6:,.1f} M in experts (rank {rank // k}, which is r / k" in " ".join(text.split())


def test_forms_and_processes(config, capsys):
    name, file = config
    written = json.loads(plan(file, capsys, "--method", "gradient", "--form", "sketch", "--world", "8", "--json").out)
    forms = {entry["form"] for entry in of_experts(written["entries"], "gradient", "down_proj")}
    assert forms == {"sketch"} and written["communication"] > 0


def test_experts_that_cannot_be_observed_are_named(tmp_path, capsys):
    config = transformers.Llama4TextConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, interleave_moe_layer_step=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert models.expert_parameters(model) == []  # (it routes by itself: its parameters have no traits of experts)
    config.architectures = ["Llama4ForCausalLM"]
    file = tmp_path / "config.json"
    config.to_json_file(file)
    printed = plan(file, capsys, "--method", "eva")
    assert "not in this plan (experts that cannot be observed): 4 parameters, such as model.layers.0." in printed.err


def test_a_rank_below_one_is_refused(config, capsys):
    assert cli.main(["plan", "--config", str(config[1]), "--method", "eva", "--rank", "0"]) == 2
    assert "rank is 0" in capsys.readouterr().err


def test_the_model_is_not_built(config):
    """The whole command in a process of its own, which may not have the memory of the weights."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_DATA, (4 << 30, 4 << 30))"
    name, file = config
    script = f"{limit}; from lora_kernels import cli; cli.main(['plan', '--config', {str(file)!r}, '--method', 'eva'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0 and "experts: 4 parameters" in done.stdout, done.stderr
