"""Figures are as new as the records they were drawn from."""

import json
import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("peft")
from benchmarks import figures
from benchmarks.records import ROOT


def test_no_figure_is_older_than_its_record():
    assert json.loads((figures.FOLDER / figures.INDEX).read_text()) == figures.digests(), "run make figures"


def test_the_results_show_every_figure_and_none_that_is_missing():
    shown = set(re.findall(r"\(figures/(\w+)\.svg\)", (ROOT / "docs" / "results.md").read_text()))
    assert shown == set(figures.sources()) == {file.stem for file in figures.FOLDER.glob("*.svg")}


def test_a_changed_record_is_seen(tmp_path, monkeypatch):
    before = figures.digests()
    for file in figures.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert figures.digests() == before
    (tmp_path / "train.json").write_text((tmp_path / "train.json").read_text() + "\n")
    changed = figures.digests()
    assert changed.pop("train") != before.pop("train") and changed == before


def test_drawn_twice_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "sources", lambda: {"train": ("train",), "lora_pro": ("lora_pro",)})
    for folder in ("one", "two"):
        figures.main(tmp_path / folder)
    for name in ("train", "lora_pro"):
        one, two = ((tmp_path / folder / f"{name}.svg").read_bytes() for folder in ("one", "two"))
        assert one == two and b"<dc:date>" not in one
