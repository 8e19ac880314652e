"""Models, batches and plain float64 sums that several comparisons use."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from lora_kernels.ops.covariance import reference

RANK, RHO = 16, 2.0


# Layers, hidden size, words, batches, rows and tokens of each.
LLAMAS = {"tiny": (2, 64, 512, 2, 2, 48), "small": (2, 512, 8192, 4, 8, 256), "llama": (8, 512, 8192, 16, 8, 256)}


def llama(layers: int, hidden: int = 512, words: int = 8192) -> torch.nn.Module:
    """The benchmark Llama, random weights, embeddings with a decaying spectrum as trained ones have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 2),
        vocab_size=words,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        scale = torch.arange(1, hidden + 1).float().rsqrt()
        rotation = torch.linalg.qr(torch.randn(hidden, hidden)).Q
        model.model.embed_tokens.weight.copy_((torch.randn(words, hidden) * scale) @ rotation)
    return model


def llama_batches(count: int, words: int = 8192, rows: int = 8, length: int = 256) -> list[dict[str, torch.Tensor]]:
    """Batches of rows of tokens, frequent tokens more often."""
    generator = torch.Generator().manual_seed(1)
    weights = 1.0 / torch.arange(1, words + 1).float()
    drawn = [torch.multinomial(weights, rows * length, replacement=True, generator=generator) for _ in range(count)]
    mask = torch.ones(rows, length, dtype=torch.long)
    return [{"input_ids": tokens.view(rows, length), "attention_mask": mask} for tokens in drawn]


def minilm() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """MiniLM-L6 and 16 batches of 32 docstrings of the standard library."""
    from transformers import AutoModel, AutoTokenizer

    from benchmarks import minilm as packaged
    from benchmarks.docstrings import docstring_task

    folder = packaged.folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = [example.text for example in docstring_task().train][: 16 * 32]
    batches = []
    for low in range(0, len(texts), 32):
        encoded = tokenizer(texts[low : low + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({key: encoded[key] for key in ("input_ids", "attention_mask")})
    return model, batches


def smollm2() -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """SmolLM2-135M-Instruct and 4 batches of 4 x 128 tokens of docstrings of the standard library, without padding."""
    from benchmarks import language_model
    from benchmarks.docstrings import docstring_task

    count, rows, length = 4, 4, 128
    texts = "\n\n".join(example.text for example in docstring_task().train[:512])
    tokens = language_model.tokenizer()(texts, return_tensors="pt")["input_ids"][0, : count * rows * length]
    batches = tokens.view(count, rows, length)
    return language_model.load(), [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


PRETRAINED = {"minilm": minilm, "smollm2": smollm2}


def case(name: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """Model and batches of a case.

    Args:
        name: `minilm`, `smollm2`, or a key of `LLAMAS`.

    Returns:
        Both.
    """
    if name in PRETRAINED:
        return PRETRAINED[name]()
    layers, hidden, words, count, rows, length = LLAMAS[name]
    return llama(layers, hidden, words), llama_batches(count, words, rows, length)


def targets(model: torch.nn.Module) -> list[str]:
    """The linear layers that get an adapter."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in names if "lm_head" not in name and "pooler" not in name]


@dataclass(frozen=True)
class Work:
    """FLOPs of the layers that get an adapter, over all tokens of some batches.

    Attributes:
        forward: of their products; a backward pass costs as much again for the inputs, and again for the weights.
        covariance: of the lower triangles of the second moments of all different inputs.
    """

    forward: float
    covariance: float


def work(model: torch.nn.Module, batches: Sequence[Any]) -> Work:
    """Count them, by the shapes that one batch shows."""
    inputs: dict[int, torch.Tensor] = {}  # holds the tensors, so that no two share an address
    layers = [model.get_submodule(name) for name in targets(model)]

    def observe(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        inputs[id(args[0])] = args[0]

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(observe).remove)
        model(input_ids=batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"])
    tokens = sum(float(batch["attention_mask"].sum()) for batch in batches)
    widths = [tensor.shape[-1] for tensor in inputs.values()]
    products = sum(layer.weight.numel() for layer in layers)  # type: ignore[union-attr, misc]
    return Work(2.0 * tokens * products, tokens * sum(n * (n + 1.0) for n in widths))


def wrap(model: torch.nn.Module, method: str) -> torch.nn.Module:
    """A PEFT model on a copy of `model`.

    Args:
        model: the base.
        method: `eva` for PEFT's own, else stock.

    Returns:
        The PEFT model.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model

    eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=RHO)} if method == "eva" else {}
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, target_modules=targets(model), **eva))


def exact_covariances(model: torch.nn.Module, batches: Sequence[Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Centred float64 covariances of the inputs of layers, by hooks of our own and no code of either side."""
    sums: dict[str, list[Any]] = {name: [0.0, 0.0, 0.0] for name in names}
    mask: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def observe(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            second, total = reference.covariance(inputs[0], mask[0])
            for slot, value in enumerate((second, total, float(mask[0].sum()))):
                sums[name][slot] = sums[name][slot] + value

        return observe

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()]
            model(**batch)
    return {
        name: second / count - torch.outer(total / count, total / count)
        for name, (second, total, count) in sums.items()
    }


def captured(basis: torch.Tensor, covariance: torch.Tensor) -> float:
    """Share of the variance in the span of the rows of `basis`."""
    q = torch.linalg.qr(basis.double().mT).Q
    return float(torch.trace(q.mT @ covariance @ q) / torch.trace(covariance))
