"""A full training step of a Llama in bfloat16: PEFT's layers against accelerated ones."""

from __future__ import annotations

import copy
from typing import Any

import torch

import lora_kernels as lk
from benchmarks import lora_layers
from benchmarks.gpu import timing
from benchmarks.gpu.part import Run

RANK, DROPOUT = 16, 0.05
FULL = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def training(run: Run) -> None:
    """Adapters in bfloat16 and in float32 (PEFT's default), without dropout and with it."""
    batch, length = run.pick((4, 2048), (2, 12))
    cases = [("bfloat16", DROPOUT), ("float32", DROPOUT), ("bfloat16", 0.0), ("float32", 0.0)]
    run.each(
        [
            {"adapters": adapters, "dropout": dropout, "batch": batch, "length": length, "rank": RANK}
            for adapters, dropout in cases[: run.pick(4, 2)]
        ],
        _step,
    )
    run.record["model"] = run.pick(FULL, TINY)


def _stock(run: Run, adapters: str, dropout: float, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(run.device):
        base = LlamaForCausalLM(LlamaConfig(**run.pick(FULL, TINY))).to(torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules="all-linear")
    model: Any = get_peft_model(base, config, autocast_adapter_dtype=adapters == "float32")  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _step(run: Run, adapters: str, dropout: float, batch: int, length: int, rank: int) -> dict[str, Any]:
    models = {"peft": _stock(run, adapters, dropout, rank)}
    models |= {
        "ours": lora_layers.shared_copy(models["peft"]),
        "hand_written": lora_layers.hand_written(models["peft"]),
    }
    lk.accelerate(models["ours"], strict=True, guard=False)
    vocabulary = run.pick(FULL, TINY)["vocab_size"]
    ids = torch.randint(vocabulary, (batch, length), device=run.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    few = {name: each[:1, : run.pick(256, length)] for name, each in given.items()}
    report = lk.verify(models["ours"], few)  # layer by layer, beside PEFT's errors against float64
    print(report)
    exact = copy.deepcopy(models["peft"]).float().eval()
    with torch.no_grad():
        truth = float(exact(**few).loss)
        losses = {name: float(model.eval()(**few).loss) for name, model in models.items()}
    del exact
    errors = {name: abs(loss - truth) / truth for name, loss in losses.items()}
    # One number whose rounding errors cancel by chance: the layers were checked above, this is for gross errors.
    errors["allowed"] = max(errors["peft"], 2e-3)
    for model in models.values():
        model.enable_input_require_grads()
        model.train()
    steps = {name: lora_layers.trainer(model, given) for name, model in models.items()}
    entry = run.compare(steps, errors, judge="allowed", wall=True, rounds=7)
    if not report.ok:
        entry["error"] = "lk.verify found layers whose errors are larger than PEFT's"
    if "error" not in entry:
        entry["peak_bytes"] = {name: timing.peak_bytes(each, run.device) for name, each in steps.items()}
        entry["tokens_per_second"] = {name: batch * length / t["p50"] for name, t in entry["seconds"].items()}
    return entry
