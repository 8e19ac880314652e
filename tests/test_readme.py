import re
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("jinja2")
from benchmarks import pages

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run_and_are_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        exec(compile(code, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert "eva: " in out and "14 LoRA layers: 14 fused" in out
    assert all((tmp_path / folder / "adapter_config.json").is_file() for folder in ("adapter", "served"))


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 120
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parents[1] / link).exists(), link


def test_the_numbers_are_those_of_the_records():
    assert pages.block() in README, "run python -m benchmarks.pages"
    assert pages.page() == pages.PAGE.read_text(), "run python -m benchmarks.pages"
    assert len(pages.gains()) == 6  # headings, and five rows
