"""Command line options from dataclasses: the fields' names, types and defaults, with help from the docstring."""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Container, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

# What a field can be given as, by preference where its type is a union.
_TEXTUAL = (Path, str, float, int, bool)


def descriptions(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of the fields, under `Attributes:` or `Args:`."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        section = re.search(r"^(?:Attributes|Args):\n((?:    .*\n?)+)", doc, re.MULTILINE)
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE):
            texts[name] = " ".join(text.split()).replace("`", "")
    return texts


def default_of(field: Field[Any]) -> Any:
    """The default of a field, or `MISSING`."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def add_options(
    parser: Any, kind: type, *, leave_out: Container[str] = (), defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
    """Add an option for every field that text can give (positional with that metadata, a bool as a switch)."""
    # Those that the user leaves out stay out of the namespace.
    texts, hints = descriptions(kind), get_type_hints(kind)
    for field in fields(kind):
        value_type, many = _value_type(hints[field.name])
        if value_type is None or field.name in leave_out:
            continue
        default = defaults.get(field.name, default_of(field))
        text = texts[field.name].removesuffix(".").replace("%", "%%")
        if default is not MISSING and default is not None and default != [] and value_type is not bool:
            shown = " ".join(map(str, default)) if many else default
            text += f" (default: {shown})"
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if field.metadata.get("positional"):
            parser.add_argument(field.name, type=value_type, **settings)
            continue
        if value_type is bool:
            settings["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif many:
            settings |= {"type": value_type, "nargs": "+", "action": "extend"}
        else:
            settings["type"] = value_type
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, dest=field.name, required=default is MISSING, **settings)


def _value_type(hint: Any) -> tuple[type | None, bool]:
    """The type of one value, `None` where text cannot give it, and whether there may be several."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is list:
            return get_args(kind)[0], True
    return next((kind for kind in _TEXTUAL if kind in kinds), None), False
