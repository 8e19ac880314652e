"""docs/scaling.md is what its command writes, and small runs do what was planned for them."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
from benchmarks import scaling
from lora_kernels.cli import main

RECORD = json.loads(scaling.RECORD.read_text())


def of(model):
    return [each for each in RECORD["predicted"] if each["model"] == model]


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), (other, key)


def test_the_page_is_that_of_the_record():
    assert scaling.PAGE.read_text() == scaling.page(RECORD), "run python -m benchmarks.scaling"


def test_the_record_is_what_plans_say_now():
    assert_same(scaling.predicted(["7B"]), of("7B"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["70B", "405B"])
def test_the_record_is_what_plans_say_of_large_models(model):
    assert_same(scaling.predicted([model]), of(model))


def test_the_command_on_the_page_gives_its_figures(capsys):
    text = scaling.PAGE.read_text()
    command = text.split("```text\nlora-kernels ")[1].split("```")[0].replace("\\\n", " ").split()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(each for each in of("70B") if (each["world"], each["method"]) == (8, "lora_da"))
    assert found["passes"] == row["passes"] and found["communication"] == row["sent"]
    assert found["cost"]["decompose_seconds"] == pytest.approx(row["decompose_seconds"])


def test_what_does_not_fit_is_not_passed_over():
    refused = [each for each in RECORD["predicted"] if "refused" in each or each["layout"] == "none"]
    assert any(each["model"] == "405B" and each["world"] == 1 for each in refused)
    text = scaling.PAGE.read_text()
    assert "one device: the weights do not fit the device" in text and "**does not fit**" in text
    assert "lower bounds, not forecasts" in text and "None was measured" in text


@pytest.mark.slow
def test_small_runs_hold_and_send_what_was_planned():
    rows = scaling.measure(quick=True)["rows"]
    assert [each["world"] for each in rows] == [1] * 6 + [2] * 6
    for each in rows:
        assert each["found"] == each["planned"], each["case"]
    assert all(each["found"]["reductions"] > 0 for each in rows if each["world"] == 2)
    assert len({each["found"]["passes"] for each in rows}) == 2  # one, and several
    # Half of it would show.
    assert all(each["found"]["bytes"] > 0 for each in rows)
