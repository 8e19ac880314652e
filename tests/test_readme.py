import re
from pathlib import Path

import pytest

pytest.importorskip("peft")
from benchmarks import readme

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_examples_run_and_are_short(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        assert len([line for line in code.splitlines() if line.strip()]) <= 15
        exec(compile(code, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert len(names["stats"]) == 14 and "eva: " in out
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_the_numbers_are_those_of_the_records():
    assert readme.block() in README, "run python -m benchmarks.readme"
    assert readme.page() == readme.PAGE.read_text(), "run python -m benchmarks.readme"
