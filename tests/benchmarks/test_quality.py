import dataclasses
import json

import pytest

pytest.importorskip("peft")
from benchmarks.demo import study_report
from benchmarks.demo.data import docstring_task
from benchmarks.demo.study import (
    ARMS,
    QUICK,
    Arm,
    Job,
    Protocol,
    Runs,
    Setup,
    Worker,
    main,
    neighbour,
    read,
    study,
    tune,
)
from lora_kernels.init import EVA


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A quick study of all arms: its folder, and what its partial file held."""
    folder = tmp_path_factory.mktemp("quality")
    lines = ["text,category"]
    words = ["warm", "cold", "round", "square", "big", "small", "old"]
    for label in ("red", "green", "blue"):
        lines += [f"{label} {first} {second},{label}" for first in words for second in words[:3]]
    (folder / "colours.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(command(folder, tiny_model)) == 0
    return folder


def command(folder, model):
    data, partial = str(folder / "colours.csv"), str(folder / "partial.jsonl")
    options = ["--quick", "--workers", "1", "--model", str(model), "--out", str(folder), "--resume", partial]
    return ["--data", data, *options]


def grid(arm):
    return ARMS[arm].rates or QUICK.rates


def test_the_study_from_end_to_end(finished):
    record = json.loads((finished / "quality_colours_quick.json").read_text())
    assert set(record["summary"]) == set(ARMS) and set(record["comparisons"]) == set(ARMS) - {"random"}
    for arm, choice in record["tuning"].items():
        assert set(choice["losses"]) == {f"{rate:g}" for rate in grid(arm)}
    runs = study_report.final_runs(record)
    for arm, (run,) in runs.items():
        assert [point["step"] for point in run["evaluations"]] == [2, 4, 8]
        assert run["learning_rate"] == record["tuning"][arm]["rate"] and run["head_rate"] == 0.003
        assert run["ranks_in_all"] == 4 * 13 and (run["init_seconds"] > 0) == (ARMS[arm].method is not None)
    # Every arm is another one.
    assert len({run["final_loss"] for (run,) in runs.values()}) == len(ARMS)
    assert (finished / "quality_colours_quick.png").stat().st_size > 20_000
    # The run that tried the head is one of random LoRA's.
    assert len(record["runs"]) == sum(len(grid(arm)) + 1 for arm in ARMS)
    assert study_report.comparison_rows(record)[1][3] == "one seed: no verdict"


def test_a_killed_study_goes_on_and_repeats_to_the_bit(finished, tiny_model, monkeypatch):
    first = json.loads((finished / "quality_colours_quick.json").read_text())
    partial = finished / "partial.jsonl"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-20])
    done = []
    run = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, job: done.append(job) or run(self, job))
    main(command(finished, tiny_model))
    assert len(done) == 1 and done[0].part == "final"
    again = json.loads((finished / "quality_colours_quick.json").read_text())
    times = {"seconds", "init_seconds", "train_seconds"}
    bare = [[{k: v for k, v in each.items() if k not in times} for each in rec["runs"]] for rec in (first, again)]
    assert bare[0] == bare[1] and first["comparisons"] == again["comparisons"]
    done.clear()
    main(command(finished, tiny_model))
    assert not done  # the run that was cut off is there now


def test_runs_of_another_study_do_not_count(finished, tiny_model):
    setup = Setup(finished / "colours.csv", model=tiny_model, protocol=QUICK, arms={"random": Arm()})
    assert not Runs(setup, 1, finished / "partial.jsonl", {"another": "study"}).entries


def test_other_processes_give_the_same_bits(finished, tiny_model):
    setup = Setup(finished / "colours.csv", model=tiny_model, protocol=QUICK, arms={"random": Arm(), "eva": Arm(EVA())})
    job = Job("tune", "eva", 100, 1e-3, 3e-3)
    with Runs(setup, 2, None, {}) as runs:
        (there,) = runs.do([job])
    (here,) = Runs(setup, 1, None, {}).do([job])
    assert there["train_loss"] == here["train_loss"] and there["final_loss"] == here["final_loss"]


def test_without_data_the_task_is_the_demos():
    tasks = read(Setup())
    assert tasks["final"].fingerprint == docstring_task().fingerprint
    texts = {example.text for example in tasks["final"].test}
    assert not texts & {example.text for part in ("train", "test") for example in getattr(tasks["tune"], part)}


def test_a_folder_keeps_its_split_and_no_test_text_is_trained_on(tmp_path):
    rows = [f"text {i} of {label},{label}" for label in "ab" for i in range(20)]
    (tmp_path / "train.csv").write_text("\n".join(["text,intent", *rows, rows[0]]) + "\n", encoding="utf-8")
    (tmp_path / "test.csv").write_text("\n".join(["text,intent", rows[3], "new,b"]) + "\n", encoding="utf-8")
    tasks = read(Setup(tmp_path))
    final, tuning = tasks["final"], tasks["tune"]
    assert [example.text for example in final.test] == ["text 3 of a", "new"] and final.dropped == 2
    assert final.train == tuning.train and (len(final.train), len(tuning.test)) == (35, 4)
    parts = [{example.text for example in part} for part in (final.train, tuning.test, final.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    (tmp_path / "test.csv").write_text("text,intent\nnew,c\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"labels without training texts: \['c'\]"):
        read(Setup(tmp_path))
    (tmp_path / "test.csv").unlink()
    with pytest.raises(ValueError, match=r"must hold one of test\.csv and test\.jsonl"):
        read(Setup(tmp_path))


def test_the_grid_goes_on_in_thirds():
    assert [neighbour(rate, up=True) for rate in (1e-4, 3e-4, 1e-2, 3e-2, 1.0)] == [3e-4, 1e-3, 3e-2, 1e-1, 3.0]
    assert [neighbour(rate, up=False) for rate in (1e-4, 3e-4, 1e-2, 3e-2, 1.0)] == [3e-5, 1e-4, 3e-3, 1e-2, 0.3]


def test_a_grid_grows_where_the_best_is_at_its_edge():
    best = {"inside": 1e-3, "once": 1e-5, "up": 3e-2, "beyond": 10.0}
    asked = []

    def losses_of(wanted):
        asked.append(wanted)
        return {(name, rate): abs(rate / best[name] - 1) + (rate < best[name]) for name, rate in wanted}

    choice = tune(dict.fromkeys(best, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)), 2, losses_of)
    assert {name: (each["rate"], each["at_edge"]) for name, each in choice.items()} == {
        "inside": (1e-3, False),
        "once": (1e-5, True),
        "up": (3e-2, False),
        "beyond": (1e-1, True),
    }
    assert len(asked[0]) == 20
    assert asked[1] == [("once", 3e-5), ("up", 3e-2), ("beyond", 3e-2)]
    assert asked[2] == [("once", 1e-5), ("up", 1e-1), ("beyond", 1e-1)]
    assert len(asked) == 3


def test_a_rate_that_diverges_bounds_the_grid():
    choice = tune({"x": (1e-3, 1e-2)}, 2, lambda wanted: {k: None if k[1] > 1e-2 else 1 - k[1] for k in wanted})
    assert choice["x"] == {"rate": 1e-2, "at_edge": False, "losses": {"0.001": 0.999, "0.01": 0.99, "0.03": None}}


def made_up(losses, accuracies=None, diverged=()):
    """A record of two arms: per seed, the difference of the method from random LoRA at steps 25 and 200."""
    runs = []
    for seed in range(3):
        for arm in ("random", "eva"):
            change = losses[seed] if arm == "eva" else (0.0, 0.0)
            gain = (accuracies or [(0.0, 0.0)] * 3)[seed] if arm == "eva" else (0.0, 0.0)
            points = [
                {"step": step, "loss": 2.0 + seed + change[i], "accuracy": 0.5 + 0.01 * seed + gain[i]}
                for i, step in enumerate((25, 200))
            ]
            run = {"part": "final", "arm": arm, "seed": seed, "evaluations": points}
            runs.append({"diverged": "why", **run, "evaluations": []} if (arm, seed) in diverged else run)
    choice = {"rate": 1e-3, "at_edge": False}
    protocol = dataclasses.asdict(dataclasses.replace(Protocol(), evaluate_at=(25, 200)))
    record = {"protocol": protocol, "arms": {"random": None, "eva": {}}, "runs": runs}
    record["tuning"] = {"random": choice, "eva": choice}
    return {**record, **study_report.findings(record)}


def test_what_is_said_of_a_method_that_helps_and_then_does_not():
    record = made_up([(-0.2, 0.1), (-0.21, -0.1), (-0.19, 0.0)])
    row = ["EVA", "+0.000 ± 0.248", "+0.0 ± 0.0 pp", "helps at 25", "not distinguishable"]
    assert study_report.comparison_rows(record)[1] == row
    assert study_report.chance(record) == "3 seeds; of 4 comparisons at 95 %, 0.2 are expected to differ by chance."
    assert study_report.mean_rows(record)[2][:3] == ["EVA", "0.001", "2.800"]
    assert record["summary"]["eva"]["loss"][0] == pytest.approx({"mean": 2.8, "deviation": 0.99, "seeds": 3}, abs=0.02)


def test_what_is_said_of_a_method_that_harms():
    record = made_up([(0.2, 0.5), (0.21, 0.5), (0.19, 0.51)], [(-0.1, 0.2), (-0.1, 0.2), (-0.11, 0.21)])
    assert study_report.comparison_rows(record)[1][3:] == ["harms at 25 and 200", "helps at 200; harms at 25"]


def test_what_is_said_where_nothing_can_be_told_apart_or_a_seed_diverged():
    record = made_up([(0.2, -0.5), (-0.2, 0.5), (0.0, 0.1)])
    assert study_report.comparison_rows(record)[1][3:] == ["not distinguishable", "not distinguishable"]
    record = made_up([(-0.2, -0.5)] * 3, diverged=[("eva", 1)])
    assert record["comparisons"]["eva"] is None
    assert study_report.comparison_rows(record)[1] == ["EVA", *["diverged"] * 4]


def test_arms_need_something_to_be_compared_with(tmp_path):
    with pytest.raises(ValueError, match="must include 'random'"):
        study(Setup(tmp_path, arms={"eva": Arm(EVA())}))
    with pytest.raises(SystemExit):
        main(["--workers", "0"])
