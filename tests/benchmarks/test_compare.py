"""`python -m benchmarks.compare`: its command line, its summary, and the smallest form of every subject."""

import json
import math

import pytest
import torch

pytest.importorskip("peft")
from benchmarks import compare, lora_layers, models, rates, records, subject
from benchmarks.subject import Row, Subject
from benchmarks.subjects import SUBJECTS, eva, init, linear, lorapro, small_linalg, spectrum, statistics, svd, train


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """The rates of some machine: measuring them takes seconds."""
    found = rates.Rates(1e10, {"float32": 1e11, "float64": 5e10})
    for module in (rates, eva, init, linear, lorapro, small_linalg, spectrum, statistics, svd, train):
        monkeypatch.setattr(module, "here", lambda device="cpu": found)


def measured(name, case, *arguments):
    """An entry, and its rows."""
    entry = compare.run(SUBJECTS[name], compare.parse(SUBJECTS[name], ["--quick", "--case", case, *arguments]))[case]
    json.dumps(entry, allow_nan=False)
    return entry, SUBJECTS[name].rows(entry)


def check_rows(rows, peers, floors=True):
    assert {row.peer for row in rows} == set(peers)
    for row in rows:
        assert row.ours > 0 and row.theirs > 0 and row.ratio == row.theirs / row.ours
        assert not floors or row.over_floor == pytest.approx(row.ours / row.floor)


PEERS = {
    "svd": {"torch.linalg.svd", "torch.svd_lowrank+6", "torch.svd_lowrank+8"},
    "statistics": {"training passes alone"},
    "spectrum": {"svdvals of B A"},
    "small_linalg": {"torch"},
}


@pytest.mark.parametrize(
    ("name", "case", "arguments"),
    [
        ("svd", "tiny", ["--rounds", "1", "--seeds", "1"]),
        ("statistics", "tiny", ["--rounds", "1"]),
        ("spectrum", "adapters", ["--rounds", "1"]),
        *(("small_linalg", op, ["--rounds", "1", "--batch", "3"]) for op in SUBJECTS["small_linalg"].cases),
    ],
)
def test_smallest_form(name, case, arguments, capsys):
    _, rows = measured(name, case, *arguments)
    check_rows(rows, PEERS[name])
    assert "peer / ours" in capsys.readouterr().out


def test_eva_without_peft_has_no_rows():
    entry, rows = measured("eva", "tiny", "--rounds", "1", "--no-peft")
    assert rows == [] and entry["floor"]["seconds"] > 0 and entry["ours_over_forward"] > 0


@pytest.mark.slow
def test_eva_against_peft():
    entry, rows = measured("eva", "tiny", "--rounds", "1")
    check_rows(rows, {"PEFT"})
    assert entry["quality"]["layers_compared"] == 14 and entry["quality"]["captured_minus_peft_worst"] > -1e-6


def test_a_layer_and_a_call_against_its_peers():
    entry = linear.layer(33, 24, 40, 4, 0.05, 1, compiler=False)
    rows = linear.rows({"entries": [entry]})
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert {row.target for row in rows} == {1.4, None} and set(entry["differences"]) == {"hand_written", "ours"}
    _, rows = measured("linear", "call", "--no-compile", "--rounds", "1")
    assert all(row.target is None for row in rows) and {row.group for row in rows} == {"dropout 0", "dropout 0.05"}


@pytest.mark.slow
def test_a_compiled_layer_takes_part():
    entry = linear.layer(33, 24, 40, 4, 0.0, 1, compiler=True)
    check_rows(linear.rows({"entries": [entry]}), set(linear.PEERS.values()))
    assert entry["differences"]["compiled"] < 1e-5


@pytest.mark.parametrize("side", ["hand_written", "ours"])
def test_a_layer_with_wrong_numbers_is_not_timed(side, monkeypatch):
    maker = {"hand_written": "hand_written", "ours": "fused"}[side]
    make = getattr(lora_layers, maker)

    def broken(layer):
        found = make(layer)
        with torch.no_grad():
            found.lora_B["default"].weight.mul_(1.01)
        return found

    monkeypatch.setattr(lora_layers, maker, broken)
    monkeypatch.setattr(records, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="relative differences"):
        linear.layer(33, 24, 40, 4, 0.0, 1, compiler=False)


def test_groups():
    entry = linear.group(17, 24, (40, 8), 4, 0.05, 1)
    check_rows(linear.rows({"entries": [entry]}), {"one by one"})
    # Two base products per layer, three of rank r on either side.
    assert entry["floor"]["flops"] == 4 * 17 * 24 * 48 + 6 * 17 * 4 * (24 + 40 + 24 + 8)


def test_training_step():
    entry, rows = measured("train", "tiny", "--rounds", "1", "--no-compile")
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert rows[0].target == 1.2 and 0 < entry["bytes_ratio"] < 1 and max(entry["differences"].values()) < 1e-4
    assert "ours" in entry["bytes_saved_for_adapters"] and "frozen" not in entry["bytes_saved_for_adapters"]


def test_a_training_step_with_wrong_numbers_is_not_timed(monkeypatch):
    make = lora_layers.hand_written

    def broken(model):
        found = make(model)
        with torch.no_grad():
            next(each for name, each in found.named_parameters() if "lora_A" in name).mul_(1.5)
        return found

    monkeypatch.setattr(lora_layers, "hand_written", broken)
    monkeypatch.setattr(records, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="relative differences"):
        measured("train", "tiny", "--no-compile")


def test_lora_pro(monkeypatch):
    monkeypatch.setattr(lorapro, "LAYERS", ((48, 40),) * 5)
    monkeypatch.setattr(lorapro, "peaks", lambda *_: {"ours": 1, "faithful": 2, "careful": 3})
    entry, rows = measured("lorapro", "full", "--rank", "4", "--rounds", "1")
    check_rows(rows, {"the authors' procedure", "careful torch"})
    assert entry["floor"]["bytes"] == 16 * 2 * 48 * 40 and entry["differences"]["ours"] < 1e-2
    check_rows(measured("lorapro", "efficient", "--rank", "4", "--rounds", "1")[1], {"AdamW, no adjustment"})


def test_init_methods_in_this_process(monkeypatch, tmp_path):
    monkeypatch.setattr(init, "_spawn", lambda name, method, side, environment=None: init.worker(name, method, side))
    options = ["--methods", "pissa", "corda", "--rounds", "1"]
    options = compare.parse(SUBJECTS["init"], ["--quick", "--case", "tiny", *options, "--out", str(tmp_path)])
    entry = compare.run(SUBJECTS["init"], options)["tiny"]
    rows = SUBJECTS["init"].rows(entry)
    check_rows(rows, {"PEFT"})
    assert [row.group for row in rows] == ["pissa", "corda"]
    assert 0.9 < entry["methods"]["pissa"]["energy_ratio"] < 1.01
    # Memory alone keeps the times.
    again = init.measure(
        "tiny", compare.parse(SUBJECTS["init"], ["--quick", "--only", "memory", "--out", str(tmp_path)])
    )
    assert again["methods"]["corda"]["ours"]["seconds"] == entry["methods"]["corda"]["ours"]["seconds"]
    assert again["times_from"] == entry["environment"]


def test_work_counts_inputs_once():
    model, batches = models.case("tiny")
    found = models.work(model, batches)
    tokens, products = 2 * 2 * 48, 2 * (4 * 64 * 64 + 3 * 64 * 172)
    inputs = 2 * (3 * 64 * 65 + 172 * 173)  # of query, key and value; of the output; of gate and up; of down
    assert found.forward == 2 * tokens * products and found.covariance == tokens * inputs


def test_rates_are_measured():
    calls = []

    def interleaved(each):
        calls.append(list(each))
        for call in each.values():
            call()
        return {name: {"p20": took(name), "p50": 9.0} for name in each}

    def took(name):
        return 0.001 if name == "float64 4" else 0.5

    kinds = ("float32", "float64", "bfloat16")
    found, seconds = rates.measure(torch.device("cpu"), interleaved, 1000, (4, 8), kinds)
    assert calls == [["copy"], *([f"{kind} 4", f"{kind} 8"] for kind in kinds)]
    assert set(seconds) == {name for each in calls for name in each} and tuple(found.products) == kinds
    # Of both orders the faster one counts: it is a floor that stands on it.
    assert found.copy == 2 * 1000 / 0.5
    assert found.products["float64"] == 2 * 4**3 / 0.001 and found.products["float32"] == 2 * 8**3 / 0.5


# The command line and the records.
def entry_of(ratios):
    return {"rows": [{"what": f"size {index}", "ratio": ratio} for index, ratio in enumerate(ratios)]}


def fake(name="fake", **settings):
    def rows(entry):
        return [Row(each["what"], "peer", 2.0, 2.0 * each["ratio"], 1.0, 1.5) for each in entry["rows"]]

    cases = {"one": lambda options: entry_of([3.0, 0.5]), "two": lambda options: entry_of([float(options.rounds)])}
    return Subject(name, "about", cases, rows, full=("one", "two"), quick=("two",), rounds=7, **settings)


@pytest.fixture
def only(monkeypatch):
    """A subject that measures nothing, alone."""
    found = fake()
    monkeypatch.setattr(compare, "SUBJECTS", {"fake": found})
    return found


def test_cases_replace_their_entries_and_the_summary_follows(only, tmp_path, capsys):
    assert compare.main(["fake", "--out", str(tmp_path)]) == 0
    one, two = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert (one["case"], one["what"], one["lowest_of"]) == ("one", "size 1", 2)
    assert one["peer_over_ours"] == 0.5 and one["met"] is False and one["ours_over_floor"] == 2.0
    assert two["peer_over_ours"] == 7.0 and two["met"] is True
    found = records.cases("fake", tmp_path)
    assert found["one"]["environment"]["threads"] and found["one"]["rates"]["copy"] == 1e10
    assert compare.main(["all", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert records.cases("fake", tmp_path)["one"] == found["one"]
    assert records.cases("fake", tmp_path)["two"]["rows"][0]["ratio"] == 1.0
    assert [row["peer_over_ours"] for row in compare.summarize(tmp_path)] == [0.5, 1.0]
    assert "0.50 (1.5 asked for)" in capsys.readouterr().out


def test_a_quick_run_writes_no_committed_record(only, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert compare.main(["fake", "--quick"]) == 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="2"):
        compare.main(["fake", "--quick", "--out", str(tmp_path)])
    assert compare.main(["fake", "--case", "one"]) == 0
    assert set(records.cases("fake")) == {"one"}


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["fake", "nothing"], ["--quick"]])
def test_an_unknown_subject_is_named(only, arguments, capsys):
    assert compare.main(arguments) == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["fake", "--case", "three"], ["fake", "--tokens", "3"], ["fake", "--rounds", "0"]]
)
def test_bad_options_are_errors_before_anything_runs(only, arguments):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments)


def test_help_lists_the_subjects(capsys):
    assert compare.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in SUBJECTS)


def test_every_subject_has_its_cases_and_options():
    for name, each in SUBJECTS.items():
        assert each.name == name and set(each.full) | set(each.quick) | set(each.table or ()) <= set(each.cases)
        options = compare.parse(each, ["--quick"])
        assert options.case == list(each.quick) and options.out is None and 1 <= options.rounds <= each.rounds
        full = compare.parse(each, [])
        assert full.out == records.RESULTS and full.rounds == each.rounds


def test_committed_records_give_rows_and_the_summary_is_theirs():
    committed = json.loads((records.RESULTS / "compare.json").read_text())["rows"]
    assert committed == compare.summarize(records.RESULTS), "run make figures"
    for name, each in SUBJECTS.items():
        for case, entry in records.cases(name).items():
            assert entry["environment"]["commit"]
            for row in each.rows(entry):
                assert row.ours > 0 and row.theirs > 0 and (row.floor is None or math.isfinite(row.floor)), (name, case)


def test_durations():
    assert [subject.duration(each) for each in (310.01, 1.234, 0.0367, 4.2e-4, 2000.0)] == [
        "310 s",
        "1.23 s",
        "36.7 ms",
        "420 µs",
        "2000 s",
    ]
