"""What readers of a LoRA folder compute from it, each by its own arithmetic, on the saved tensors and config.

Each takes the folder and the base weights by layer.

Written anew from what the sources do; none of their code is here. A reader gives the change of every weight, or raises
`Refused` where the real one does.
"""

import json
import math
import re
from pathlib import Path

from safetensors.torch import load_file

PREFIX = "base_model.model."


class Refused(ValueError):
    """The reader does not load such a folder."""


def read(folder):
    """The config, and A and B by layer; everything else in the file by its key."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(str(Path(folder) / "adapter_model.safetensors"))
    factors, others = {}, {}
    for key, value in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            factors[name.removeprefix(PREFIX)] = (value, tensors[f"{name}.lora_B.weight"])
        elif not key.endswith(".lora_B.weight"):
            others[key] = value
    return config, factors, others


def peft(folder, base):
    """Stock PEFT, huggingface/peft, src/peft/tuners/lora/layer.py (`update_layer`), src/peft/utils/other.py.

    Rank and alpha by the first key of the patterns, a regular expression, that is the layer's name or its tail; the
    scaling is alpha / r, or alpha / sqrt(r) with rsLoRA. DoRA (lora/dora.py): rows of W + s B A of the norm m. Tensors
    that the model has no place for are passed over.
    """
    config, factors, others = read(folder)

    def of(pattern, name, default):
        return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    changes = {}
    for name, (a, b) in factors.items():
        rank, alpha = of(config["rank_pattern"], name, config["r"]), of(config["alpha_pattern"], name, None)
        alpha = config["lora_alpha"] if alpha is None else alpha
        if a.shape[0] != rank:
            raise Refused(f"size mismatch for {name}")
        changes[name] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
        if config["use_dora"]:
            weight, m = base[name], others[f"{PREFIX}{name}.lora_magnitude_vector"]
            total = weight + changes[name]
            changes[name] = (m / total.norm(dim=1)).unsqueeze(1) * total - weight
    return changes


def vllm(folder, _base, max_lora_rank=512):
    """vLLM, vllm-project/vllm, vllm/lora/peft_helper.py (`__post_init__`, `validate_legal`), vllm/lora/lora_model.py.

    One scaling of the config's own r and lora_alpha, rsLoRA or not; patterns are no fields that it keeps. It refuses
    modules_to_save, DoRA, a bias, r above --max-lora-rank, and tensors that are no A or B. A tensor of more rows than
    the slot cannot be copied into it (vllm/lora/layers/base_linear.py, `set_lora`).
    """
    config, factors, others = read(folder)
    if config["modules_to_save"] or config["use_dora"] or config["bias"] != "none" or others:
        raise Refused("modules_to_save, DoRA, bias or other tensors")
    if max(config["r"], *(len(a) for a, _ in factors.values())) > max_lora_rank:
        raise Refused(f"rank above {max_lora_rank}")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    return {name: scaling * b @ a for name, (a, b) in factors.items()}


def sglang(folder, _base):
    """SGLang, sgl-project/sglang, python/sglang/srt/lora/lora.py (`LoRAAdapter`), mem_pool.py, utils.py.

    lora_alpha / r of the config, without rsLoRA and patterns. Each tensor is copied into r rows of a slot, and must
    have as many (`load_lora_weight_tensor`); target_modules must be a list, or "all-linear".
    """
    config, factors, others = read(folder)
    if others or config["modules_to_save"] or config["use_dora"]:
        raise Refused("not only A and B of linear layers")
    if isinstance(config["target_modules"], str) and config["target_modules"] not in ("all", "all-linear"):
        raise Refused("an expression for target_modules")
    if any(len(a) != config["r"] for a, _ in factors.values()):
        raise Refused("a rank that is not r")
    return {name: config["lora_alpha"] / config["r"] * b @ a for name, (a, b) in factors.items()}


def llama_cpp(folder, _base):
    """llama.cpp, ggml-org/llama.cpp, convert_lora_to_gguf.py (`get_tensors`), src/llama-adapter.h (`get_scale`).

    lora_alpha over the rank of the tensor, or 1 where lora_alpha is 0; neither rsLoRA nor patterns are read. The
    conversion ends at tensors that are no A or B (norms apart).
    """
    config, factors, others = read(folder)
    if others:
        raise Refused(f"unexpected name {min(others)}")
    alpha = float(config["lora_alpha"])
    return {name: (alpha / b.shape[1] if alpha else 1.0) * b @ a for name, (a, b) in factors.items()}


READERS = {"PEFT": peft, "vLLM": vllm, "SGLang": sglang, "llama.cpp": llama_cpp}
