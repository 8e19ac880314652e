"""Reading of JSON that others may have written, changed or cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text in UTF-8; the error names `where` it is from."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} cannot be read: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def read_json(file: Path, what: str | None = None) -> Any:
    """The value in a JSON file; the error calls it `what`, by default its path."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{what or file} cannot be read: {error.strerror or error}") from error
    return parse_json(text, what or file)
