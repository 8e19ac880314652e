"""What servers of LoRA adapters read of a folder, and what they refuse: functions of its config and tensors alone.

They read adapter_config.json and the tensors, and follow PEFT's rules only in part:

- vLLM (`vllm/lora/peft_helper.py`, `vllm/config/lora.py`): one scaling for all layers, `lora_alpha / r` or
  `lora_alpha / sqrt(r)` of the config's own values; patterns are dropped. It allocates for `--max-lora-rank`.
- SGLang (`python/sglang/srt/lora/lora.py`, `mem_pool.py`): `lora_alpha / r`; no rsLoRA, and a tensor must be of the
  config's r. (Its newest `lora_config.py` also reads patterns; what is said here holds for versions before that.)
- llama.cpp (`convert_lora_to_gguf.py`, `src/llama-adapter.h`): `lora_alpha / rank` by tensor; no rsLoRA, no
  patterns, and an alpha of 0 means a scaling of 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora_kernels.adapters.names import of_pattern, scaling_of
from lora_kernels.reports import PREFIX

_SERVERS = {  # their names, and what they take for the scaling
    "vllm": ("vLLM", "one alpha/r, patterns are ignored"),
    "sglang": ("SGLang", "one alpha/r, no rsLoRA"),
    "llama.cpp": ("llama.cpp", "alpha / rank of each tensor, no rsLoRA or patterns"),
}
# `MaxLoRARanks` of vLLM's vllm/config/lora.py, less 1, which no adapter of a useful rank fits.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_EXPORT = "write it with lora_kernels.export(model, path, serving=True)"
MERGE = "merge the adapter instead (model.merge_and_unload()) and serve the merged model"
_EXPERTS = "target_parameters (experts)"
# What they do with PEFT's layout of experts: vLLM's `FusedMoE3DWithLoRA` (`is_3d_moe_weight` of its models,
# vllm/lora/model_manager.py, `_stack_moe_lora_weights`); SGLang knows no such name; llama.cpp's converter neither.
_OF_EXPERTS = (
    "vLLM alone reads experts, for models whose experts it keeps in one tensor (gpt-oss, Qwen3-VL-MoE, Qwen3.5-MoE and "
    "others with is_3d_moe_weight), where all layers have one rank and one alpha, and gate_up_proj and down_proj are "
    "both adapted: a plain export (serving=False) is what it loads then; SGLang leaves experts out without an error, "
    "and llama.cpp's converter stops at them"
)
# Settings of the config that make more of an adapter than s B A of linear layers.
_SETTINGS = {
    "modules_to_save": "modules_to_save",
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": _EXPERTS,
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "arrow_config": "Arrow",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


def refusals(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Features of an adapter that vLLM, SGLang and llama.cpp do not compute, from its config and tensor shapes."""
    refused = [word for name, word in _SETTINGS.items() if config.get(name)]
    if (config.get("bias") or "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if any(".lora_embedding_" in name for name in shapes):
        refused.append("embeddings")
    if any(".lora_A." in name and len(shape) != 2 for name, shape in shapes.items()):
        refused.append("convolutions")
    others = [name for name in shapes if ".lora_A.weight" not in name and ".lora_B.weight" not in name]
    if others and not refused:
        refused.append(f"the tensor {others[0]}")
    return refused


def words(refused: Iterable[str]) -> str:
    """What is refused, what to do instead, and which server makes an exception."""
    refused = list(refused)
    return f"{', '.join(refused)}: {MERGE}" + (f" ({_OF_EXPERTS})" if refused == [_EXPERTS] else "")


def slot(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that holds a rank."""
    if (fitting := next((limit for limit in VLLM_RANKS if limit >= rank), None)) is None:
        raise ValueError(
            f"the adapter has a layer of rank {rank}, but vLLM's --max-lora-rank ends at {VLLM_RANKS[-1]}: cut it "
            f"(rank={VLLM_RANKS[-1]}), or {MERGE}"
        )
    return fitting


def differences(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, int]:
    """By server, the number of layers in which it scales `B A` differently from PEFT; `ranks` by layer."""
    r, alpha, rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    counts = dict.fromkeys(_SERVERS, 0)
    for name, rank in ranks.items():
        if not rank:
            continue
        own = scaling_of(of_pattern(config.get("alpha_pattern"), name.removeprefix(PREFIX), alpha), rank, rslora)
        served = scaling_of(alpha, r, rslora), alpha / r, alpha / rank if alpha else 1.0
        for server, scaling in zip(_SERVERS, served, strict=True):
            counts[server] += not math.isclose(own, scaling, rel_tol=1e-6, abs_tol=1e-12)
    return counts


def notes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Sentences on what vLLM, SGLang and llama.cpp need for an adapter folder, get wrong, or refuse."""
    refused = refusals(config, {name: shape for name, shape in shapes.items() if ".lora_dash." not in name})
    if refused:
        return [f"servers (vLLM, SGLang, llama.cpp) do not compute {words(refused)}"]
    if any(".lora_dash." in name for name in shapes):
        return [f"servers (vLLM, SGLang, llama.cpp): refused, for what LoRA-Dash needs to go on training: {_EXPORT}"]
    ranks = {name.partition(".lora_A.")[0]: shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    highest, wrong = max(ranks.values()), differences(config, ranks)
    problems = {name: [f"other numbers in {count} of {len(ranks)} layers"] for name, count in wrong.items() if count}
    if highest > config["r"]:
        problems.setdefault("vllm", []).append(f"it takes r={config['r']} for the rank, but a layer has {highest}")
    if any(rank != config["r"] for rank in ranks.values()):
        problems.setdefault("sglang", []).append("it refuses layers of several ranks")
    if isinstance(config.get("target_modules"), str):
        problems.setdefault("sglang", []).append("it refuses an expression for target_modules")
    sentences = []
    for server, (shown, why) in _SERVERS.items():
        if server in problems:
            sentences.append(f"{shown}: {'; '.join(problems[server])} ({why}): {_EXPORT}")
        elif server == "vllm" and highest > VLLM_RANKS[-1]:
            largest = VLLM_RANKS[-1]
            sentences.append(f"vLLM: rank {highest} is above the largest --max-lora-rank, {largest}: export(rank=...)")
        elif server == "vllm":
            sentences.append(f"vLLM: --max-lora-rank {slot(highest)}")
        elif server == "sglang":
            sentences.append(f"SGLang: --max-lora-rank {highest} or more")
        else:
            sentences.append("llama.cpp: convert_lora_to_gguf.py takes it as it is")
    return sentences


def common(scalings: Iterable[float]) -> float:
    """The scaling to write for all layers: the most frequent one, so that most B stay bit for bit; never 0."""
    counts = Counter(scaling for scaling in scalings if scaling != 0)
    return counts.most_common(1)[0][0] if counts else 1.0
