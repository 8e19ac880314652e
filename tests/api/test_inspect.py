"""`lora-kernels inspect`: stock folders without their base, with it, and folders that are broken."""

import json
import math
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels import cli
from lora_kernels.adapters.folders import read_adapter
from lora_kernels.api.diagnosis import inspect_folder
from lora_kernels.api.monitor import log_summary
from tests.statistics.models import tiny_llama

WORDS = ["<pad>", "<unk>", *["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "park", "fast", "slow"]]


def trained(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(tiny_llama(), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(0.02 * torch.randn(each.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("base")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<pad>", unk_token="<unk>").save_pretrained(where)
    tiny_llama().save_pretrained(where)
    return where


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "adapter"
    trained().save_pretrained(where)
    return where


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    ],
)
def test_files_alone_give_what_the_model_gives(changes, tmp_path):
    model = trained(**changes)
    model.save_pretrained(tmp_path / "adapter")
    found = {each.name: each.spectrum for each in inspect_folder(read_adapter(tmp_path / "adapter"))}
    truth = {each.name: each.spectrum for each in lk.diagnose(model)}
    assert set(found) == set(truth) and len(found) == 14
    for name, each in found.items():
        assert each.scaling == truth[name].scaling and each.rank == truth[name].rank
        assert each.values == pytest.approx(truth[name].values, rel=1e-5)
        assert each.balance == pytest.approx(truth[name].balance, rel=1e-5) and each.spectral_share is None


def test_a_frozen_start_is_told_from_what_is_trained(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    lk.initialize(model, method="pissa", progress=False)
    model.save_pretrained(tmp_path)
    for each in read_adapter(tmp_path).layers:
        assert each.start is not None and each.a.shape[0] == 4
    for each in inspect_folder(read_adapter(tmp_path)):
        assert each.spectrum.drift == pytest.approx(0, abs=1e-5) and each.spectrum.spectral > 0.1


def test_layers_that_are_not_linear_and_dora_are_named(tmp_path):
    trained(target_modules=["embed_tokens", "q_proj"], use_dora=False).save_pretrained(tmp_path / "one")
    found = read_adapter(tmp_path / "one")
    assert len(found.layers) == 2 and any("embed" in name for name, _ in found.unsupported)
    trained(target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path / "two")
    found = read_adapter(tmp_path / "two")
    assert any("DoRA" in note for note in found.notes) and len(found.layers) == 2 and found.unsupported == ()


def test_layers_come_in_their_natural_order(tmp_path):
    tensors = {}
    for index in (10, 2, 0):
        tensors[f"base_model.model.layers.{index}.lin.lora_A.weight"] = torch.randn(2, 5)
        tensors[f"base_model.model.layers.{index}.lin.lora_B.weight"] = torch.randn(6, 2)
    write(tmp_path, {"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors)
    assert [each.name.split(".")[3] for each in read_adapter(tmp_path).layers] == ["0", "2", "10"]


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if tensors is not None:
        save_file(tensors, str(folder / "adapter_model.safetensors"))


PAIR = {"l.lora_A.weight": torch.ones(2, 5), "l.lora_B.weight": torch.ones(6, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ("{", PAIR, "cannot be read"),
        ("[]", PAIR, "peft_type None"),
        ({**CONFIG, "peft_type": "IA3"}, PAIR, "peft_type 'IA3', but must be 'LORA'"),
        ({**CONFIG, "r": "two"}, PAIR, "has r 'two'"),
        ({**CONFIG, "r": 0}, PAIR, "has r 0"),
        ({**CONFIG, "lora_alpha": None}, PAIR, "has lora_alpha None"),
        ({**CONFIG, "rank_pattern": [1]}, PAIR, "must be a mapping"),
        ({**CONFIG, "rank_pattern": {"(": 3}}, PAIR, "no regular expression"),
        ({**CONFIG, "r": 3}, PAIR, "has rank 2, but adapter_config.json says 3"),
        (CONFIG, None, "must be a folder with adapter_model.safetensors"),
        (CONFIG, {}, "no linear LoRA layer"),
        (CONFIG, {"l.lora_A.weight": torch.ones(2, 5)}, "no lora_B"),
        (CONFIG, {"l.lora_B.weight": torch.ones(2, 5)}, "no lora_A"),
        (CONFIG, {**PAIR, "l.lora_B.weight": torch.ones(6, 3)}, r"\(2, 5\) and \(6, 3\)"),
        (CONFIG, {**PAIR, "l.lora_B.weight": torch.ones(6, 2, dtype=torch.int8)}, "must be floats"),
        (CONFIG, {"l.lora_A.weight": torch.ones(2, 5, 3, 3), "l.lora_B.weight": torch.ones(6, 2, 1, 1)}, "no linear"),
    ],
)
def test_broken_folders_are_named(config, tensors, message, tmp_path, capsys):
    write(tmp_path / "adapter", config, tensors)
    assert cli.main(["inspect", str(tmp_path / "adapter")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_truncated_missing_and_pickled_files(folder, tmp_path, capsys):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert cli.main(["inspect", str(folder)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    assert cli.main(["inspect", str(folder)]) == 2
    assert "is a pickle" in capsys.readouterr().err
    for path, message in ((tmp_path / "none", "must be a folder"), (tmp_path, "adapter_config.json")):
        assert cli.main(["inspect", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_numbers_that_are_not_finite_fail_loudly(folder, capsys):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, str(file))
    assert cli.main(["inspect", str(folder), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"]["kind"] == "loud_failure"
    assert sum(each["verdict"]["kind"] == "loud_failure" for each in data["layers"]) == 1


def test_the_page_holds_everything_and_loads_nothing(folder, tmp_path, capsys):
    monitor = lk.api.LandscapeMonitor(1, tmp_path / "log.jsonl")
    for _ in range(2):
        monitor.step(trained())
    out = tmp_path / "<out>"
    command = ["inspect", str(folder), "--out", str(out), "--monitor", str(tmp_path / "log.jsonl")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "not judged" in printed and "2 measurements, steps 1 to 2" in printed
    assert sorted(file.name for file in out.iterdir()) == ["diagnosis.json", "inspect.html"]
    page = (out / "inspect.html").read_text()
    assert len(json.loads((out / "diagnosis.json").read_text())["layers"]) == 14
    titles = [re.sub("<.*", "", title).strip() for title in re.findall(r"<h2[^>]*>(.*)", page)]
    history = ["While it trained: 2 measurements, steps 1 to 2", "Used rank at step 2", "Growth of |sBA| since step 1"]
    hint = "What is missing for a verdict"
    assert titles == ["Used rank", "Size of the update, |sBA|", "Imbalance of A and B", hint, *history]
    assert page.count('title="model.layers.1.mlp.up_proj') == 5 and page.count("<polyline") == 4  # 4 curves, 5 grids
    assert not re.search(r"<script|<link|<iframe|<img|https?://|(src|href|url|import|srcset)\s*[=(]", page)


def test_a_monitor_that_cannot_be_read_leaves_no_folder(folder, tmp_path, capsys):
    out, missing = tmp_path / "out", tmp_path / "log.jsonl"
    assert cli.main(["inspect", str(folder), "--out", str(out), "--monitor", str(missing)]) == 2
    assert "monitor is" in capsys.readouterr().err and not out.exists()
    said = log_summary([{"step": 3, "nuclear": 1.0}, {"step": 9, "nuclear": 2.5, "not_finite": 3.0}])
    assert said == "2 measurements, steps 3 to 9: nuclear 1 -> 2.5, 3 layers not finite"


def test_names_in_the_page_are_escaped(tmp_path):
    name = "base_model.model.<script>alert(1)</script>\" onload='x'"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 5), f"{name}.lora_B.weight": torch.randn(6, 2)}
    write(tmp_path / "adapter", {"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors)
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4 and '" onload=' not in page


def test_zero_and_mixed_ranks_are_drawn(tmp_path):
    tensors = {}
    for index, rank in enumerate((1, 4)):
        tensors[f"base_model.model.h.{index}.lin.lora_A.weight"] = torch.randn(rank, 5)
        tensors[f"base_model.model.h.{index}.lin.lora_B.weight"] = torch.zeros(6, rank)
    tensors["base_model.model.head.lora_A.weight"] = torch.randn(2, 5) / 0
    tensors["base_model.model.head.lora_B.weight"] = torch.randn(6, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"h.0.lin": 1, "h.1.lin": 4}}
    write(tmp_path / "adapter", config, tensors)
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]) == 1
    page = (tmp_path / "out" / "inspect.html").read_text()
    assert "Loud failure" in page and "<b>not finite</b>" in page and "<b>zero update</b>" in page
    assert page.count('colspan="2"') == 4 and page.count("background:#000") == 3  # the head, in four grids; not finite


def test_with_base_and_data(folder, base, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    lines = ["the cat sat on the mat", "a dog ran in the park fast", "the dog sat slow", "a cat ran on a mat"] * 4
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    command = ["inspect", str(folder), "--base", str(base), "--json"]
    assert cli.main([*command, "--intruders"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["adapter"] == str(folder)
    assert all(0 < each["spectrum"]["spectral_share"] < 30 for each in data["layers"])
    assert all(each["overlap"]["intruders"] >= 0 and each["certificate"] is None for each in data["layers"])
    assert cli.main([*command, "--data", str(text), "--weight-decay", "0.01"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["verdict"]["kind"] == "still_training" and data["batches"] == 2
    for each in data["layers"]:
        assert each["certificate"]["ratio"] > 0 and each["certificate"]["gain"] is not None
    for more, message in (
        (["--data", str(text)], "data and weight_decay must be given together"),
        (["--weight-decay", "0.1"], "data and weight_decay must be given together"),
    ):
        assert cli.main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    for more, message in ((["--data", str(text)], "data was given"), (["--intruders"], "intruders was given")):
        assert cli.main(["inspect", str(folder), *more]) == 2
        assert f"{message}, but needs base" in capsys.readouterr().err
    shutil.rmtree(folder)
    trained(r=2).save_pretrained(folder)
    wrong = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: torch.ones(2, 9) if "lora_A" in k else v for k, v in wrong.items()},
        str(folder / "adapter_model.safetensors"),
    )
    assert cli.main(command) == 2
    assert "does not fit base" in capsys.readouterr().err


def test_a_base_without_a_tokenizer_and_with_another_head(folder, base, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*token*"))
    assert not list(bare.glob("*token*"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    # The head is that of the base's own config.
    assert cli.main(["inspect", str(folder), "--base", str(bare), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert cli.main(["inspect", str(folder), "--base", str(bare), "--task", "base"]) == 2
    assert "--task names another head" in capsys.readouterr().err


def test_the_command_says_what_servers_need(tmp_path, capsys):
    model = trained(alpha_pattern={"q_proj": 5})
    model.save_pretrained(tmp_path / "saved")
    lk.export(model, tmp_path / "served", serving=True)
    cli.main(["inspect", str(tmp_path / "saved")])
    said = " ".join(capsys.readouterr().out.split())
    assert "vLLM: other numbers in 2 of 14 layers" in said and "serving=True" in said
    cli.main(["inspect", str(tmp_path / "served")])
    said = " ".join(capsys.readouterr().out.split())
    assert "vLLM: --max-lora-rank 8" in said and "SGLang: --max-lora-rank 8" in said and "serving=True" not in said
    trained(use_dora=True).save_pretrained(tmp_path / "dora")
    cli.main(["inspect", str(tmp_path / "dora")])
    assert "do not compute DoRA: merge the adapter" in " ".join(capsys.readouterr().out.split())
