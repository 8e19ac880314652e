"""`tune`: what is checked, timed, chosen and written down, from Python and from the command line."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import lora_kernels as lk
from lora_kernels import cli, tuning
from lora_kernels.ops import use_backend
from lora_kernels.ops.lora_linear import config, forms, measure, table
from lora_kernels.ops.lora_linear.forms import Choice
from lora_kernels.ops.lora_linear.table import Key

QUICK = {"tokens": 50, "rank": 4, "rounds": 1, "device": "cpu"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "tuned.json"
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(file))
    forms.forget()
    yield file
    forms.forget()


def printed(report, width=200):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(report)
    return captured.get()


def test_what_is_written_is_what_layers_run(cache, monkeypatch):
    monkeypatch.setattr(measure, "fastest", lambda seconds, choices: choices[1])
    lines = []
    report = lk.tune([(24, 18), (24, 18)], **QUICK, dropout=True, progress=lines.append)
    assert report.path == cache and report.ok and len(list(report)) == 2
    assert lines == ["forward: 50 tokens, 24 -> 18, rank 4", "backward: 50 tokens, 24 -> 18, rank 4"]
    forward, backward = table.read(cache)
    assert forward.key == Key(forms.chip_name(CPU), "float32", 64, 24, 18, 16, False, "forward")
    assert backward.key == dataclasses.replace(forward.key, dropout=True, product="backward")
    assert set(forward.seconds) == {"expand_first", "expand_add", "mm"} and min(forward.seconds.values()) > 0
    assert forward.versions == table.versions()
    choose = lambda product, dropout: forms.choose(product, CPU, torch.float32, (64, 24, 18), 4, dropout, "torch")  # noqa: E731
    assert choose("forward", False) == choose("backward", True) == Choice("expand_add", None, "tuned")
    assert choose("backward", False) == Choice("expand_first")
    # What is there stays, what is measured again is replaced; layers see it at once.
    monkeypatch.setattr(measure, "fastest", lambda seconds, choices: choices[0])
    lk.tune([(24, 18)], **QUICK)
    assert [(each.form, each.key.dropout) for each in table.read(cache)] == [
        ("expand_first", False),
        ("expand_add", True),
        ("expand_first", False),
    ]
    assert choose("forward", False) == Choice("expand_first", None, "tuned")


def test_several_numbers(cache, tmp_path):
    out = tmp_path / "other.json"
    report = lk.tune(
        [(8, 6), (6, 8)], tokens=[3, 9], rank=[1, 20], rounds=1, dtype=torch.float64, out=out, device="cpu"
    )
    found = {(each.key.n, each.key.tokens, each.key.rank, each.key.product) for each in report}
    assert found == {(n, t, r, p) for n in (8, 6) for t in (4, 16) for r in (16, 32) for p in table.PRODUCTS}
    assert len(table.read(out)) == 16 and not cache.exists()


def test_the_kernel_is_measured_where_triton_runs(cache):
    pytest.importorskip("triton")
    with use_backend("triton"):
        report = lk.tune([(32, 48)], **{**QUICK, "tokens": 16}, dtype=torch.float16, dropout=True)
        assert report.ok and not report.measurements[0].refused
        for each in report:
            assert {f"gemm {config.SQUARE.name}", f"gemm {config.SMALL.name}"} <= set(each.seconds)
            assert each.errors[f"gemm {config.SMALL.name}"] <= 2 * each.errors["torch"] + 5e-7


@pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropped"])
@pytest.mark.parametrize("product", table.PRODUCTS)
def test_wrong_numbers_are_never_chosen(product, dropout, monkeypatch):
    """Each way to be wrong: without the low-rank term, scaled, unmasked, with a hole, or not written at all."""
    key = Key("chip", "float32", 512, 24, 18, 16, dropout, product)
    draw = {"tokens": 500, "rank": 4, "device": CPU, "dtype": torch.float32, "rounds": 1}
    combine = forms.combine

    def wrong(change):
        def broken(out, left, right, terms, *, choice, **rest):
            if choice.form == "expand_add":
                change(out, left, right, terms)
            else:
                combine(out, left, right, terms, choice=choice, **rest)

        return broken

    def whole(out, left, right, terms):
        out.copy_(left @ right + terms[0].t @ terms[0].b)

    ways = [
        lambda out, left, right, terms: out.copy_(left @ right),
        lambda out, left, right, terms: out.copy_(left @ right + 1.00001 * terms[0].t @ terms[0].b),
        lambda *_: None,
        lambda out, *rest: (whole(out, *rest), out[-1:].zero_()),
        lambda out, *rest: (whole(out, *rest), out[:, -1].zero_()),
    ]
    for change in [*ways, whole] if dropout else ways:
        monkeypatch.setattr(forms, "combine", wrong(change))
        found = measure.measure(key, **draw)
        assert found.wrong == ("expand_add",) and "WRONG on chip" in found.refused["expand_add"]
        assert found.choice.form == "expand_first" and "expand_add" not in found.seconds
        report = tuning.TuneReport((found,), "file")
        assert not report.ok and "WRONG on chip" in printed(report)

    def fails(out, left, right, terms):
        raise MemoryError("full")

    monkeypatch.setattr(forms, "combine", wrong(fails))
    found = measure.measure(key, **draw)
    assert not found.wrong and found.refused["expand_add"] == "failed: MemoryError: full"
    monkeypatch.setattr(forms, "combine", lambda out, *_, **__: out.zero_())
    with pytest.raises(RuntimeError, match="'expand_first': WRONG on chip"):
        measure.measure(key, **draw)


def test_the_default_stays_unless_beaten_by_more_than_noise():
    choices = [Choice("expand_first"), Choice("expand_add"), Choice("gemm", config.WIDE), Choice("gemm", config.SMALL)]
    names = [each.name for each in choices]
    for times, expected in (
        ((1.0, 0.99, 2, 2), 0),
        ((1.0, 0.97, 2, 2), 1),
        ((1.0, 0.9, 0.8, 0.7), 3),
        ((1, 2, 2, 2), 0),
    ):
        assert measure.fastest(dict(zip(names, times, strict=True)), choices) == choices[expected]


def test_work_and_traffic():
    """A product of 100 tokens, 24 inputs and 18 outputs, of rank 4, in two bytes."""
    forward = measure.Measurement(
        Key("c", "float16", 128, 24, 18, 16, False, "forward"), 100, 4, {}, {}, {}, Choice("gemm")
    )
    assert forward.flops == 2 * 100 * (24 * 18 + 4 * 18)
    assert forward.bytes == 2 * (100 * 24 + 24 * 18 + 100 * 18 + 100 * 4 + 4 * 18)
    backward = dataclasses.replace(forward, key=dataclasses.replace(forward.key, product="backward"))
    assert backward.flops == 2 * 100 * (24 * 18 + 4 * 24)


def test_the_report():
    key = Key("chip", "bfloat16", 8192, 4096, 1024, 16, True, "backward")
    wide = Choice("gemm", config.WIDE)
    seconds = {
        "expand_first": 3e-3,
        "expand_add": 4e-3,
        wide.name: 2e-3,
        f"gemm {config.SMALL.name}": 5e-3,
        "mm": 1.6e-3,
    }
    found = measure.Measurement(key, 8000, 8, seconds, {}, {"gemm x": "failed: reason"}, wide)
    text = printed(tuning.TuneReport((found,), "some/file"))
    for part in ("8000, 4096 -> 1024", "backward dropout", "3.000", "4.000", "2.000", "1.600", wide.name, "1.25"):
        assert part in text
    assert "gemm x: failed: reason" in text and "written to some/file" in text and "5.000" not in text


def test_shapes_of_models():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 100)

        def get_output_embeddings(self):
            return self.head

    assert tuning._shapes(Model()) == [(8, 6)]
    assert tuning._shapes(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8, device="meta"))) == [(6, 8), (8, 6)]
    with pytest.raises(ValueError, match="has no linear layer"):
        tuning._shapes(nn.ReLU())
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.ModuleDict({"q": nn.Linear(8, 6), "v": nn.Linear(5, 7)}), peft.LoraConfig(r=2, target_modules=["q"])
    )
    assert tuning._shapes(model) == [(8, 6)]


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"model_or_shapes": []}, ValueError, "shapes is empty"),
        ({"model_or_shapes": [(3,)]}, ValueError, r"shapes holds \(3,\)"),
        ({"model_or_shapes": [(3, 0)]}, ValueError, "shapes is 0, but must be >= 1"),
        ({"tokens": 0}, ValueError, "tokens is 0"),
        ({"tokens": []}, ValueError, "tokens is empty"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 1.5}, TypeError, "rank"),
        ({"rounds": 0}, ValueError, "rounds is 0"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"device": "meta"}, ValueError, "device is 'meta'"),
        ({"device": "cuda:77"}, ValueError, "device is 'cuda:77', but must be a device of this machine"),
    ],
)
def test_bad_arguments(change, kind, message, cache):
    with pytest.raises(kind, match=message):
        lk.tune(**{"model_or_shapes": [(8, 6)], **QUICK, **change})
    assert not cache.exists()


def test_a_file_that_is_no_table_is_left_alone(cache, tmp_path):
    cache.parent.mkdir()
    cache.write_text("my notes")
    with pytest.raises(ValueError, match=r"tuned.json' cannot be read: Expecting value"):
        lk.tune([(8, 6)], **QUICK)
    assert cache.read_text() == "my notes"
    with pytest.raises(ValueError, match="cannot be written"):
        lk.tune([(8, 6)], **QUICK, out=cache / "below" / "a file")


def test_the_command(cache, tmp_path, capsys):
    command = ["tune", "--tokens", "5", "--rank", "4", "--rounds", "1", "--device", "cpu"]
    assert cli.main([*command, "--shapes", "8x6,6x8", "--dropout"]) == 0
    captured = capsys.readouterr()
    assert "5, 8 -> 6" in captured.out and "backward dropout" in captured.out and str(cache.name) in captured.out
    assert "forward: 5 tokens, 8 -> 6, rank 4" in captured.err and len(table.read(cache)) == 4
    file = tmp_path / "config.json"
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    file.write_text(json.dumps({"model_type": "llama", **sizes}))
    out = tmp_path / "t.json"
    assert cli.main([*command, "--model-config", str(file), "--dtype", "bfloat16", "--out", str(out)]) == 0
    assert {(each.key.n, each.key.m, each.key.dtype) for each in table.read(out)} == {
        (32, 32, "bfloat16"),
        (32, 48, "bfloat16"),
        (48, 32, "bfloat16"),
    }


def test_the_command_says_what_is_wrong(cache, capsys, monkeypatch):
    command = ["tune", "--tokens", "5", "--rounds", "1", "--device", "cpu"]
    for change, message in (
        (["--shapes", "8by6"], "shapes holds '8by6', but must hold inputs x outputs"),
        (["--shapes", "8x6", "--dtype", "int8"], "dtype is 'int8'"),
        (["--shapes", "8x6", "--device", "abacus"], "device is 'abacus'"),
        (["--model-config", "nowhere.json"], "nowhere.json"),
    ):
        assert cli.main([*command, *change]) == 2
        assert message in capsys.readouterr().err
    combine = forms.combine

    def broken(out, *rest, choice, **more):
        combine(out, *rest, choice=choice, **more)
        if choice.form == "expand_add":
            out.mul_(0.5)

    monkeypatch.setattr(forms, "combine", broken)
    assert cli.main([*command, "--shapes", "64x48"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_doctor_tells_what_counts(cache, capsys):
    assert cli.main(["doctor"]) == 0
    assert "lora-kernels tune" in capsys.readouterr().out
    lk.tune([(8, 6)], **QUICK)
    known = table.read(cache)
    others = [dataclasses.replace(each, versions={}) for each in known]
    elsewhere = [dataclasses.replace(each, key=dataclasses.replace(each.key, chip="Z1")) for each in known * 2]
    table.write(cache, [*known, *others, others[0], *elsewhere], "")
    forms.forget()
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "folder" in line and "│" in line)
    assert [each.strip() for each in row.split("│")[2:5]] == ["2", "3", "4"]
    assert "lora_linear gemm" in text
    cache.write_text("{")
    forms.forget()
    assert cli.main(["doctor"]) == 0
    assert "cannot be read" in capsys.readouterr().out


def test_forms_are_timed_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "_seconds", lambda call, _: call() or (99.0 if len(order) <= 3 else 1.0))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    assert measure._interleaved(calls, 1, CPU) == dict.fromkeys("abc", 1.0)  # the first round is not counted
    assert "".join(order) == "abc" + "bca"


def test_the_gpu_is_busy_while_the_host_queues(monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("wait")

        def elapsed_time(self, last):
            return 3.0

    class Flushed:
        def zero_(self):
            events.append("write")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert measure._seconds(lambda: events.append("call"), Flushed()) == 3e-3
    writes = events.count("write")
    assert events == ["write"] * writes + ["record", "call", "record", "wait"]
    # At the 3 to 4.3 TB/s of a large GPU, several times the 90 us that a slow host needs.
    assert writes * measure._FLUSHED / 4.3e12 > 5 * 90e-6
