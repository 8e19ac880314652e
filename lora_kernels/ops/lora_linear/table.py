"""The file of measured forms: what `lora-kernels tune` writes, what ships with the package, and how both are read.

JSON, `{"format": 1, "note": ..., "records": [...]}`. A record is a `Key`, the form that won (with the configuration, if
it has any), the median seconds of every candidate, and the versions it was measured with. A measurement stands for one
chip and one minor version of torch and Triton (the library's products and the compiler change between them); other
records are left alone, and counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_kernels._files import read_json, write_text
from lora_kernels._version import __version__
from lora_kernels.ops.lora_linear.config import CONFIGS

FORMAT = 1
FORMS = ("expand_first", "expand_add", "gemm")
PRODUCTS = ("forward", "backward")
DTYPES = ("float16", "bfloat16", "float32", "float64")
PACKAGED = Path(__file__).with_name("tuned.json")
MOST_TOKENS = 32768


@dataclass(frozen=True)
class Key:
    """What a measurement holds for."""

    chip: str  # as `forms.chip_name` gives it
    dtype: str
    tokens: int  # the next power of two, at most `MOST_TOKENS`
    n: int  # the layer's inputs
    m: int  # its outputs
    rank: int  # r, and that of a frozen pair, padded as `pad_rank` does
    dropout: bool  # whether the low-rank term is masked (in the backward pass; the forward one masks before)
    product: str  # `forward` (y) or `backward` (dx)


@dataclass(frozen=True)
class Record:
    """One measurement."""

    key: Key
    form: str  # one of `FORMS`
    config: str | None = None  # the name of a configuration, for `gemm`
    seconds: Mapping[str, float] = field(default_factory=dict)  # medians by candidate
    versions: Mapping[str, str | None] = field(default_factory=dict)  # of lora_kernels, torch and triton


def pad_rank(rank: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 16


def bucket(tokens: int) -> int:
    """The next power of two, at most `MOST_TOKENS`: a table has no entry per batch."""
    return min(1 << (tokens - 1).bit_length(), MOST_TOKENS) if tokens else 1


def versions() -> dict[str, str | None]:
    """Of what a measurement depends on, as installed."""
    installed: dict[str, str | None] = {"lora_kernels": __version__}
    for name in ("torch", "triton"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def _minors(versions: Mapping[str, str | None]) -> tuple[str | None, ...]:
    """The minor versions of torch and Triton."""
    both = versions.get("torch"), versions.get("triton")
    return tuple(None if version is None else ".".join(version.split("+")[0].split(".")[:2]) for version in both)


def is_current(record: Record) -> bool:
    """Whether a record was measured with this minor version of torch and Triton, and its configuration still ships."""
    return _minors(record.versions) == _minors(versions()) and record.config in (None, *CONFIGS)


def cache_file() -> Path:
    """Where the user's table is: `$LORA_KERNELS_CACHE`, else `lora_kernels/tuned.json` in the user's cache folder."""
    path = os.environ.get("LORA_KERNELS_CACHE")
    if path:
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels" / "tuned.json"


_KINDS: dict[str, tuple[type, ...]] = {
    "chip": (str,), "dtype": (str,), "tokens": (int,), "n": (int,), "m": (int,), "rank": (int,), "dropout": (bool,),
    "product": (str,), "form": (str,), "config": (str, type(None)), "seconds": (dict,), "versions": (dict,),
}  # fmt: skip


def _record(number: int, entry: Any) -> Record:
    if not isinstance(entry, dict):
        raise ValueError(f"record {number} is no object")
    for name, kinds in _KINDS.items():
        value = entry.get(name)
        if name not in entry or not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"record {number}: {name} is {value!r}, but must be {kinds[0].__name__}")
    unknown = set(entry) - set(_KINDS)
    if unknown:
        raise ValueError(f"record {number} has unknown fields: {', '.join(sorted(unknown))}")
    for name, choices in (("form", FORMS), ("product", PRODUCTS), ("dtype", DTYPES)):
        if entry[name] not in choices:
            raise ValueError(f"record {number}: {name} is {entry[name]!r}, but must be one of {', '.join(choices)}")
    if (entry["config"] is None) != (entry["form"] != "gemm"):
        raise ValueError(f"record {number}: a gemm has a config, and nothing else has one")
    if entry["tokens"] != bucket(entry["tokens"]) or entry["rank"] != pad_rank(entry["rank"]):
        raise ValueError(
            f"record {number}: tokens {entry['tokens']} and rank {entry['rank']} must be powers of two, "
            f"at most {MOST_TOKENS} and at least 16"
        )
    for name, value in entry["seconds"].items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"record {number}: seconds of {name} are {value!r}, but must be a number from 0 on")
    if not all(isinstance(value, (str, type(None))) for value in entry["versions"].values()):
        raise ValueError(f"record {number}: versions must be texts")
    key = Key(**{part.name: entry.pop(part.name) for part in fields(Key)})
    return Record(key, **entry)


def read(path: Path) -> list[Record]:
    """All records of a file, current or not.

    Raises:
        ValueError: if it cannot be read or is malformed; the message names the file and the reason.
    """
    name = f"the table of measured forms {str(path)!r}"
    content = read_json(path, name)
    try:
        if not isinstance(content, dict) or not isinstance(content.get("records"), list):
            raise ValueError('no {"format": ..., "records": [...]}')
        if content.get("format") != FORMAT:
            raise ValueError(f"format is {content.get('format')!r}, but this version reads {FORMAT}")
        return [_record(number, entry) for number, entry in enumerate(content["records"])]
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def write(path: Path, records: Iterable[Record], note: str) -> None:
    """Write a file, whole or not at all, one record per line, with a note for people who read it."""
    rows = [json.dumps({**entry.pop("key"), **entry}) for entry in map(asdict, records)]
    body = "".join(f"\n  {row}{',' * (number + 1 < len(rows))}" for number, row in enumerate(rows))
    text = f'{{\n "format": {FORMAT},\n "note": {json.dumps(note)},\n "records": [{body}\n ]\n}}\n'
    write_text(path, text)


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Both lists; a new record takes the place of one of the same key and minor versions."""
    return list({(record.key, _minors(record.versions)): record for record in (*old, *new)}.values())
