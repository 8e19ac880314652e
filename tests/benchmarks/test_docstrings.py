import json
import re

import pytest

from benchmarks import docstrings
from benchmarks.docstrings import MASK, docstring_task, read_docstrings


@pytest.fixture(scope="module")
def stdlib_task():
    return docstring_task()


def write_library(root, packages):
    """Packages: {name: {file: [docstring, ...]}}; the first docstring is the module's, the others functions'."""
    for package, files in packages.items():
        for file, texts in {"__init__.py": [], **files}.items():
            path = root / package / file
            path.parent.mkdir(parents=True, exist_ok=True)
            head = [repr(texts[0])] if texts else []
            path.write_text("\n".join(head + [f"def f{i}():\n    {text!r}" for i, text in enumerate(texts[1:])]) + "\n")


def sentences(word, count):
    return [f"This {word} sentence has number {'i' * i} of many such lines" for i in range(3, 3 + count)]


def test_docstrings_of_all_kinds_are_read_without_importing(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        'raise RuntimeError("must not run")\n'
        "class A:\n    '''class  doc\n\n    more'''\n    def f(self):\n        'method doc'\n"
        "async def g():\n    'coroutine doc'\n    def inner():\n        'inner doc'\n"
        "def h():\n    x = 'no doc'\n"
    )
    assert read_docstrings(source) == ["class doc more", "method doc", "coroutine doc", "inner doc"]


def test_task_on_a_made_up_library(tmp_path):
    shared = "The very same sentence stands in both of the libraries here"
    twice = "This sentence stands in two files of a single library only"
    write_library(
        tmp_path,
        {
            "alpha": {
                "one.py": [*sentences("good", 6), shared, twice],
                "two.py": [
                    *sentences("fine", 3),
                    twice,
                    "Alpha and ALPHAServer know the widget module and alpha.widget too",
                ],
                "sub/widget.py": sentences("nice", 3),
            },
            "beta": {
                "a1.py": [*sentences("bad", 4), shared],
                "b2.py": sentences("poor", 4),
                "c3.py": sentences("awful", 4),
            },
            "two_files": {"x.py": sentences("x", 50), "y.py": sentences("y", 50)},
            "_private": {f"{n}.py": sentences(n, 50) for n in "abc"},
            "tkinter": {f"{n}.py": sentences(n, 50) for n in "abc"},
        },
    )
    task = docstring_task(tmp_path, classes=2)
    assert task.labels == ("alpha", "beta")
    texts = [example.text for example in (*task.train, *task.test)]
    assert shared not in texts
    assert texts.count(twice.replace("two", MASK)) == 1
    assert any(text.startswith(f"{MASK} and {MASK}Server know the {MASK} module") for text in texts)
    # 13 of alpha (one text lost to beta, one said twice), 12 of beta; what was dropped: 2 + 1.
    assert len(texts) == 6 + 1 + 3 + 1 + 3 + 12
    assert task.dropped == 3
    with pytest.raises(ValueError, match=r"classes is 3, but must be from 2 to 2"):
        docstring_task(tmp_path, classes=3)


def test_stdlib_task_leaks_nothing(stdlib_task):
    task = stdlib_task
    assert len(task.labels) == docstrings.CLASSES
    assert len(task.train) > 600
    assert len(task.test) > 250
    assert {e.source for e in task.train}.isdisjoint({e.source for e in task.test})
    both = [e.text.lower() for e in (*task.train, *task.test)]
    assert len(set(both)) == len(both)
    for label in task.labels:
        share = sum(e.label == label for e in task.test) / sum(e.label == label for e in (*task.train, *task.test))
        assert 0.02 < share <= docstrings.TEST_SHARE, (label, share)
    for example in (*task.train, *task.test):
        assert example.source.startswith(f"{example.label}/")
        assert not any(label in example.text.lower() for label in task.labels), example
        for part in example.source.removesuffix(".py").split("/"):
            word = part.strip("_").lower()
            if len(word) > 2 and word not in {"init", "main"}:
                assert not re.search(rf"\b{word}\b", example.text.lower()), example


def test_stdlib_task_is_the_same_every_time(stdlib_task):
    assert docstring_task() == stdlib_task


def test_training_texts_are_written_for_other_programs(stdlib_task, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    assert docstrings.main([str(file)]) == 0
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert texts == [example.text for example in stdlib_task.train if MASK not in example.text]
    assert len(texts) > 100
    with pytest.raises(SystemExit, match="2"):
        docstrings.main(["--nonsense"])
    assert "usage" in capsys.readouterr().err
