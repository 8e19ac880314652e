"""A method from words, as a command line or a configuration file has them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lora_kernels._checks import check_choice
from lora_kernels.init import METHODS, InitMethod


def method_from_text(name: str, settings: Sequence[str]) -> InitMethod:
    """The config of the method of this name; `settings` are `NAME=VALUE`, with Python literals or else plain text."""
    check_choice("method", name, tuple(METHODS))
    known = {field.name for field in fields(METHODS[name])}
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or key not in known:
            raise ValueError(
                f"set is {setting!r}, but must be NAME=VALUE with a name out of {', '.join(sorted(known))}"
            )
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return METHODS[name](**values)
