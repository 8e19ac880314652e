import io
import math
import statistics

import pytest
from rich.console import Console

from benchmarks.demo import intervals, plots, report
from benchmarks.demo.intervals import compare
from benchmarks.demo.training import Evaluation, Result


def make_run(arm, seed, losses, steps=(10, 20), accuracy=0.5, init=0.0, ranks=None):
    curve = [2.0 * 0.95**i for i in range(20)]
    evaluations = [Evaluation(step, loss, accuracy) for step, loss in zip(steps, losses, strict=True)]
    return Result(arm, seed, 1e-3, init, 10.0, 1000, ranks or {"q": 4, "v": 4}, curve, evaluations, None)


def make_runs(random, eva):
    return [
        make_run(arm, seed, losses, init=init)
        for arm, rows, init in (("random", random, 0.0), ("eva", eva, 2.0))
        for seed, losses in enumerate(rows)
    ]


def test_compare_is_a_paired_t_interval():
    random, method = [1.00, 1.10, 1.30], [0.90, 1.02, 1.18]
    comparison = compare(random, method, lower_is_better=True)
    differences = [-0.10, -0.08, -0.12]
    assert comparison.difference == pytest.approx(-0.10)
    assert comparison.half_width == pytest.approx(4.303 * statistics.stdev(differences) / math.sqrt(3))
    assert comparison.verdict == "ahead"
    assert compare(random, method, lower_is_better=False).verdict == "behind"
    assert compare(method, random, lower_is_better=True).verdict == "behind"
    # The same mean difference with a wide spread shows nothing.
    assert compare([1.0, 1.1, 1.3], [0.5, 1.3, 1.3], lower_is_better=True).verdict == "level"
    assert compare([1.0], [0.5], lower_is_better=True) == intervals.Comparison(-0.5, None, "one seed")
    with pytest.raises(ValueError, match="method has 1 values, but must have as many as random: 2"):
        compare([1.0, 2.0], [1.0], lower_is_better=True)


def test_t_quantiles_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(intervals.T_QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


@pytest.mark.parametrize(
    ("eva", "expected", "end"),
    [
        ([(1.0, 0.8), (1.01, 0.8), (0.99, 0.81)], "ahead at steps 10 and 20.", "ends with the lower loss (-0.1"),
        (
            [(1.0, 0.9), (1.01, 1.1), (0.99, 1.01)],
            "ahead at step 10, then not distinguishable at step 20.",
            "within what",
        ),
        (
            [(1.5, 1.3), (1.52, 1.3), (1.5, 1.32)],
            "not distinguishable at step 10, then behind at step 20.",
            "HIGHER loss (+0.3",
        ),
    ],
)
def test_the_verdict_follows_the_numbers(eva, expected, end):
    random = [(1.5, 1.0), (1.52, 1.0), (1.47, 1.0)]
    lines = report.verdict(make_runs(random, eva))
    assert lines[0] == f"Held-out loss, EVA against random LoRA: {expected}"
    assert end in lines[1]
    # 10 s for 20 steps: 2 s of initialisation are 4 steps.
    assert lines[2] == "Held-out accuracy at the end: EVA is not distinguishable (+0.0 ± 0.0 pp)."
    assert lines[3] == "The initialisation took 2.0 s, the time of 4 training steps."


def test_the_verdict_says_where_accuracy_is_behind():
    rows = [(1.5, 1.0), (1.52, 1.0), (1.47, 1.0)]
    accuracies = {"random": (0.60, 0.62, 0.61), "eva": (0.55, 0.56, 0.56)}
    runs = [
        make_run(arm, seed, losses, accuracy=accuracies[arm][seed])
        for arm in ("random", "eva")
        for seed, losses in enumerate(rows)
    ]
    # Differences -5, -6 and -5 points: mean -5.33, deviation 0.577, times 4.303 over the root of 3.
    assert "Held-out accuracy at the end: EVA is behind (-5.3 ± 1.4 pp)." in report.verdict(runs)


def test_no_verdict_from_one_seed_or_one_arm():
    (line,) = report.verdict(make_runs([(1.5, 1.0)], [(1.0, 0.75)]))
    assert line == "One seed shows no spread, so no verdict: EVA ends -0.250 away in held-out loss."
    assert report.verdict([make_run("random", 0, (1.0, 0.9)), make_run("random", 1, (1.0, 0.9))]) == []


def test_table_and_summary_show_mean_spread_and_difference():
    runs = make_runs([(1.5, 1.0), (1.6, 1.2)], [(1.0, 1.0), (1.08, 1.2)])
    output = io.StringIO()
    Console(file=output, width=140).print(report.table(runs))
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in output.getvalue().splitlines()
        if line.startswith("│")
    }
    assert rows["held-out loss @ 10"] == ["1.550 ± 0.071", "1.040 ± 0.057", "-0.510 ± 0.127", "ahead"]
    assert rows["held-out loss @ 20"][3] == "level"
    assert rows["held-out accuracy @ 20"][:3] == ["50.0% ± 0.0%", "50.0% ± 0.0%", "+0.0 ± 0.0 pp"]
    assert rows["initialisation"][:2] == ["0.0 s ± 0.0 s", "2.0 s ± 0.0 s"]
    assert rows["trained parameters"][0] == "1,000"
    summary = report.summary(runs)
    assert summary["random"]["loss_mean"] == pytest.approx([1.55, 1.1])
    assert summary["eva"]["loss_deviation"] == pytest.approx(
        [
            statistics.stdev([1.0, 1.08]),
            statistics.stdev([1.0, 1.2]),
        ]
    )


def test_plots_draw_the_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    runs = make_runs([(1.5, 1.0), (1.6, 1.2)], [(1.0, 0.9), (1.08, 1.0)])
    plots.plot_losses(runs, tmp_path / "loss.png")
    image = imread(tmp_path / "loss.png")
    assert image.shape[1] >= 1000 and image[..., :3].std() > 0.02
    other = [make_run(r.arm, r.seed, (3.0, 2.9)) if r.arm == "eva" else r for r in runs]
    plots.plot_losses(other, tmp_path / "other.png")
    assert (imread(tmp_path / "other.png") != imread(tmp_path / "loss.png")).any()
