"""The page of a report: where layers stand in a grid, how values become colours, and what is notable."""

import math
from dataclasses import replace

import pytest
import torch

from lora_kernels.landscape import Adapter, Diagnosis, LayerDiagnosis, Thresholds, judge, measure, overall
from lora_kernels.landscape.diagnosis_page import _FINDINGS, diagnosis_page, findings
from lora_kernels.landscape.page import Curve, Finding, Grid, Page, layout, select
from lora_kernels.landscape.weights import Overlap, WeightNorms


def diagnosis(adapters):
    layers = tuple(LayerDiagnosis(name, seen, judge(seen)) for name, seen in measure(adapters).items())
    return Diagnosis("out", layers, overall(layer.verdict for layer in layers), Thresholds())


def adapter(name, b=0.3, weight=None, rank=4, used=4):
    generator = torch.Generator().manual_seed(len(name))
    a = torch.linalg.qr(torch.randn(16, rank, generator=generator)).Q.mT
    factor = b * torch.linalg.qr(torch.randn(12, rank, generator=generator)).Q
    factor[:, used:] *= 1e-4
    return Adapter(name, a, factor, 1.0, None if weight is None else WeightNorms(weight, weight))


@pytest.mark.parametrize(
    ("names", "blocks", "labels"),
    [
        ([f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in "qk"], [0, 1], ["q", "k"]),
        (["h.3.lin", "lin", "h.10.lin"], [3, 10], ["h.*.lin", "lin"]),
        (
            ["bert.0.attention.output.dense", "bert.0.output.dense", "pooler.dense"],
            [0],
            ["attention…dense", "bert.*.output.dense", "pooler.dense"],
        ),
        (["vision.layers.0.q", "text.layers.0.q"], [0], ["vision.layers.*.q", "text.layers.*.q"]),
        ([f"{part}.layers.0.self_attn.q" for part in ("vision", "text")], [0], ["vision…q", "text…q"]),
        (["a.x.layers.0.self_attn.q", "a.y.layers.0.self_attn.q"], [0], ["x…q", "y…q"]),
        (["l.0.mlp.up", "l.1.mlp.experts.3.up"], [0, 1], ["mlp.up", "experts.*.up"]),
        (["0", "2"], [0, 2], ["*"]),
        (["a." + 5000 * "9" + ".b"], [], ["b"]),
        ([], [], []),
    ],
)
def test_rows_are_kinds_of_modules_and_columns_are_blocks(names, blocks, labels):
    found, rows = layout(f"base_model.model.{name}" for name in names)
    assert found == blocks and [row.label for row in rows] == labels
    assert sorted(name for row in rows for cell in row.cells for name in cell) == sorted(
        f"base_model.model.{name}" for name in names
    )


def test_experts_of_a_block_share_a_cell_and_a_head_has_a_row():
    names = [f"layers.{i}.experts.{j}.up" for i in (0, 1) for j in range(3)]
    blocks, rows = layout([*names, "head"])
    assert blocks == [0, 1] and [len(cell) for cell in rows[0].cells] == [3, 3]
    assert rows[1].cells == (("head",),) and rows[1].span == 2


def test_colours_follow_the_values():
    values = {"none": None, "nan": math.nan, "low": 0.0, "high": 1.0, "over": math.inf}
    grid = Grid(title="", meaning="", values=values)
    colours = {name: grid.colours([name])[0] for name in values}
    assert colours["none"] == grid.colours(["unknown"])[0] == grid.colours([])[0]
    assert colours["over"] == colours["high"] and len(set(colours.values())) == 4
    assert grid.colours(["low", "high"]) == replace(grid, values={"x": 0.5}).colours(["x"])
    steps = replace(grid, values={"a": 1e-9, "b": 1e-3, "c": 0.1, "d": 1.0}, log=True)
    assert [end for end, _ in steps.legend] == ["0.001", "1"]
    lightness = [int(steps.colours([name])[0].split()[-1][:-2]) for name in "abcd"]
    assert lightness[0] == lightness[1] > lightness[2] > lightness[3]
    for same in ({"a": 2.0}, {"a": 0.0}, {}):
        assert replace(steps, values=same).colours(["a"])[0] and len(replace(steps, values=same).legend) == 2
    verdicts = Grid(
        title="", meaning="", values={"a": 0, "b": 1}, palette=(("good", "#0f0"), ("bad", "#f00"), ("?", ""))
    )
    assert verdicts.colours(["a", "b"])[0] == "#f00" and verdicts.legend == [("good", "#0f0"), ("bad", "#f00")]


def test_a_curve_fills_its_box_and_leaves_nan_out():
    assert Curve(title="", points=((2, 1.0), (4, math.nan), (6, 3.0))).line == "0.00,40.00 100.00,0.00"
    assert Curve(title="", points=((2, 1.0),)).line == "0.00,40.00"
    assert Curve(title="", points=((2, math.nan),)).line == ""


def test_ten_layers_are_shown_and_no_finding_takes_all():
    many = [
        Finding(title=str(n), meaning="", advice="", layers=tuple((f"{n}.{i}", "") for i in range(50)))
        for n in range(3)
    ]
    assert [len(layers) for _, layers in select(many)] == [3, 3, 4]
    assert [len(layers) for _, layers in select(many[:1])] == [10] and select([]) == []
    assert sum(len(layers) for _, layers in select([*many, *many])) == 10


def test_what_is_notable_comes_with_the_most_serious_first():
    usual = [adapter(f"layers.{i}.q", weight=1.0) for i in range(8)]
    nan = adapter("layers.8.q", weight=1.0)
    nan.a[0, 0] = math.nan
    special = [
        nan,
        adapter("layers.9.q", b=0.0, weight=1.0),
        adapter("layers.10.q", b=100.0, weight=1.0),
        adapter("layers.11.q", b=2.0, weight=1.0),
        adapter("layers.12.q", used=1, weight=1.0),
        adapter("layers.13.q", b=0.05, weight=1.0),
    ]
    told = diagnosis([*usual, *special])
    layers = tuple(
        replace(layer, overlap=Overlap((1.0,), (1.0,), 0.1, int(layer.name == "layers.3.q"))) for layer in told
    )
    titles = {finding.title: [name for name, _ in finding.layers] for finding in findings(replace(told, layers=layers))}
    assert list(titles) == [
        "not finite", "loud failure", "zero update", "intruder dimensions", "outlier", "idle rank",
        "unbalanced factors", "largest updates",
    ]  # fmt: skip
    assert titles["not finite"] == ["layers.8.q"] and titles["zero update"] == ["layers.9.q"]
    assert titles["loud failure"] == ["layers.10.q"] and titles["outlier"] == ["layers.11.q"]
    assert titles["intruder dimensions"] == ["layers.3.q"] and titles["idle rank"] == ["layers.12.q"]
    assert titles["unbalanced factors"] == ["layers.10.q", "layers.13.q"]
    assert "layers.11.q" not in titles["largest updates"]


def test_the_page_has_words_for_every_finding():
    every = [Finding(title=title, layers=(("layers.0.q", "1"),)) for title in _FINDINGS]
    html = Page(title="", headline="", findings=every).to_html()
    assert all(f"<b>{title}</b>: " in html for title in _FINDINGS)


def test_what_is_missing_for_a_verdict_is_named():
    bare = diagnosis([adapter("layers.0.q")])
    hint = diagnosis_page(bare).hint
    assert "--base" in hint[0] and "--data" in hint[0] and "lora-kernels inspect out --base" in hint[1]
    compared = diagnosis([adapter("layers.0.q", weight=1.0)])
    assert "--base" not in diagnosis_page(compared).hint[0] and "--data" in diagnosis_page(compared).hint[0]
    uncertified = replace(compared, batches=2, weight_decay=0.1)
    assert "No layer could be certified" in diagnosis_page(uncertified).hint[0]
    assert [grid.title for grid in diagnosis_page(compared).grids][-1] == "Imbalance of A and B"
    loud = diagnosis([adapter("layers.0.q", b=100.0, weight=1.0)])
    assert [grid.title for grid in diagnosis_page(loud).grids][-1] == "Verdict"


def test_a_history_of_odd_lines_is_drawn():
    layers = {"layers.0.q": {"numerical_rank": 2, "spectral": 1.0}, "layers.1.q": {"numerical_rank": None}, "x": 3}
    log = [{"step": 1, "layers": {}, "rank": None}, {"step": 2, "layers": layers, "rank": 2.0, "nuclear": "much"}]
    page = diagnosis_page(diagnosis([adapter("layers.0.q")]), log)
    assert page.history[2][0].values == {"layers.0.q": 2, "layers.1.q": None, "x": None}
    assert "While it trained: 2 measurements" in page.to_html()


def test_a_page_without_layers_and_of_many_layers():
    empty = diagnosis([])
    assert "no layer" in diagnosis_page(empty).to_html()
    many = diagnosis([adapter(f"model.layers.{i}.{part}") for i in range(126) for part in ("q", "k", "v", "o")])
    html = diagnosis_page(many).to_html()
    assert html.count("<tr><th title") == 3 * 4 and len(html) < 1e6
