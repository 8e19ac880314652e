"""Models and texts of the claims: SmolLM2-135M, or a decoder of two small layers that knows whole words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks import language_model
from benchmarks.demo.model import load, quiet_transformers
from benchmarks.demo.problems import problems
from benchmarks.demo.texts import Batch, Encoder, Example, word_problems

TEXTS, TOKENS = 2, 128
SMALL = "Llama, 2 layers, hidden 64, random weights"


class Words:
    """A tokenizer of whole words, as far as `Encoder` needs one."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, texts: Iterable[str]) -> None:
        words = sorted({word for text in texts for word in self._split(text)})
        self._ids = {word: index for index, word in enumerate(words, 2)}

    @staticmethod
    def _split(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text)

    def __len__(self) -> int:
        return 2 + len(self._ids)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """The ids of a text's words."""
        return {"input_ids": [self._ids[word] for word in self._split(text)]}


def decoder(words: Words, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of two layers of width 64, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(words),
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def model_and_batches(quick: bool, steps: int, seeds: Sequence[int]) -> tuple[str, Any, list[list[Batch]]]:
    """The model's name, the frozen model, and per seed as many batches of word problems as there are steps."""
    quiet_transformers()
    task = word_problems(0)
    tokenizer: Any
    if quick:
        tokenizer = Words(example.prompt + example.answer for example in task.train)
        name, model = SMALL, decoder(tokenizer).requires_grad_(False)
    else:
        try:
            name, (model, tokenizer) = language_model.NAME, load(language_model.folder(), "cpu")
        except FileNotFoundError as error:
            raise SystemExit(f"claims: {error}") from None
    encoder = Encoder(tokenizer, TOKENS)
    orders = [encoder.shuffled(task.train, TEXTS, seed) for seed in seeds]
    return name, model, [list(itertools.islice(order, steps)) for order in orders]


def questions_and_answers(count: int) -> tuple[Words, list[Batch], Batch]:
    """A tokenizer, batches of questions to pretrain on, and one batch of so many answers to other questions."""
    known = problems(1000 + count)
    words = Words(text for one in known for text in (one.question, one.answer))
    encoder = Encoder(words, 16)
    asked = [Example("", one.question) for one in known[count:]]
    return words, encoder.by_length(asked), encoder.encode([Example("", one.answer) for one in known[:count]])
