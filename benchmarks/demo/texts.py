"""The texts of a run: word problems or the user's own, split into training and held-out texts, as padded batches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.problems import problems
from lora_kernels.api.text_files import read_rows

IGNORED = -100  # the label of a token that is not learned
PROMPT = "Question: {question}\nAnswer:"
PROBLEMS = 2000
EVALUATION_BATCH = 8
HELD_OUT_SHARE = 0.2  # of a file, at most

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A prompt, which is not learned and may be empty, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Texts to train on, and held-out ones.

    Attributes:
        name: for people.
        train: training texts.
        test: held-out texts.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the texts and the split."""
        rows = [[(example.prompt, example.answer) for example in part] for part in (self.train, self.test)]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


def word_problems(held_out: int, seed: int = 0) -> Task:
    """Generated word problems; the held-out ones have the same templates, with other names and numbers."""
    examples = [
        Example(PROMPT.format(question=one.question), " " + one.answer) for one in problems(PROBLEMS + held_out, seed)
    ]
    return Task(
        "word problems of our own (names and numbers drawn at random)",
        tuple(examples[held_out:]),
        tuple(examples[:held_out]),
    )


def read_task(path: Path, held_out: int, seed: int = 0) -> Task:
    """A task from a `.jsonl` or `.csv` file with `question` and `answer`, or with `text`; equal texts are used once."""
    examples = list(dict.fromkeys(_examples(path)))
    if len(examples) < 2:
        raise ValueError(f"data has {len(examples)} different texts, but must have at least 2")
    random.Random(seed).shuffle(examples)
    count = min(held_out, max(1, int(HELD_OUT_SHARE * len(examples))))
    return Task(path.name, tuple(examples[count:]), tuple(examples[:count]))


def _examples(path: Path) -> Iterator[Example]:
    for place, row in read_rows(path, ()):
        columns = ("question", "answer") if "question" in row else ("text",)
        for column in columns:
            if not (isinstance(row.get(column), str) and row[column].strip()):
                raise ValueError(f"{place}: {column!r} is {row.get(column)!r}, but must be a text that is not empty")
        if columns == ("text",):
            yield Example("", row["text"].strip())
        else:
            yield Example(PROMPT.format(question=row["question"].strip()), " " + row["answer"].strip())


class Encoder:
    """Turns examples into batches: `input_ids`, `attention_mask` and `labels`, all (batch, tokens)."""

    def __init__(self, tokenizer: Any, max_tokens: int, device: torch.device | str = "cpu") -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._device = device

    def _tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """The ids of a prompt, and of its answer with an end token, both cut to `max_tokens`."""
        prompt = self._tokenizer(example.prompt)["input_ids"] if example.prompt else []
        answer = self._tokenizer(example.answer)["input_ids"] + [self._tokenizer.eos_token_id]
        return prompt[: self._max_tokens], answer[: max(0, self._max_tokens - len(prompt))]

    def usable(self, examples: Sequence[Example]) -> tuple[Example, ...]:
        """The examples whose prompt leaves room for a token of the answer, and of which one token can be predicted."""
        lengths = [[len(part) for part in self._tokens(example)] for example in examples]
        return tuple(
            example
            for example, (prompt, answer) in zip(examples, lengths, strict=True)
            if answer and prompt + answer > 1
        )

    def encode(self, examples: Sequence[Example]) -> Batch:
        """One batch, padded on the right to its longest text."""
        pairs = [self._tokens(example) for example in examples]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        shape = (len(pairs), longest)
        ids = torch.full(shape, self._tokenizer.pad_token_id)
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(answer)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def shuffled(self, examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches without end, shuffled anew in each pass; a smaller rest is left out unless it is all there is."""
        draw, order = random.Random(seed), list(examples)
        size = min(batch_size, len(order))
        while True:
            draw.shuffle(order)
            for low in range(0, len(order) - size + 1, size):
                yield self.encode(order[low : low + size])

    def by_length(self, examples: Sequence[Example]) -> list[Batch]:
        """All examples for evaluation, texts of similar length together, so that little is padded."""
        ordered = sorted(examples, key=lambda example: sum(map(len, self._tokens(example))))
        return [self.encode(ordered[i : i + EVALUATION_BATCH]) for i in range(0, len(ordered), EVALUATION_BATCH)]


def predicted(batch: Batch) -> int:
    """How many tokens of a batch its loss is a mean of."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
