"""Classification tasks from labelled texts in CSV or JSON Lines files."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.demo.data import Example, TextTask
from lora_kernels.api.text_files import read_rows

TEST_SHARE = 0.2


def read_task(path: Path, text_column: str = "text", label_column: str = "label", split_seed: int = 0) -> TextTask:
    """A task from one file, `TEST_SHARE` of each class held out. Of equal texts only the first is kept."""
    examples, dropped = _read_examples(path, text_column, label_column)
    counts = Counter(example.label for example in examples)
    _check_labels(path, label_column, counts)
    rare = sorted(label for label, count in counts.items() if count < 2)
    if rare:
        raise ValueError(f"{path.name}: labels {rare[:5]} have one example, but must have one to train on, one to test")
    train, test = stratified_split(examples, split_seed)
    name = f"{path.name}, {len(counts)} classes, stratified split with seed {split_seed}"
    return TextTask(name, tuple(sorted(counts)), tuple(train), tuple(test), dropped)


def read_folder(folder: Path, text_column: str = "text", label_column: str = "label") -> TextTask:
    """A task that is split already: `train` and `test`, each a `.csv` or `.jsonl` file.

    Of equal texts within a part only the first is kept, and training texts that are also test texts are left out, so
    that the test part is the published one.
    """
    train, repeated = _read_examples(part_file(folder, "train"), text_column, label_column)
    test, repeated_test = _read_examples(part_file(folder, "test"), text_column, label_column)
    test_texts = {example.text for example in test}
    kept = [example for example in train if example.text not in test_texts]
    labels = sorted({example.label for example in kept})
    _check_labels(folder, label_column, labels)
    unknown = sorted({example.label for example in test} - set(labels))
    if unknown or not test:
        raise ValueError(
            f"{folder.name}: {len(test)} test texts have labels without training texts: {unknown[:5]}; "
            "but there must be at least one test text, and training texts for every label"
        )
    name = f"{folder.name}, {len(labels)} classes, split as published"
    dropped = repeated + repeated_test + len(train) - len(kept)
    return TextTask(name, tuple(labels), tuple(kept), tuple(test), dropped)


def part_file(folder: Path, part: str) -> Path:
    """The file of one part, "train" or "test", of a task that is split already."""
    files = [path for suffix in (".csv", ".jsonl") if (path := folder / f"{part}{suffix}").is_file()]
    if len(files) != 1:
        raise ValueError(f"data is {str(folder)!r}, but must hold one of {part}.csv and {part}.jsonl")
    return files[0]


def _check_labels(path: Path, column: str, labels: Any) -> None:
    if len(labels) < 2:
        raise ValueError(f"{path.name}: column {column!r} has {sorted(labels)}, but must have at least two labels")


def _read_examples(path: Path, text_column: str, label_column: str) -> tuple[list[Example], int]:
    """The examples with different texts, and how many repeat one."""
    examples: dict[str, Example] = {}
    rows = 0
    for place, row in read_rows(path, (text_column, label_column)):
        rows += 1
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: {text_column!r} is {text!r}, but must be a text that is not empty")
        if not isinstance(label, (str, int)) or not str(label).strip():
            raise ValueError(f"{place}: {label_column!r} is {label!r}, but must be a string or an integer, not empty")
        example = Example(" ".join(text.split()), str(label).strip(), place)
        first = examples.setdefault(example.text, example)
        if first.label != example.label:
            raise ValueError(
                f"{place}: {label_column!r} is {example.label!r}, but must be {first.label!r} as in {first.source}, "
                "which has the same text"
            )
    return list(examples.values()), rows - len(examples)


def stratified_split(
    examples: Sequence[Example], seed: int, share: float = TEST_SHARE
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of every class: at least one example is held out, and at least one kept."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for label in sorted(by_label):
        group = by_label[label]
        # One generator per class: the split of a class does not depend on the other classes.
        random.Random(f"{seed}:{label}").shuffle(group)
        count = min(max(1, round(share * len(group))), len(group) - 1)
        test += group[:count]
        train += group[count:]
    return train, test
