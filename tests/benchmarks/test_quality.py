import dataclasses
import functools
import json
import math

import pytest

pytest.importorskip("peft")
from benchmarks.demo import study_report
from benchmarks.demo.side import Recipe
from benchmarks.demo.study import (
    ARMS,
    QUICK,
    Arm,
    Job,
    Protocol,
    Runs,
    Setup,
    Worker,
    _suggested,
    general_texts,
    main,
    neighbour,
    read,
    study,
    tune,
)
from benchmarks.docstrings import docstring_task
from lora_kernels.api.learning_rate import SHARES, Share
from lora_kernels.init import EVA


@pytest.fixture(scope="module", autouse=True)
def docstrings_are_read_once():
    """Every study reads those of the standard library, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.demo.study.docstring_task", functools.cache(docstring_task))
        yield


@pytest.fixture(scope="module")
def finished(tiny_decoder, tmp_path_factory):
    """A quick study of all arms: its folder, and what its partial file held."""
    folder = tmp_path_factory.mktemp("quality")
    assert main(command(folder, tiny_decoder)) == 0
    return folder


def command(folder, model):
    partial = str(folder / "partial.jsonl")
    files = ["--out", str(folder), "--resume", partial, "--cores", str(folder / "cores")]
    return ["--quick", "--workers", "1", "--model", str(model), *files]


def grid(arm):
    return ARMS[arm].rates or QUICK.rates


def test_the_study_from_end_to_end(finished):
    record = json.loads((finished / "quality_word_problems_quick.json").read_text())
    assert set(record["summary"]) == set(ARMS) and set(record["comparisons"]) == set(ARMS) - {"random"}
    for arm, choice in record["tuning"].items():
        assert set(choice["losses"]) == {f"{rate:g}" for rate in grid(arm)}
    runs = study_report.final_runs(record)
    for arm, (run,) in runs.items():
        assert [point["step"] for point in run["evaluations"]] == [2, 4, 8]
        assert run["learning_rate"] == record["tuning"][arm]["rate"]
        for point in run["evaluations"]:
            assert point["seconds"] > run["init_seconds"] > 0 and point["general_loss"] > 0
        assert run["evaluations"][-1]["loss"] == run["final_loss"] < run["before"]["loss"]
    # Only LoRA-One moves the function before the first step.
    starts = {arm: run["before"]["loss"] for arm, (run,) in runs.items() if arm != "lora_one"}
    assert list(starts.values()) == pytest.approx([starts["random"]] * len(starts), rel=1e-3)
    assert study_report.before(record).startswith(f"Before training: loss {starts['random']:.3f}, general loss ")
    # Every arm is another one.
    assert len({run["final_loss"] for (run,) in runs.values()}) == len(ARMS)
    assert (finished / "quality_word_problems_quick.png").stat().st_size > 20_000
    assert any((finished / "cores").iterdir())
    assert set(record["advice"]) == set(ARMS) - {"lora_dash"}
    for arm, row in record["advice"].items():
        assert row["lowest"] == min(record["tuning"][arm]["losses"].values())
        assert row.get("share") == (row["best"] / row["turn"] if "turn" in row else None)
        # A model with random weights: its lines are too flat for a suggestion.
        assert row["reasons"] if "rate" not in row else row["excess"] == row["loss"] / row["lowest"] - 1
    asked = [run for run in record["runs"] if run["part"] == "advice"]
    suggested = {(run["arm"], float(f"{run['rate']:.1e}")) for run in asked if run["rate"] is not None}
    new = [pair for pair in suggested if pair[1] not in grid(pair[0])]
    assert len(record["runs"]) == sum(len(grid(arm)) + 1 for arm in ARMS) + len(asked) + len(new)
    assert study_report.comparison_rows(record)[1][3] == "one seed: no verdict"


def test_the_best_rate_of_a_sweep_lies_between_the_rates_that_were_tried():
    """The least of a parabola in the logarithm of the rate is found exactly."""
    losses = {rate: (math.log(rate) - math.log(2e-3)) ** 2 + 1 for rate in (3e-4, 1e-3, 3e-3, 1e-2)}
    assert study_report.best_rate(losses) == pytest.approx(2e-3)
    assert study_report.best_rate({1e-3: 1.0, 3e-3: 2.0}) == 1e-3  # at the edge


def test_advice_is_judged_by_the_sweep_and_by_a_run_of_its_own():
    runs = [
        {
            "part": "advice",
            "arm": "eva",
            "seed": 100,
            "optimizer": "adamw",
            "turn": 4e-3,
            "rate": 1.234e-3,
            "reason": None,
        },
        {"part": "tune", "arm": "eva", "seed": 100, "learning_rate": 1.2e-3, "final_loss": 1.1},
        {"part": "tune", "arm": "eva", "seed": 100, "learning_rate": 1e-3, "final_loss": 1.0},
        {"part": "advice", "arm": "pissa", "seed": 100, "turn": 8e-3, "rate": None, "reason": "flat"},
    ]
    sweep = {"losses": {"0.001": 1.0, "0.002": 2.0}}
    record = {"runs": runs, "tuning": {"eva": sweep, "pissa": sweep}}
    record["advice"] = study_report.advice(record)
    eva, pissa = record["advice"]["eva"], record["advice"]["pissa"]
    assert (
        eva["share"] == pytest.approx(0.25)
        and eva["ratio"] == pytest.approx(1.2)
        and eva["excess"] == pytest.approx(0.1)
    )
    assert "rate" not in pissa and pissa["reasons"] == ["flat"]
    assert study_report.hits(record).startswith(
        "Of 2 arms the suggestion is within a factor of 2 of the sweep's best rate for 1;"
    )
    assert study_report.hits(record).endswith("of 1 runs at a suggestion 0 end within 1 % of the sweep's lowest loss.")
    assert study_report.advice_rows(record)[2][-3:] == ["none", "-", "-"]
    record["runs"].pop(1)
    record["advice"] = study_report.advice(record)
    assert study_report.advice_rows(record)[1][-2:] == ["1.20", "not run"]


def test_rates_alone_come_from_the_runs_of_a_study(finished, tiny_decoder, monkeypatch):
    whole = json.loads((finished / "quality_word_problems_quick.json").read_text())
    monkeypatch.setattr(Worker, "run", lambda self, job: pytest.fail(f"{job} is done"))
    assert main(["--rates", *command(finished, tiny_decoder)]) == 0
    record = json.loads((finished / "rates_word_problems_quick.json").read_text())
    assert record["advice"] == whole["advice"] and record["tuning"] == whole["tuning"]
    assert record["protocol"]["seeds"] == [] and "summary" not in record
    assert {run["part"] for run in record["runs"]} == {"tune", "advice"}
    assert len(study_report.tables(record)) == 1
    assert (finished / "rates_word_problems_quick.png").stat().st_size > 20_000


def test_a_line_that_was_measured_is_judged_by_todays_shares(monkeypatch):
    entry = {"optimizer": "adamw", "turn": 4e-3, "rate": 1.0, "low": 1.0, "high": 1.0, "reason": None}
    monkeypatch.setitem(SHARES, "adamw", Share(0.1, 0.5, 2.0))
    assert _suggested(entry) == pytest.approx({"low": 4e-4, "rate": 2e-3, "high": 8e-3})
    assert _suggested({**entry, "reason": "flat"}) == {"low": None, "rate": None, "high": None}


def untimed(value):
    """A run without what the clock says."""
    if isinstance(value, list):
        return [untimed(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: untimed(item) for name, item in value.items() if "seconds" not in name}


def test_a_killed_study_goes_on_and_repeats_to_the_bit(finished, tiny_decoder, monkeypatch):
    first = json.loads((finished / "quality_word_problems_quick.json").read_text())
    partial = finished / "partial.jsonl"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-20])
    done = []
    run = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, job: done.append(job) or run(self, job))
    main(command(finished, tiny_decoder))
    assert len(done) == 1 and done[0].part == "final"
    again = json.loads((finished / "quality_word_problems_quick.json").read_text())
    bare = [[untimed(run) for run in record["runs"]] for record in (first, again)]
    assert bare[0] == bare[1] and first["comparisons"] == again["comparisons"]
    done.clear()
    main(command(finished, tiny_decoder))
    assert not done  # the run that was cut off is there now


def test_runs_of_another_study_do_not_count(finished, tiny_decoder):
    setup = Setup(model=tiny_decoder, protocol=QUICK, arms={"random": Arm()})
    another = {"another": "study", "arms": {"random": Arm().settings()}}
    assert not Runs(setup, 1, finished / "partial.jsonl", another).entries


def test_a_study_goes_on_from_a_record(finished, tiny_decoder, monkeypatch):
    done = []
    run = Worker.run
    monkeypatch.setattr(Worker, "run", lambda self, job: done.append(job) or run(self, job))
    record = finished / "quality_word_problems_quick.json"
    whole = json.loads(record.read_text())
    arms = {name: ARMS[name] for name in whole["arms"]}
    assert study(Setup(model=tiny_decoder, protocol=QUICK, arms=arms), extend=[record])["runs"] == whole["runs"]
    assert not done
    # Another evaluation on the way changes the final runs alone, another length all of them.
    protocol = dataclasses.replace(QUICK, evaluate_at=(4, 8), rates=(1e-3,))
    setup = Setup(model=tiny_decoder, protocol=protocol, arms={"random": ARMS["random"]})
    study(setup, check=False, extend=[record])
    assert [job.part for job in done] == ["final"]
    done.clear()
    study(
        dataclasses.replace(setup, protocol=dataclasses.replace(protocol, evaluate_at=(4, 6))),
        check=False,
        extend=[record],
    )
    assert {job.part for job in done} == {"tune", "advice", "final"}


def test_a_study_of_fewer_arms_finds_its_runs(finished, tiny_decoder, monkeypatch):
    monkeypatch.setattr(Worker, "run", lambda self, job: pytest.fail(f"{job} is done already"))
    record = study(Setup(model=tiny_decoder, protocol=QUICK, arms={"random": Arm()}), 1, finished / "partial.jsonl")
    assert {run["arm"] for run in record["runs"]} == {"random"}


def test_other_processes_give_the_same_bits(finished, tiny_decoder):
    setup = Setup(model=tiny_decoder, protocol=QUICK, arms={"random": Arm(), "eva": Arm(Recipe(EVA()))})
    job = Job("tune", "eva", 100, 1e-3)
    with Runs(setup, 2, None, {}) as runs:
        (there,) = runs.do([job])
    (here,) = Runs(setup, 1, None, {}).do([job])
    assert there["train_loss"] == here["train_loss"] and there["final_loss"] == here["final_loss"]


def test_no_validation_or_test_text_is_trained_on(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(40)))
    for setup, sizes in ((Setup(), (2000, 64, 64)), (Setup(own), (32, 4, 4))):
        final, tune = (read(setup)[part] for part in ("final", "tune"))
        parts = [set(final.train), set(tune.test), set(final.test)]
        assert final.train == tune.train and tuple(map(len, parts)) == sizes
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    own.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(9)))
    with pytest.raises(ValueError, match="must have at least 10 different texts"):
        read(Setup(own))


def test_general_texts_are_docstrings_without_masked_names():
    texts = general_texts(8)
    assert len(set(texts)) == 8 and not any(example.prompt or "[MASK]" in example.answer for example in texts)


def test_adapters_have_the_rank_that_is_asked_for(monkeypatch, capsys):
    class Asked(Exception):
        pass

    def refuse(setup, *_):
        raise Asked(setup.protocol.rank)

    monkeypatch.setattr("benchmarks.demo.study.study", refuse)
    for options, rank in ((["--short", "--rank", "3"], 3), (["--short"], 8), (["--quick"], 4)):
        with pytest.raises(Asked, match=f"^{rank}$"):
            main(options)
    with pytest.raises(SystemExit):
        main(["--rank", "0"])
    assert "--rank must be at least 1" in capsys.readouterr().err


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
        study(Setup(tmp_path, arms={"eva": Arm(Recipe(EVA()))}))
    with pytest.raises(SystemExit):
        main(["--workers", "0"])
