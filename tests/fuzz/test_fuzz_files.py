"""Files that are missing, cut off, changed or of something else: always an error in words, never a wrong success."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outcomes import examples, outcome
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels as lk
from lora_kernels import cli
from lora_kernels.adapters.folders import read_adapter
from lora_kernels.api import monitor, text_files
from lora_kernels.api.transformers import empty_model
from lora_kernels.ops.lora_linear import table

DEEP = "[" * 100_000
JSONS = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4) | st.just(10**400) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
NOISE = st.binary(max_size=60) | st.sampled_from(
    [b"", b"\x00", b"{}", b"[]", b'"x"', b"null", b"\xff\xfe{}", DEEP.encode()]
)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    file = tmp_path_factory.mktemp("statistics") / "whole.safetensors"
    lk.collect(base(), [torch.randn(3, 6)], progress=False).save(file)
    return file


@st.composite
def edited(draw, content):
    """Bytes that were cut off, changed, added or taken out."""
    kind = draw(st.sampled_from(("cut", "cut", "flip", "flip", "insert", "remove", "zeros")))
    place = draw(st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(len(content) - 1, 64)))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
    length = draw(st.integers(1, 32))
    return content[:place] + (b"" if kind == "remove" else b"\x00" * length) + content[place + length :]


def command(capsys, *arguments):
    """Run the command line: no traceback, and words where it fails."""
    status = cli.main([str(each) for each in arguments])
    said = capsys.readouterr()
    assert status in (0, 1, 2)
    if status == 2:
        assert said.err.strip().count("\n") == 0 and said.err.startswith("lora-kernels"), said.err
    return status


def test_statistics_with_edited_bytes_are_refused(statistics, tmp_path):
    whole = statistics.read_bytes()
    expected = lk.statistics.Statistics.load(statistics)

    @examples(60)
    @given(edited(whole) | NOISE)
    def run(content):
        if content == whole:
            return
        file = tmp_path / "edited.safetensors"
        file.write_bytes(content)
        worked, found = outcome(lk.statistics.Statistics.load, {"path": file})
        if worked:  # only what means the same may pass: white space of a header, say
            assert list(found) == list(expected)
            for name in expected:
                assert torch.equal(found[name].input.second, expected[name].input.second)

    run()


def test_no_bit_of_the_sums_can_be_changed(statistics, tmp_path):
    whole = statistics.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    file = tmp_path / "changed.safetensors"
    for place in range(start, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        worked, error = outcome(lk.statistics.Statistics.load, {"path": file})
        assert not worked and "digest" in str(error)


@pytest.mark.parametrize("what", ["format", "document", "missing", "kind", "dtype", "settings", "layers", "targets"])
def test_statistics_whose_digest_is_right_and_whose_content_is_not(statistics, tmp_path, what):
    from lora_kernels.statistics import storage

    with storage.safe_open(str(statistics), framework="pt") as opened:
        document = json.loads(opened.metadata()[storage._KEY])
    tensors = load_file(statistics)
    document.pop("digest")
    if what == "format":
        document["format"] = 99
    elif what == "document":
        document.pop("sums")
    elif what == "missing":
        tensors.pop(next(iter(tensors)))
    elif what == "targets":
        document["fingerprint"].pop("targets")
    else:
        document["sums"][0][what] = {"kind": "strange", "dtype": "torch.nothing", "settings": {"x": 1}, "layers": 3}[
            what
        ]
    file = tmp_path / "other.safetensors"
    whole = {storage._KEY: json.dumps({**document, "digest": storage._digest(tensors, document)})}
    save_file(tensors, file, whole)
    worked, error = outcome(lk.statistics.Statistics.load, {"path": file})
    assert not worked and str(file) in str(error)


def test_adapters_with_edited_bytes(adapter, tmp_path):
    @examples(30)
    @given(st.sampled_from(("adapter_config.json", "adapter_model.safetensors")), st.data())
    def run(name, data):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(adapter, work)
        (work / name).write_bytes(data.draw(edited((adapter / name).read_bytes()) | NOISE))
        outcome(read_adapter, {"path": work})
        outcome(lk.load, {"base": base(), "path": work})

    run()


KEYS = ("r", "lora_alpha", "target_modules", "peft_type", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
        "target_parameters", "lora_dash", "bias", "modules_to_save", "strange")  # fmt: skip


def test_adapter_configs_of_other_types(adapter, tmp_path):
    @examples(40)
    @given(st.sampled_from(KEYS), JSONS)
    def run(key, value):
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(adapter, work)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (work / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        outcome(read_adapter, {"path": work})
        outcome(lk.load, {"base": base(), "path": work})

    run()


def changed_tensors(kind, tensors):
    name = next(iter(tensors))
    value = tensors[name]
    if kind == "missing":
        tensors.pop(name)
    elif kind == "renamed":
        tensors[name.replace("model.", "model.other.")] = tensors.pop(name)
    elif kind == "extra":
        tensors["base_model.model.7.lora_A.weight"] = torch.ones(2, 6)
        tensors["base_model.model.7.lora_B.weight"] = torch.ones(5, 2)
    elif kind == "rank":
        tensors[name] = torch.cat((value, value))
    elif kind == "shape":
        tensors[name] = value[:, :-1].contiguous()
    elif kind == "flat":
        tensors[name] = value.reshape(-1)
    elif kind == "integers":
        tensors[name] = value.to(torch.int32)
    elif kind == "empty":
        tensors.clear()
    return tensors


@pytest.mark.parametrize("kind", ["missing", "renamed", "extra", "rank", "shape", "flat", "integers", "empty"])
def test_adapters_with_other_tensors_are_not_loaded(adapter, tmp_path, kind, capsys):
    work = tmp_path / "work"
    shutil.copytree(adapter, work)
    tensors = changed_tensors(kind, load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, work / "adapter_model.safetensors")
    worked, error = outcome(lk.load, {"base": base(), "path": work})
    if kind != "integers":  # PEFT casts them
        assert not worked and "work" in str(error)
    outcome(read_adapter, {"path": work})
    command(capsys, "inspect", work)


def test_an_adapter_of_nan_is_loud(adapter, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(adapter, work)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, work / "adapter_model.safetensors")
    assert command(capsys, "inspect", work) == 1


def strange_places(tmp_path, name):
    """Places of a file that cannot be read."""
    (tmp_path / "folder" / name).mkdir(parents=True)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / name).symlink_to(tmp_path / "loop" / name)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / name).symlink_to(tmp_path / "gone")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / name).write_bytes(b"{}")
    (tmp_path / "locked" / name).chmod(0)
    (tmp_path / "absent").mkdir()
    found = [tmp_path / each for each in ("folder", "loop", "nowhere", "absent")]
    return found if os.geteuid() == 0 else [*found, tmp_path / "locked"]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_in_strange_places(adapter, tmp_path, name, capsys):
    other = {"adapter_config.json": "adapter_model.safetensors"}.get(name, "adapter_config.json")
    for folder in strange_places(tmp_path, name):
        shutil.copy(adapter / other, folder / other)
        assert not outcome(read_adapter, {"path": folder})[0]
        assert not outcome(lk.load, {"base": base(), "path": folder})[0]
        assert command(capsys, "inspect", folder) == 2
    assert command(capsys, "inspect", adapter / name) == 2


@pytest.mark.parametrize("name", ["config.json", "data.csv", "data.jsonl", "x.safetensors"])
def test_other_files_in_strange_places(tmp_path, name, capsys):
    for folder in strange_places(tmp_path, name):
        file = folder / name
        if name == "config.json":
            assert not outcome(empty_model, {"config_file": file, "task": "base"})[0]
            assert command(capsys, "plan", "--config", file, "--method", "eva") == 2
            assert not outcome(table.read, {"path": file})[0]
            assert command(capsys, "tune", "--model-config", file) == 2
        elif name == "x.safetensors":
            assert not outcome(lk.statistics.Statistics.load, {"path": file})[0]
        else:
            assert not outcome(text_files.read, {"path": file, "text_column": "text"})[0]
            if name == "data.jsonl":
                assert not outcome(monitor.read_log, {"path": file})[0]


LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32,
}  # fmt: skip


def test_model_configs(tmp_path, capsys):
    file = tmp_path / "config.json"

    @examples(15)
    @given(st.sampled_from((*LLAMA, "rope_scaling", "head_dim", "torch_dtype", "strange")), JSONS)
    def values(key, value):
        file.write_text(json.dumps({**LLAMA, key: value}))
        command(capsys, "plan", "--config", file, "--method", "eva")

    @examples(15)
    @given(edited(json.dumps(LLAMA).encode()) | NOISE)
    def edits(content):
        file.write_bytes(content)
        command(capsys, "plan", "--config", file, "--method", "eva")

    values()
    edits()
    file.write_text(json.dumps(LLAMA))
    assert command(capsys, "plan", "--config", file, "--method", "eva") == 0


def test_tables_of_measured_forms(tmp_path):
    key = table.Key("chip", "float32", 1024, 64, 64, 16, False, "forward")
    file = tmp_path / "tuned.json"
    table.write(file, [table.Record(key, "expand_add", None, {"expand_add": 1.0}, table.versions())], "note")
    whole = file.read_bytes()
    record = json.loads(whole)["records"][0]

    @examples(40)
    @given(edited(whole) | NOISE)
    def edits(content):
        file.write_bytes(content)
        outcome(table.read, {"path": file})

    @examples(40)
    @given(st.sampled_from(sorted(record)), JSONS)
    def values(name, value):
        file.write_text(json.dumps({"format": 1, "records": [{**record, name: value}]}))
        outcome(table.read, {"path": file})

    edits()
    values()


def test_a_broken_table_warns_and_is_passed_over(tmp_path, monkeypatch):
    from lora_kernels.ops.lora_linear import forms

    file = tmp_path / "tuned.json"
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(file))
    for content in (b"", b"\xff\xfe", DEEP.encode(), b'{"format": 1, "records": [{}]}'):
        file.write_bytes(content)
        forms.forget() if hasattr(forms, "forget") else None
        x = torch.ones(2, 3)
        made = lk.ops.lora_linear(x, torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), scaling=1.0)
        assert torch.equal(made, torch.full((2, 4), 6.0))


def test_text_files(tmp_path, capsys):
    @examples(40)
    @given(st.sampled_from(("csv", "jsonl")), st.data())
    def run(kind, data):
        file = tmp_path / f"data.{kind}"
        whole = (
            b"text,label\nhello,1\nworld,2\n"
            if kind == "csv"
            else b'{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n'
        )
        file.write_bytes(data.draw(edited(whole) | NOISE))
        outcome(text_files.read, {"path": file, "text_column": "text"})
        outcome(text_files.read, {"path": file, "text_column": "text", "label_column": "label"})

    run()
    for content in (
        b"\xff\xfea\x00",
        b"text\n\x00\x01\n\xff",
        b'text\n"' + b"x" * 200_000,
        "text\né".encode("latin-1"),
    ):
        (tmp_path / "bad.csv").write_bytes(content)
        assert (
            command(capsys, "init", "--model", tmp_path, "--data", tmp_path / "bad.csv", "--out", tmp_path / "out") == 2
        )


def test_logs_of_a_monitor(tmp_path):
    line = json.dumps({"step": 5, "seconds": 1.0, "rank": 2.0, "nuclear": 1.0, "balance": 0.1, "layers": {}})
    whole = f"{line}\n{line.replace('5', '6', 1)}\n".encode()
    file = tmp_path / "log.jsonl"

    @examples(40)
    @given(edited(whole) | NOISE | st.builds(lambda a, b: json.dumps({"step": a, "layers": b}).encode(), JSONS, JSONS))
    def run(content):
        file.write_bytes(content)
        worked, log = outcome(monitor.read_log, {"path": file})
        if worked:
            from lora_kernels.api.monitor import log_summary

            assert log_summary(log)

    run()


def test_a_header_that_claims_more_than_there_is(statistics, tmp_path):
    whole = statistics.read_bytes()
    for length in (0, 1, 2**31, 2**62, 2**64 - 1, len(whole)):
        file = tmp_path / "long.safetensors"
        file.write_bytes(struct.pack("<Q", length) + whole[8:])
        assert not outcome(lk.statistics.Statistics.load, {"path": Path(file)})[0]
