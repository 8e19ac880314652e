"""From a model and a loader to a start: seconds and memory of `lk.initialize`, by method."""

from __future__ import annotations

import time
from typing import Any

import torch

import lora_kernels as lk
from benchmarks.gpu.part import Run
from benchmarks.gpu.training import TINY

# A Llama of 1.2 billion parameters.
FULL = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
METHODS = ("eva", "lora_da", "lora_ga", "lora_one", "corda", "pissa")


def starts(run: Run) -> None:
    """All methods, with random weights and random tokens."""
    sizes = {"batches": run.pick(8, 2), "batch": run.pick(4, 2), "length": run.pick(1024, 12), "rank": run.pick(16, 4)}
    run.each([{"method": method, **sizes} for method in METHODS], _start)


def _start(run: Run, method: str, batches: int, batch: int, length: int, rank: int) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    numbers, on_gpu = run.pick(FULL, TINY), run.device.type == "cuda"
    with torch.device(run.device):
        base = LlamaForCausalLM(LlamaConfig(**numbers)).to(torch.bfloat16)
    model: Any = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))  # type: ignore[arg-type]
    ids = torch.randint(numbers["vocab_size"], (batches, batch, length))
    loader = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids]
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    report = lk.initialize(model, loader, method=method)
    if on_gpu:
        torch.cuda.synchronize()
    entry: dict[str, Any] = {"initialize_seconds": time.perf_counter() - started, "report": str(report)[:1500]}
    if on_gpu:
        entry["peak_bytes"] = torch.cuda.max_memory_allocated()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        entry["error"] = "parameters are not finite"
    return entry
