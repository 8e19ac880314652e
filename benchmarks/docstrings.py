"""Docstrings of the standard library, texts that every machine has, labelled by the package they come from.

The docstrings are read with `ast` from the source files that ship with every Python; nothing is imported. The label
is the top-level package. Three rules keep the task honest: the split is by source file, so no module is on both
sides; the package names and the module names of all classes are masked in every text; and a text that occurs twice is
used once (or, if it occurs under two labels, not at all).

`python -m benchmarks.docstrings FILE` writes the training texts without masks as JSON lines, for the programs that take
`--data FILE`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MASK = "[MASK]"
CLASSES = 8
MIN_FILES = 3
MIN_WORDS = 6
TEST_SHARE = 0.35
# Not the same on every machine: removed from later Pythons, packaged separately by some systems, or test suites.
EXCLUDED = frozenset(
    ("dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages")
    + ("test", "tests", "tkinter", "turtledemo")
)


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Attributes:
        text: What the model reads.
        label: Class name.
        source: Where it comes from: a source file relative to the library.
    """

    text: str
    label: str
    source: str


@dataclass(frozen=True)
class TextTask:
    """A text classification task, already split.

    Attributes:
        name: One line that says what the data are.
        labels: Class names, sorted; a class id is a position in this tuple.
        train: Training examples.
        test: Held-out examples.
        dropped: How many examples were left out because their text occurs elsewhere.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    dropped: int = 0


def docstring_task(root: Path | None = None, classes: int = CLASSES) -> TextTask:
    """Build the docstring task: which standard-library package does this docstring come from?

    The classes are the `classes` public packages with the most docstrings of at least `MIN_WORDS` words spread over at
    least `MIN_FILES` source files (`EXCLUDED` ones left out).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    packages = {package.name: _read_package(root, package) for package in _packages(root)}
    usable = {name: files for name, files in packages.items() if len(files) >= MIN_FILES}
    ranked = sorted(usable, key=lambda name: (-sum(map(len, usable[name].values())), name))
    if classes < 2 or len(ranked) < classes:
        raise ValueError(
            f"classes is {classes}, but must be from 2 to {len(ranked)}, the packages under {str(root)!r} "
            f"that have docstrings in at least {MIN_FILES} files"
        )
    labels = tuple(sorted(ranked[:classes]))
    pattern = _name_pattern(labels, (source for label in labels for source in usable[label]))
    raw = [
        Example(pattern.sub(MASK, text), label, source)
        for label in labels
        for source, texts in sorted(usable[label].items())
        for text in texts
    ]
    kept = _unique([example for example in raw if count_words(example.text) >= MIN_WORDS])
    held_out = {source for label in labels for source in _test_files(kept, label)}
    return TextTask(
        name=f"docstrings of the standard library, {classes} packages, split by source file",
        labels=labels,
        train=tuple(example for example in kept if example.source not in held_out),
        test=tuple(example for example in kept if example.source in held_out),
        dropped=len(raw) - len(kept),
    )


def count_words(text: str) -> int:
    """Count the words of a text, masked names not among them."""
    return len(re.findall(r"[^\W\d_]{2,}", text.replace(MASK, " ")))


def _packages(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.iterdir()
        if (path / "__init__.py").is_file() and not path.name.startswith("_") and path.name not in EXCLUDED
    )


def _read_package(root: Path, package: Path) -> dict[str, list[str]]:
    """Docstrings by source file (POSIX path relative to root); files without any are left out."""
    files: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED.isdisjoint(relative.parts):
            texts = [text for text in read_docstrings(path) if count_words(text) >= MIN_WORDS]
            if texts:
                files[relative.as_posix()] = texts
    return files


def read_docstrings(path: Path) -> list[str]:
    """Read the docstrings of a module, its classes and its functions, without importing it."""
    with warnings.catch_warnings():
        # Old sources hold invalid escapes; that is their business.
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes(), filename=str(path))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [" ".join(text.split()) for node in nodes if (text := ast.get_docstring(node))]


def _name_pattern(labels: Sequence[str], sources: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the package names, anywhere, and for the module names, as whole words; case does not matter.

    All classes' names are masked in all texts: masking only a text's own would mark the others as foreign.
    """
    parts = {part.strip("_").lower() for source in sources for part in source.removesuffix(".py").split("/")}
    words = sorted(
        (part for part in parts - set(labels) - {"init", "main"} if len(part) > 2), key=lambda p: (-len(p), p)
    )
    anywhere = "|".join(re.escape(label) for label in sorted(labels, key=lambda label: (-len(label), label)))
    whole = "|".join(re.escape(word) for word in words)
    return re.compile(rf"{anywhere}|(?<![^\W_])(?:{whole})(?![^\W_])" if whole else anywhere, re.IGNORECASE)


def _unique(examples: Sequence[Example]) -> list[Example]:
    """The first example of each text; texts whose labels disagree are left out."""
    labels_of: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        labels_of[example.text.lower()].add(example.label)
    seen: set[str] = set()
    kept: list[Example] = []
    for example in examples:
        key = example.text.lower()
        if len(labels_of[key]) == 1 and key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def _test_files(examples: Sequence[Example], label: str) -> set[str]:
    """A class's held-out files, in the order of their names' hashes, up to `TEST_SHARE` of its examples."""
    sizes: dict[str, int] = defaultdict(int)
    for example in examples:
        if example.label == label:
            sizes[example.source] += 1
    if len(sizes) < 2:
        return set()
    limit = TEST_SHARE * sum(sizes.values())
    chosen: set[str] = set()
    count = 0
    for source in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if count + sizes[source] <= limit:
            chosen.add(source)
            count += sizes[source]
    # Where every file is larger than the share, the smallest one is held out.
    return chosen or {min(sizes, key=lambda name: (sizes[name], name))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the training texts that hold no mask."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docstrings", description=main.__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl file with a `text` in every line")
    options = parser.parse_args(arguments)
    texts = [example.text for example in docstring_task().train if MASK not in example.text]
    options.file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
