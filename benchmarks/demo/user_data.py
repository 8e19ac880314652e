"""Reads the user's own labelled text from CSV or JSON Lines files."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.data import Example, TextTask
from lora_kernels.api.text_files import read_rows

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
    examples, dropped = _read_examples(path, text_column, label_column)
    counts = Counter(example.label for example in examples)
    if len(counts) < 2:
        raise ValueError(f"{path.name}: column {label_column!r} had {sorted(counts)}, must have two labels at least")
    rare = sorted(label for label, count in counts.items() if count < 2)
    if rare:
        raise ValueError(
            f"{path.name}: the labels {rare[:5]} had one example each, must have at least two "
            f"(one to train on, one to test on)"
        )
    train, test = stratified_split(examples, split_seed)
    name = f"{path.name}, {len(counts)} classes, stratified split with seed {split_seed}"
    return TextTask(name, tuple(sorted(counts)), tuple(train), tuple(test), dropped)


def read_folder(folder: Path, text_column: str = "text", label_column: str = "label") -> TextTask:
    """Reads a classification task that comes split: `train` and `test`, each a `.csv` or `.jsonl` file.

    Args:
        folder: Holds both files.
        text_column: Column (CSV) or key (JSON Lines) of the text.
        label_column: Column or key of the label: a string, an integer or a boolean.

    Returns:
        The task. Of equal texts within a part only the first is kept, and training texts that are also test texts are
        left out, so that the test part is the published one; `dropped` counts both.

    Raises:
        ValueError: As `read_task`, but for the number of examples of a class; or a test label that is not among the
            training labels.
    """
    train, repeated = _read_examples(part_file(folder, "train"), text_column, label_column)
    test, repeated_test = _read_examples(part_file(folder, "test"), text_column, label_column)
    held_out = {example.text for example in test}
    kept = [example for example in train if example.text not in held_out]
    labels = sorted({example.label for example in kept})
    if len(labels) < 2:
        raise ValueError(f"{folder.name}: column {label_column!r} had {labels}, must have two labels at least")
    strange = sorted({example.label for example in test} - set(labels))
    if strange or not test:
        raise ValueError(
            f"{folder.name}: {len(test)} test texts, {strange[:5]} among their labels only; "
            "there must be one at least, and every label must have training texts"
        )
    name = f"{folder.name}, {len(labels)} classes, split as published"
    dropped = repeated + repeated_test + len(train) - len(kept)
    return TextTask(name, tuple(labels), tuple(kept), tuple(test), dropped)


def part_file(folder: Path, part: str) -> Path:
    """Finds the file of one part of a task that comes split.

    Args:
        folder: Where.
        part: "train" or "test".

    Returns:
        The file.

    Raises:
        ValueError: There is no such file, or there are two.
    """
    found = [path for suffix in (".csv", ".jsonl") if (path := folder / f"{part}{suffix}").is_file()]
    if len(found) != 1:
        raise ValueError(f"data was {str(folder)!r}, must hold one of {part}.csv and {part}.jsonl")
    return found[0]


def _read_examples(path: Path, text_column: str, label_column: str) -> tuple[list[Example], int]:
    """The examples with different texts, and how many repeat one."""
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
    return list(examples.values()), rows - len(examples)


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


def stratified_split(
    examples: Sequence[Example], seed: int, share: float = USER_TEST_SHARE
) -> tuple[list[Example], list[Example]]:
    """Holds out the same share of every class.

    Args:
        examples: What to split.
        seed: Seed of the choice.
        share: Of each class; at least one example is held out, and one is kept.

    Returns:
        The examples kept, and those held out, by class.
    """
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for label in sorted(by_label):
        group = by_label[label]
        # One generator per class: the split of a class does not depend on the other classes.
        random.Random(f"{seed}:{label}").shuffle(group)
        held_out = min(max(1, round(share * len(group))), len(group) - 1)
        test += group[:held_out]
        train += group[held_out:]
    return train, test
