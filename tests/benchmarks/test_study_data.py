import json
import re

import pytest

from benchmarks.demo import data
from benchmarks.demo.data import MASK, Example, TextTask, docstring_task, hold_out, read_docstrings
from benchmarks.demo.files import read_task


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
    assert len(task.labels) == data.CLASSES
    assert len(task.train) > 600
    assert len(task.test) > 250
    assert {e.source for e in task.train}.isdisjoint({e.source for e in task.test})
    both = [e.text.lower() for e in (*task.train, *task.test)]
    assert len(set(both)) == len(both)
    for label in task.labels:
        share = sum(e.label == label for e in task.test) / sum(e.label == label for e in (*task.train, *task.test))
        assert 0.02 < share <= data.TEST_SHARE, (label, share)
    for example in (*task.train, *task.test):
        assert example.source.startswith(f"{example.label}/")
        assert not any(label in example.text.lower() for label in task.labels), example
        for part in example.source.removesuffix(".py").split("/"):
            word = part.strip("_").lower()
            if len(word) > 2 and word not in {"init", "main"}:
                assert not re.search(rf"\b{word}\b", example.text.lower()), example


def test_stdlib_task_is_the_same_every_time(stdlib_task):
    assert docstring_task().fingerprint == stdlib_task.fingerprint
    moved = TextTask(
        stdlib_task.name, stdlib_task.labels, stdlib_task.train[1:], stdlib_task.test + stdlib_task.train[:1]
    )
    assert moved.fingerprint != stdlib_task.fingerprint


def test_hold_out_uses_training_files_only(stdlib_task):
    inner = hold_out(stdlib_task)
    assert len(inner.train) + len(inner.test) == len(stdlib_task.train)
    assert {e.source for e in inner.train}.isdisjoint({e.source for e in inner.test})
    assert {e.source for e in inner.test}.isdisjoint({e.source for e in stdlib_task.test})
    assert {e.label for e in inner.test} == {e.label for e in inner.train} == set(stdlib_task.labels)


def test_majority_accuracy():
    test = tuple(Example(str(i), label, "f") for i, label in enumerate("aab"))
    assert TextTask("t", ("a", "b"), (), test).majority_accuracy == pytest.approx(2 / 3)


def test_csv_and_jsonl_give_the_same_task(tmp_path):
    rows = [(f"text, number {i} \n of it", i % 3) for i in range(30)]
    csv_file, jsonl_file = tmp_path / "a.csv", tmp_path / "a.jsonl"
    csv_file.write_bytes(
        b"\xef\xbb\xbfid,body,kind\n"
        + "".join(f'{i},"{text}",{kind}\n' for i, (text, kind) in enumerate(rows)).encode()
    )
    jsonl_file.write_text("\n".join(json.dumps({"body": text, "kind": kind}) for text, kind in rows) + "\n\n")
    first, second = (read_task(path, "body", "kind") for path in (csv_file, jsonl_file))
    assert [(e.text, e.label) for e in first.train] == [(e.text, e.label) for e in second.train]
    assert [(e.text, e.label) for e in first.test] == [(e.text, e.label) for e in second.test]
    assert first.labels == ("0", "1", "2")
    assert [sum(e.label == label for e in first.test) for label in first.labels] == [2, 2, 2]
    assert len(first.train) == 24
    assert {e.text for e in first.train}.isdisjoint({e.text for e in first.test})
    assert read_task(csv_file, "body", "kind", split_seed=1).fingerprint != first.fingerprint


def test_equal_texts_are_used_once(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\nb,x\na ,x\nc,y\nd,y\n")
    task = read_task(path)
    assert task.dropped == 1
    assert sorted(e.text for e in (*task.train, *task.test)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,kind\na,x\n", r"a\.csv: .*must include 'label'"),
        ("a.csv", "", r"a\.csv: .*must include 'text'"),
        ("a.csv", "text,label\na,x\n  ,y\n", r"a\.csv:3: 'text' is '  ', but must be a text that is not empty"),
        ("a.csv", "text,label\na,x\nb\n", r"a\.csv:3 has fewer than 2 columns"),
        ("a.csv", "text,label\na,x\nb,x\n", r"has \['x'\], but must have at least two labels"),
        ("a.csv", "text,label\na,x\nb,x\nc,y\n", r"labels \['y'\] have one example, but must have"),
        ("a.csv", "text,label\na,x\nb,y\na,y\n", r"a\.csv:4: 'label' is 'y', but must be 'x' as in a\.csv:2"),
        ("a.csv", b"text,label\n\xff,x\n", r"must be UTF-8 CSV"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b"}\n',
            r"a\.jsonl:2: .*must include",
        ),
        ("a.jsonl", '{"text": 3, "label": 1}\n', r"a\.jsonl:1: 'text' is 3, but must be a text"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0.5}\n',
            r"a\.jsonl:1: 'label' is 0\.5, but must be a string or an integer",
        ),
        ("a.jsonl", '{"text": "a", \n', r"a\.jsonl:1.*must be one JSON object"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1.*must be a JSON object"),
        ("a.txt", "text,label\n", r"must end in \.csv or \.jsonl"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_task(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.csv'.*must be an existing"):
        read_task(tmp_path / "nothing.csv")
