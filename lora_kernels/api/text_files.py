"""Rows of the user's own text from a CSV or JSON Lines file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_kernels._files import parse_json


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and row of a `.csv` (with a header) or `.jsonl` file that has the columns; else a ValueError."""
    if not path.is_file():
        raise ValueError(f"data is {str(path)!r}, but must be an existing .csv or .jsonl file")
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"data is {str(path)!r}, but must end in .csv or .jsonl")
    try:
        yield from readers[path.suffix.lower()](path, columns)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def read(path: Path, text_column: str, label_column: str | None = None) -> tuple[list[str], list[str] | None]:
    """The texts, white space collapsed, and their labels if a column of them is named; empty texts are then refused.

    Raises:
        ValueError: as `read_rows`, or if a text or a label is missing, or there is none at all.
    """
    texts, labels = [], []
    for place, row in read_rows(path, (text_column,) if label_column is None else (text_column, label_column)):
        text = row[text_column]
        if not isinstance(text, str) or not (text.strip() or label_column is None):
            kind = "a text" if label_column is None else "a text that is not empty"
            raise ValueError(f"{place}: {text_column!r} is {text!r}, but must be {kind}")
        if label_column is not None:
            label = row[label_column]
            if not isinstance(label, (str, int)) or not str(label).strip():
                raise ValueError(f"{place}: {label_column!r} is {label!r}, but must be a string or an integer")
            labels.append(str(label).strip())
        if text.strip():
            texts.append(" ".join(text.split()))
    if not texts:
        raise ValueError(f"{path.name} has no text in column {text_column!r}")
    return texts, None if label_column is None else labels


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or [])
            twice = sorted({column for column in header if header.count(column) > 1})
            if twice:
                raise ValueError(f"{path.name}: the columns {twice} stand in the header twice")
            for column in columns:
                if column not in header:
                    raise ValueError(f"{path.name}: the columns are {header}, but must include {column!r}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path.name}:{reader.line_num} has {'more' if None in row else 'fewer'} than {len(header)} "
                        "columns: texts with commas must be quoted"
                    )
                yield f"{path.name}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path.name}:{reader.line_num + 1} must be UTF-8 CSV: {error}") from error


def _jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = parse_json(line, place)
            except ValueError as error:
                raise ValueError(f"{error}; it must be one JSON object in UTF-8") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} is a {type(row).__name__}, but must be a JSON object")
            for column in columns:
                if column not in row:
                    raise ValueError(f"{place}: the keys are {sorted(row)}, but must include {column!r}")
            yield place, row
