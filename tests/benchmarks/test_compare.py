"""`python -m benchmarks.compare`: its command line, its summary, and the smallest form of every subject."""

import contextlib
import dataclasses
import io
import json
import math
from functools import partial

import pytest
import torch

pytest.importorskip("peft")
from benchmarks import compare, figures, language_model, lora_layers, models, pages, rates, records, subject
from benchmarks.subject import Row, Subject
from benchmarks.subjects import (
    SUBJECTS,
    eva,
    experts,
    init,
    linear,
    llm,
    lora_pro,
    small_linalg,
    spectrum,
    statistics,
    svd,
    train,
)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """The rates of some machine: measuring them takes seconds."""
    found = rates.Rates(1e10, {"bfloat16": 1e12, "float32": 1e11, "float64": 5e10})
    for module in (rates, eva, experts, init, linear, lora_pro, small_linalg, spectrum, statistics, svd, train):
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


def break_adapters(monkeypatch, maker, factor):
    """What this function of `lora_layers` makes gets its A times a factor."""
    make = getattr(lora_layers, maker)

    def broken(module):
        found = make(module)
        with torch.no_grad():
            next(each for name, each in found.named_parameters() if "lora_A" in name).mul_(factor)
        return found

    monkeypatch.setattr(lora_layers, maker, broken)


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


def test_experts_must_give_pefts_numbers(monkeypatch):
    peaks = records.peaks

    def one_process(programs):
        """Of the second program, what it does in this process."""
        (first, program), (second, other) = programs.items()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(other, {})
        return peaks({first: program}) | {second: int(printed.getvalue())}

    monkeypatch.setattr(records, "peaks", one_process)
    entry, rows = measured("experts", "layers", "--rounds", "1")
    check_rows(rows, {"PEFT", "the experts alone"}, floors=False)
    assert [(row.peer, row.target) for row in rows] == [("PEFT", 2.0), ("the experts alone", 4.0)]
    found = entry["entries"][0]
    times = {side: quantiles["p50"] for side, quantiles in found["seconds"].items()}
    assert times.keys() == {"peft", "ours", "base", "bare"}
    assert found["low_rank_over_base"] == (times["ours"] - times["bare"]) / times["base"]
    assert rows[1].ours == max(times["ours"] - times["bare"], 1e-9) and rows[1].theirs == times["base"]
    assert found["peak_extra_bytes"].keys() == {"peft", "ours"}
    assert "low-rank part takes" in experts.notes(entry)[0] and "of PEFT's (0.6 asked for)" in experts.notes(entry)[1]
    monkeypatch.setitem(experts.BOUNDS, "float32", 0.0)
    with pytest.raises(SystemExit, match="relative difference from PEFT's numbers"):
        experts.layers(compare.parse(SUBJECTS["experts"], ["--quick", "--rounds", "1"]))


def test_experts_without_adapters_are_the_experts_alone():
    """Both sides that the low-rank part is measured with: the same numbers, ours without PEFT's factors."""
    layer = experts.sides(experts.SMALL, torch.float32, "grouped_mm")["ours"]
    inputs = experts.routed(24, experts.SMALL, torch.float32)
    found = {
        name: experts.both_ways(each, inputs, torch.nn.Module())()
        for name, each in experts.without_adapters(layer).items()
    }
    whole = experts.both_ways(layer, inputs)()
    assert len(whole) == 6 and all(len(each) == 2 for each in found.values())
    for one, other, changed in zip(found["base"], found["bare"], whole, strict=False):
        assert lora_layers.relative(one, other) < 1e-5 < lora_layers.relative(changed, other)


def test_eva_without_peft_has_no_rows():
    entry, rows = measured("eva", "tiny", "--rounds", "1", "--no-peft")
    assert rows == [] and entry["floor"]["seconds"] > 0 and entry["ours_over_forward"] > 0


@pytest.mark.slow
def test_eva_against_peft(monkeypatch):
    # Several batches would have PEFT's side go round them a thousand times until it converges.
    layers, hidden, words, _, rows, length = models.LLAMAS["tiny"]
    monkeypatch.setitem(models.LLAMAS, "tiny", (layers, hidden, words, 1, rows, length))
    entry, rows = measured("eva", "tiny", "--rounds", "1")
    check_rows(rows, {"PEFT"})
    assert entry["quality"]["layers_compared"] == 14 and entry["quality"]["captured_minus_peft_worst"] > -1e-6


LAYER = {"tokens": 33, "n": 24, "m": 40, "rank": 4, "rounds": 1}


def test_a_layer_against_its_peers():
    entry = {**linear.layer(**LAYER, dropout=0.05, compiler=False), "floor": {"seconds": 1e-6}}
    rows = linear.rows({"entries": [entry]})
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert {row.target for row in rows} == {1.4, None} and set(entry["differences"]) == {"hand_written", "ours"}


def test_a_layer_in_bfloat16_is_held_to_pefts_errors():
    entry = linear.layer(**LAYER, dropout=0.05, compiler=False, dtype="bfloat16")
    rows = linear.rows({"entries": [entry]})
    check_rows(rows, {"PEFT", "hand-written addmm"}, floors=False)
    assert {row.group for row in rows} == {"dropout 0.05, bfloat16"} and {row.target for row in rows} == {None}
    assert 0 < entry["errors"]["ours"] <= 2 * entry["errors"]["peft"] < 0.1


@pytest.mark.slow
def test_a_layer_without_the_extension():
    entry = linear.without_extension(**LAYER, dropout=0.05, compiler=False)
    assert entry["extension"] is False
    rows = linear.rows({"entries": [entry]})
    assert {row.target for row in rows if row.peer == "PEFT"} == {1.0} and "without the extension" in rows[0].what
    with pytest.raises(SystemExit, match="without the extension"):
        linear.without_extension(**LAYER, dropout="much", compiler=False)


def test_a_call_is_timed_forward_alone_and_both_ways():
    before = torch.get_num_threads()
    entry, rows = measured("linear", "call", "--no-compile", "--rounds", "1")
    assert torch.get_num_threads() == before and {each["threads"] for each in entry["entries"]} == {1}
    check_rows(rows, {"PEFT", "hand-written addmm"}, floors=False)
    passes = ("forward", "forward and backward")
    assert {row.group for row in rows} == {f"{one}, dropout {rate}" for one in passes for rate in ("0", "0.05")}
    targets = {(row.peer, row.what.split(", ")[2]): round(1 / row.target, 6) for row in rows}
    assert targets == {
        ("PEFT", "forward"): 0.6,
        ("PEFT", "forward and backward"): 0.7,
        ("hand-written addmm", "forward"): 1.1,
        ("hand-written addmm", "forward and backward"): 1.1,
    }
    for each in entry["entries"]:
        assert all(times["min"] <= times["p50"] for key in linear.PASSES for times in each[key].values())
    assert len(linear.notes(entry)) == 4 and "minima" in linear.notes(entry)[0]


def test_a_sample_of_many_calls():
    calls = []
    found = records.interleaved({"one": lambda: calls.append(1)}, 2, repeat=5)
    assert len(calls) == 3 * 5 and 0 < found["one"]["min"] <= found["one"]["p50"] < 1e-3


def test_dora_beside_lora():
    entry = linear.dora_layer(17, 24, 40, 4, 1)
    rows = linear.rows({"entries": [entry]})
    check_rows(rows, {"PEFT", "LoRA, ours"})
    assert [row.target for row in rows] == [None, pytest.approx(1 / 1.15)]
    assert set(entry["differences"]) == {"ours", "ours_lora"} and max(entry["differences"].values()) < 1e-5
    assert entry["dora_over_lora"]["ours"] == pytest.approx(1 / rows[1].ratio)
    assert "DoRA over LoRA" in linear.notes({"entries": [entry]})[0]


def test_hand_written_passes_take_biases():
    x, g = torch.randn(7, 24, requires_grad=True), torch.randn(7, 40)
    layer = lora_layers.stock(24, 40, 4, 0.0, x.device, x.dtype, bias=True)
    mine = lora_layers.hand_written(layer)
    assert linear.check({"peft": layer, "mine": mine}, x, g)["differences"]["mine"] < 1e-6
    assert mine.base_layer.weight is layer.base_layer.weight and mine.lora_A is not layer.lora_A
    with torch.no_grad():
        mine.base_layer.bias = torch.nn.Parameter(mine.base_layer.bias + 1.0, requires_grad=False)
    with pytest.raises(SystemExit, match="relative differences"):
        linear.check({"peft": layer, "mine": mine}, x, g)
    # Trained ones, of the base layer and of B.
    layer.base_layer.bias.requires_grad_()
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.randn(40))
    assert linear.check({"peft": layer, "mine": lora_layers.hand_written(layer)}, x, g)["differences"]["mine"] < 1e-6


def test_hand_written_passes_compute_no_gradient_that_nobody_asked_for():
    x, w, a, b = torch.randn(7, 5), torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    y = lora_layers.HandWritten.apply(x, None, w, None, a.requires_grad_(), b.requires_grad_(), 0.7)
    found = torch.autograd.grad(y.sum(), [a, b])
    truth = torch.autograd.grad((0.7 * x @ a.mT @ b.mT).sum(), [a, b])
    assert all(torch.allclose(one, two, rtol=1e-4) for one, two in zip(found, truth, strict=True))


def test_the_largest_is_nan_where_one_is():
    assert lora_layers.largest([1.0, 2.0]) == 2.0
    assert math.isnan(lora_layers.largest([1.0, math.nan])) and math.isnan(lora_layers.largest([math.nan, 1.0]))


@pytest.mark.slow
def test_a_compiled_layer_takes_part():
    entry = linear.layer(**LAYER, dropout=0.0, compiler=True)
    check_rows(linear.rows({"entries": [entry]}), set(linear.PEERS.values()), floors=False)
    assert entry["differences"]["compiled"] < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.5, math.nan])
@pytest.mark.parametrize("side", ["hand_written", "fused"])
def test_a_layer_with_wrong_numbers_is_not_timed(side, factor, dtype, monkeypatch):
    break_adapters(monkeypatch, side, factor)
    monkeypatch.setattr(records, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="relative differences"):
        linear.layer(**LAYER, dropout=0.0, compiler=False, dtype=dtype)
    if side == "fused":
        with pytest.raises(SystemExit, match="relative differences"):
            linear.dora_layer(17, 24, 40, 4, 1)


def test_training_step():
    entry, rows = measured("train", "tiny", "--rounds", "1", "--no-compile")
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert rows[0].target == 1.2 and 0 < entry["bytes_ratio"] < 1 and max(entry["differences"].values()) < 1e-4
    assert "ours" in entry["bytes_saved_for_adapters"] and "frozen" not in entry["bytes_saved_for_adapters"]


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_a_training_step_with_wrong_numbers_is_not_timed(factor, monkeypatch):
    break_adapters(monkeypatch, "hand_written", factor)
    monkeypatch.setattr(records, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="relative differences"):
        measured("train", "tiny", "--no-compile")


@pytest.fixture
def stand_in(monkeypatch):
    """A small Llama with tied embeddings in the place of the language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}

    def load(dtype=torch.float32):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).to(dtype)

    monkeypatch.setattr(language_model, "load", load)
    return load


@pytest.mark.parametrize(("case", "target"), [("1x128-r8", 1.08), ("4x128-r16-dropout", 1.35)])
def test_a_language_models_step(case, target, stand_in):
    entry, rows = measured("llm", case, "--rounds", "2", "--no-compile")
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert [row.target for row in rows] == [target, 1.0]
    assert entry["layers"] == 14 and set(entry["differences"]) == {"hand_written", "ours"}
    assert 0 < entry["differences"]["ours"] < 1e-5 and max(entry["differences_over_allowed"].values()) < 0.1
    assert all(row.floor == entry["seconds"]["base"]["p50"] for row in rows)
    assert "p20 to p80" in llm.notes(entry)[0]


def test_a_language_models_step_in_bfloat16(stand_in):
    entry, rows = measured("llm", "4x128-r8-bfloat16", "--rounds", "1")
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert [row.target for row in rows] == [None, 1.0] and {row.group for row in rows} == {
        "4 x 128 tokens, dropout 0, bfloat16"
    }
    assert 0 < entry["differences"]["ours"] < 2 * entry["differences"]["peft"] < 0.2
    assert entry["differences_over_allowed"]["ours"] < 1


@pytest.mark.parametrize("case", ["1x128-r8", "1x128-r8-bfloat16"])
@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_a_language_models_step_with_wrong_numbers_is_not_timed(case, factor, stand_in, monkeypatch):
    break_adapters(monkeypatch, "hand_written", factor)
    monkeypatch.setattr(records, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=f"{case}: loss or gradients are wrong"):
        measured("llm", case, "--no-compile")


def test_a_compiler_that_fails_is_said_and_the_others_are_timed(stand_in, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, **_):
            raise RuntimeError("graph break\nin so many words")

    monkeypatch.setattr(lora_layers, "compiled", lambda model: Broken())
    entry, rows = measured("llm", "4x128-r8", "--rounds", "1")
    check_rows(rows, {"PEFT", "hand-written addmm"})
    assert entry["compile_failed"] == "RuntimeError: graph break"
    assert "graph break" in llm.notes(entry)[1]


@pytest.mark.slow
def test_a_compiled_language_model_takes_part(stand_in):
    entry, rows = measured("llm", "4x128-r8", "--rounds", "1")
    check_rows(rows, set(lora_layers.PEERS.values()))
    assert entry["differences"]["compiled"] < 1e-4 and "compile_failed" not in entry


def test_long_steps_have_few_rounds(stand_in, monkeypatch):
    monkeypatch.setattr(llm, "LONG", 128)
    assert measured("llm", "1x128-r8", "--rounds", "5", "--no-compile")[0]["rounds"] == llm.LONG_ROUNDS
    assert measured("llm", "1x128-r8", "--rounds", "1", "--no-compile")[0]["rounds"] == 1


def test_the_floor_is_the_frozen_models_loss_and_the_gradient_of_its_embeddings(stand_in):
    base = stand_in().requires_grad_(False)
    ids = torch.randint(64, (2, 9))
    found = llm.bare(base, ids)()
    embeddings = base.get_input_embeddings().weight.requires_grad_()
    base.lm_head.weight = torch.nn.Parameter(embeddings.detach().clone(), requires_grad=False)
    (gradient,) = torch.autograd.grad(base(input_ids=ids, labels=ids).loss, [embeddings])
    summed = torch.zeros_like(gradient).index_add_(0, ids.flatten(), found.flatten(0, 1))
    assert torch.allclose(summed, gradient, atol=1e-7) and found.norm() > 1e-3


def test_without_the_model_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_wheel")
    with pytest.raises(SystemExit, match=r"make \.venv/\.llm"):
        measured("llm", "1x128-r8")


def test_new_records_have_their_words_and_figures(stand_in, monkeypatch, tmp_path):
    layers = {"environment": {}, "entries": []}
    for dropout, dtype in ((0.0, "float32"), (0.05, "float32"), (0.0, "bfloat16"), (0.05, "bfloat16")):
        layers["entries"].append(linear.layer(**LAYER, dropout=dropout, compiler=False, dtype=dtype))
    layers["entries"].append({**linear.layer(**LAYER, dropout=0.05, compiler=False), "extension": False})
    call, _ = measured("linear", "call", "--no-compile", "--rounds", "1")
    step, _ = measured("llm", "1x128-r8", "--rounds", "1", "--no-compile")
    for file in records.RESULTS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    dora = {"entries": [linear.dora_layer(17, 24, 40, 4, 1)]}
    for name, case, entry in (
        ("linear", "layers", layers),
        ("linear", "call", call),
        ("linear", "dora", dora),
        ("llm", "1x128-r8", step),
    ):
        records.put(name, case, entry, tmp_path)
    text = pages.page()
    assert text.count("| 33 x 24 -> 40, bfloat16 |") == 2
    assert text.count("| 33 x 24 -> 40, without the extension |") == 1
    assert "rank 8, 1 thread." in text and "| forward and backward | 0.05 |" in text and "| 17 x 24 -> 40 | 4 |" in text
    assert "| 1 x 128 | 8 | 0 | float32 |" in text
    (tmp_path / "llm.json").unlink()
    assert "## A language model's training step" not in pages.page()
    assert len(figures.layers().axes) == 2


def test_lora_pro(monkeypatch):
    monkeypatch.setattr(lora_pro, "LAYERS", ((48, 40),) * 5)
    monkeypatch.setattr(lora_pro, "peaks", lambda *_: {"ours": 1, "faithful": 2, "careful": 3})
    entry, rows = measured("lora_pro", "full", "--rank", "4", "--rounds", "1")
    check_rows(rows, {"the authors' procedure", "careful torch"})
    assert entry["floor"]["bytes"] == 16 * 2 * 48 * 40 and entry["differences"]["ours"] < 1e-2
    check_rows(measured("lora_pro", "efficient", "--rank", "4", "--rounds", "1")[1], {"AdamW, no adjustment"})


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


@pytest.fixture
def steady(monkeypatch):
    """A commit without changes."""
    found = {"time": "now", "commit": "abc", "threads": 1}
    monkeypatch.setattr(records, "environment", lambda: dict(found))
    return found


def counting(calls, **raises):
    def measure(name, options):
        calls.append(name)
        if name in raises:
            raise raises.pop(name)
        return entry_of([float(options.rounds)])

    found = fake()
    return dataclasses.replace(found, cases={name: partial(measure, name) for name in ("one", "two")})


def test_an_interrupted_run_goes_on(steady, monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(compare, "SUBJECTS", {"fake": counting(calls, two=KeyboardInterrupt())})
    arguments = ["fake", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    steady["time"] = "later"
    assert compare.main([*arguments, "--resume"]) == 0
    assert calls == ["one", "two", "two"] and "one: measured before" in capsys.readouterr().out
    assert [row["case"] for row in compare.summarize(tmp_path)] == ["one", "two"]
    assert compare.main(arguments) == 0  # without it, everything again
    assert calls[3:] == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "more"), [({"commit": "def"}, []), ({"commit": "abc+changes"}, []), ({}, ["--rounds", "2"])]
)
def test_other_code_and_other_options_are_measured_again(changes, more, steady, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(compare, "SUBJECTS", {"fake": counting(calls)})
    arguments = ["fake", "--out", str(tmp_path), "--resume"]
    compare.main(arguments)
    steady.update(changes)
    if "+" in steady["commit"]:
        compare.main(arguments)
    compare.main([*arguments, *more])
    assert calls[-2:] == ["one", "two"] and len(calls) == (6 if "+" in steady["commit"] else 4)


def test_pooled_cases_have_one_row_in_the_summary(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "SUBJECTS", {"fake": fake(pooled=True)})
    compare.main(["fake", "--out", str(tmp_path)])
    (row,) = compare.summarize(tmp_path)
    assert (row["case"], row["peer_over_ours"], row["lowest_of"]) == ("one", 0.5, 3)


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
