"""Reads the user's own labelled text from a CSV or JSON Lines file."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from lora_kernels.demo.data import Example, TextTask
from lora_kernels.integrations.text_files import read_rows

USER_TEST_SHARE = 0.2


def read_task(path: Path, text_column: str = "text", label_column: str = "label", split_seed: int = 0) -> TextTask:
    """Reads a classification task and splits it, stratified by label.

    Args:
        path: A `.csv` file with a header row, or a `.jsonl` file with one object per line; UTF-8.
        text_column: Column (CSV) or key (JSON Lines) of the text.
        label_column: Column or key of the label: a string, an integer or a boolean.
        split_seed: Seed of the split; `USER_TEST_SHARE` of each class is held out, at least one example.

    Returns:
        The task. Of equal texts only the first is kept, so that none is on both sides; `dropped` counts the others.

    Raises:
        ValueError: The file is missing or of another kind, a column is missing, a text or label is empty or of a wrong
            type, equal texts have different labels, there are fewer than two classes, or a class has one example.
    """
    examples: dict[str, Example] = {}
    rows = 0
    for place, row in read_rows(path, (text_column, label_column)):
        rows += 1
        example = Example(_text(row, text_column, place), _label(row, label_column, place), place)
        first = examples.setdefault(example.text, example)
        if first.label != example.label:
            raise ValueError(
                f"{place}: the text is the same as that of {first.source}, but {label_column!r} was {example.label!r}, "
                f"must be {first.label!r} as there"
            )
    counts = Counter(example.label for example in examples.values())
    if len(counts) < 2:
        raise ValueError(f"{path.name}: column {label_column!r} had {sorted(counts)}, must have two labels at least")
    rare = sorted(label for label, count in counts.items() if count < 2)
    if rare:
        raise ValueError(
            f"{path.name}: the labels {rare[:5]} had one example each, must have at least two "
            f"(one to train on, one to test on)"
        )
    train, test = _stratified_split(list(examples.values()), split_seed)
    name = f"{path.name}, {len(counts)} classes, stratified split with seed {split_seed}"
    return TextTask(name, tuple(sorted(counts)), tuple(train), tuple(test), dropped=rows - len(examples))


def _text(row: dict[str, Any], column: str, place: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {column!r} was {value!r}, must be a text that is not empty")
    return " ".join(value.split())


def _label(row: dict[str, Any], column: str, place: str) -> str:
    value = row[column]
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{place}: {column!r} was {value!r}, must be a string or an integer that is not empty")
    return str(value).strip()


def _stratified_split(examples: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for label in sorted(by_label):
        group = by_label[label]
        # One generator per class: the split of a class does not depend on the other classes.
        random.Random(f"{seed}:{label}").shuffle(group)
        held_out = max(1, round(USER_TEST_SHARE * len(group)))
        test += group[:held_out]
        train += group[held_out:]
    return train, test
