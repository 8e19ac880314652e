import pytest
import torch

pytest.importorskip("peft")
from benchmarks.demo import plots, report
from benchmarks.demo.config import OURS, STOCK
from benchmarks.demo.report import Row, loss_at, rows, seconds_to, verdict
from benchmarks.demo.side import Evaluation, Side

CURVE = [Evaluation(0, 2.0, 4.0), Evaluation(10, 12.0, 2.0), Evaluation(20, 22.0, 1.0), Evaluation(30, 32.0, 1.5)]


def side(name, step_seconds, losses, start=0.0):
    """A side of steps of equal time, evaluated after every step."""
    one = Side(name, torch.nn.Linear(1, 1), None, 1e-3, 1, start)
    one.step_seconds = [step_seconds] * (len(losses) - 1)
    one.evaluations = [Evaluation(step, start + step * step_seconds, loss) for step, loss in enumerate(losses)]
    return one


@pytest.mark.parametrize(("seconds", "loss"), [(0, 4.0), (2, 4.0), (7, 3.0), (12, 2.0), (27, 1.25), (99, 1.5)])
def test_the_loss_at_a_time(seconds, loss):
    assert loss_at(CURVE, seconds) == pytest.approx(loss)


@pytest.mark.parametrize(("loss", "seconds"), [(5.0, 2.0), (3.0, 7.0), (2.0, 12.0), (1.0, 22.0), (0.9, None)])
def test_the_time_to_a_loss_is_the_first(loss, seconds):
    assert seconds_to(CURVE, loss) == (None if seconds is None else pytest.approx(seconds))


def test_a_better_run():
    stock, ours = side(STOCK, 2.0, [3.0, 2.0, 1.0]), side(OURS, 1.0, [3.0, 1.0, 0.5], start=1.0)
    step, memory, steps, seconds, time, start = rows(stock, ours, {STOCK: 200, OURS: 150})
    assert (step.difference, step.verdict) == ("2.00x as fast", "better")
    assert (memory.difference, memory.verdict) == ("25% less", "better")
    assert (steps.stock, steps.ours, steps.verdict) == (1.0, 0.5, "better")
    # Our run has taken 3 s, PEFT's 4.
    assert seconds.measure == "loss after 3 s, start included" and (seconds.stock, seconds.ours) == (1.5, 0.5)
    assert (time.stock, time.ours, time.difference) == (4.0, 2.0, "2.00x as fast")
    assert (start.stock, start.ours, start.verdict) == (0.0, 1.0, "")
    lines = verdict([step, memory, steps, seconds, time, start], 1.0)
    assert lines[0].startswith("Gained: a training step (median) (2.00x as fast); peak memory")
    assert lines[1] == "The start costs as much time as 1.0 training steps, once." and "one seed" in lines[2]


def test_it_is_said_plainly_where_nothing_is_gained():
    stock, ours = side(STOCK, 1.0, [3.0, 2.0, 1.0]), side(OURS, 1.01, [3.0, 2.5, 1.3], start=2.0)
    measures = rows(stock, ours, {})
    step, memory, steps, seconds, time, _ = measures
    assert [row.verdict for row in measures] == ["level", "", "worse", "worse", "worse", ""]
    assert memory.cell(memory.ours) == "–" and time.difference == "ours does not get there"
    assert seconds.ours == 3.0 and steps.difference == "30% more"
    gained, level, worse, *_ = verdict(measures, 2.0)
    assert (
        gained == "Gained: nothing." and level == "Nothing gained, within 2%: a training step (median) (0.99x as fast)."
    )
    assert worse.startswith("WORSE than stock PEFT: loss after 2 steps (30% more); loss after 2 s")


def test_a_goal_that_only_one_side_reaches():
    assert (Row("time", "s", None, 3.0).verdict, Row("time", "s", 3.0, None).verdict) == ("better", "worse")
    assert Row("time", "s", None, None).verdict == ""


def test_table_and_picture(tmp_path):
    from rich.console import Console

    stock, ours = side(STOCK, 2.0, [3.0, 2.0, 1.0]), side(OURS, 1.0, [3.0, 1.0, 0.5])
    console = Console(record=True, width=140)
    console.print(report.table(rows(stock, ours, {STOCK: 2 * 10**9, OURS: 10**9})))
    text = console.export_text()
    assert "2000 MB" in text and "50% less  better" in text and "2.00x as fast  better" in text
    plots.plot_losses({one.name: one.evaluations for one in (stock, ours)}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
