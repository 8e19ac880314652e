import json
import subprocess
import sys

import pytest
import torch

from lora_kernels import cli
from lora_kernels.doctor import SelfTest, self_tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<unk>", *["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "park", "fast", "slow"]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<pad>", unk_token="<unk>").save_pretrained(where)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=14)
    ).save_pretrained(where)
    return where


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    lines = ["the cat sat on the mat", "a dog ran in the park fast", "the dog sat slow", "a cat ran on a mat"] * 10
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return file


def test_init_writes_an_adapter_that_stock_peft_loads(folder, text, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "adapter"
    command = ["init", "--model", str(folder), "--data", str(text), "--out", str(out), "--rank", "4"]
    assert cli.main(command) == 0
    assert "eva: " in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    assert "Explained variance" in page and page.count(": rank 4 before, 4 now") == len(report["layers"]) > 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out)
    found = {name: module.r["default"] for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert found == {each["name"]: each["rank"] for each in report["layers"]} and set(found.values()) == {4}
    other = tmp_path / "moved"
    assert cli.main([*command[:6], str(other), *command[7:], "--rho", "2"]) == 0
    assert len({each["rank"] for each in json.loads((other / "report.json").read_text())["layers"]}) > 1
    assert cli.main(command) == 2  # never over something that is there
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_init_prints_a_learning_rate(folder, text, tmp_path, capsys):
    command = ["init", "--model", str(folder), "--data", str(text), "--rank", "2", "--batch-size", "2", "--out"]
    assert cli.main([*command, str(tmp_path / "one"), "--optimizer", "lora_pro"]) == 0
    assert "learning rate for lora_pro: " in " ".join(capsys.readouterr().out.split())
    advice = json.loads((tmp_path / "one" / "report.json").read_text())["learning_rate"]
    assert advice["optimizer"] == "lora_pro" and len(advice["line"]) > 3
    assert cli.main([*command, str(tmp_path / "two"), "--no-rate"]) == 0
    assert "learning rate for" not in capsys.readouterr().out
    assert json.loads((tmp_path / "two" / "report.json").read_text())["learning_rate"] is None


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 4, 6, 8, 2, 10]])).logits


@pytest.mark.parametrize("method", ["lora_ga", "lora_da", "corda", "pissa", "task_directions"])
def test_init_by_every_method(method, folder, text, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import lora_kernels as lk

    out = tmp_path / "adapter"
    command = ["init", "--model", str(folder), "--data", str(text), "--out", str(out), "--method", method]
    more = ["--rank", "2", "--ranks", "gradient_energy", "--max-rank", "4", "--min-rank", "1"]
    assert cli.main([*command, *more]) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == method and len({each["rank"] for each in report["layers"]}) > 1
    assert all(each["first_step"] < 0 for each in report["layers"])
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits_of(base)
    if method == "lora_da":
        assert "stock PEFT" in " ".join(printed.split())  # long paths wrap
        assert not torch.equal(logits_of(PeftModel.from_pretrained(base, out)), before)
        return
    assert "lora_kernels.load to train" in " ".join(printed.split())
    loaded = lk.load(base, out)
    torch.testing.assert_close(logits_of(loaded), before, rtol=1e-4, atol=1e-5)
    trainable = [name for name, each in loaded.named_parameters() if each.requires_grad]
    assert trainable and all(".lora_A." in name or ".lora_B." in name for name in trainable)
    with torch.no_grad():
        for name, value in loaded.named_parameters():
            if name in trainable:
                value.mul_(1.1)
    changed = logits_of(loaded)
    assert not torch.allclose(changed, before, rtol=1e-4, atol=1e-5)
    lk.export(loaded, tmp_path / "stock")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "stock")
    torch.testing.assert_close(logits_of(stock), changed, rtol=1e-4, atol=1e-5)


def test_init_of_a_classifier_reads_labels(tmp_path, folder, capsys):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    where = tmp_path / "classifier"
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=14, pad_token_id=0
    )
    config.num_labels = 2
    config.id2label, config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    LlamaForSequenceClassification(config).save_pretrained(where)
    AutoTokenizer.from_pretrained(folder).save_pretrained(where)
    data = tmp_path / "rows.csv"
    data.write_text("text,kind\n" + "the cat sat,cat\na dog ran,dog\nthe dog sat fast,1\n" * 4)
    command = ["init", "--model", str(where), "--data", str(data), "--task", "sequence-classification", "--rank", "2"]
    command += ["--method", "lora_ga", "--label-column", "kind", "--set", "gamma=64", "--set", "direction=ArBr"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
    assert settings["gamma"] == 64 and settings["direction"] == "ArBr"
    data.write_text("text,kind\nthe cat sat,cow\n")
    assert cli.main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "label 'cow' is none of the model's: cat, dog" in capsys.readouterr().err


def test_init_of_a_model_without_a_head_makes_one_for_the_labels_of_the_data(tmp_path, folder, capsys):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    data = tmp_path / "rows.csv"
    data.write_text("text,kind\n" + "the cat sat,cat\na dog ran,dog\nthe dog sat fast,both\n" * 4)
    command = ["init", "--model", str(folder), "--data", str(data), "--task", "sequence-classification", "--rank", "2"]
    command += ["--method", "lora_da", "--label-column", "kind"]
    heads = []
    for name in ("first", "second"):
        assert cli.main([*command, "--out", str(tmp_path / name)]) == 0
        assert "Load the base with num_labels=3." in capsys.readouterr().out.replace("\n", " ")
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
        model = PeftModel.from_pretrained(base, tmp_path / name)
        heads.append(model.base_model.model.score.modules_to_save["default"].weight)
    assert heads[0].shape == (3, 32) and torch.equal(*heads)  # the same head again
    command = ["inspect", str(tmp_path / "first"), "--base", str(folder), "--data", str(data), "--label-column", "kind"]
    assert cli.main([*command, "--weight-decay", "0.1"]) == 0


@pytest.fixture
def encoder(folder, tmp_path):
    """An encoder without a head, and labelled rows."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    where, data = tmp_path / "encoder", tmp_path / "rows.csv"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=14, pad_token_id=0, **size)).save_pretrained(where)
    AutoTokenizer.from_pretrained(folder).save_pretrained(where)
    data.write_text("text,kind\n" + "the cat sat,cat\na dog ran,dog\nthe dog sat fast,both\n" * 4)
    return where, data


def test_a_model_without_a_head_is_not_given_that_of_a_language_model(encoder, tmp_path, capsys):
    model, data = encoder
    where, out = ["--model", str(model), "--data", str(data)], tmp_path / "out"
    assert cli.main(["init", *where, "--out", str(out), "--rank", "2"]) == 0
    layers = [each["name"] for each in json.loads((out / "report.json").read_text())["layers"]]
    assert layers and all(name.startswith("base_model.model.encoder.") or "pooler" in name for name in layers)
    capsys.readouterr()
    assert cli.main(["verify", *where, "--adapter", str(out)]) == 0
    assert "stands for the loss" in capsys.readouterr().out
    assert cli.main(["inspect", str(out), "--base", str(model)]) == 0
    command = ["init", *where, "--out", str(tmp_path / "other"), "--rank", "2", "--method", "lora_ga"]
    assert cli.main(command) == 2
    assert "reads gradients, but a model loaded as base without labels has no loss" in capsys.readouterr().err
    assert cli.main([*command[:-2], "--ranks", "gradient_energy"]) == 2
    assert "eva with --ranks gradient_energy reads gradients" in capsys.readouterr().err


def test_labels_make_a_classifier_of_it(encoder, tmp_path, capsys):
    model, data = encoder
    where, out = ["--model", str(model), "--data", str(data), "--label-column", "kind"], tmp_path / "out"
    assert cli.main(["init", *where, "--out", str(out), "--rank", "2", "--method", "lora_ga"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    capsys.readouterr()
    assert cli.main(["verify", *where, "--adapter", str(out)]) == 0
    assert "stands for the loss" not in capsys.readouterr().out
    assert cli.main(["verify", *where]) == 0  # a random adapter


@pytest.mark.parametrize(
    "architectures, task",
    [
        (["LlamaForCausalLM"], "causal-lm"),
        (["GPT2LMHeadModel"], "causal-lm"),
        (["BertForSequenceClassification"], "sequence-classification"),
        (["BertModel"], "base"),
        (["ViTForImageClassification"], "base"),
        (None, "causal-lm"),
    ],
)
def test_the_head_is_what_was_asked_for_or_the_adapters_or_of_the_labels_or_the_configs(architectures, task, tmp_path):
    from lora_kernels.api.transformers import task_for

    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architectures": architectures}))
    assert task_for(tmp_path) == task_for(config) == task
    assert task_for(config, labels=["a"]) == "sequence-classification"
    assert task_for(config, labels=["a"], task_type="CAUSAL_LM") == "causal-lm"
    assert task_for(config, "base", ["a"], "SEQ_CLS") == "base"


@pytest.mark.parametrize(
    "change, message",
    [
        (["--set", "gamma=2"], "set is 'gamma=2', but must be NAME=VALUE with a name out of"),
        (["--method", "lora_ga", "--set", "gamma=-2"], "gamma is -2"),
        (["--ranks", "loss"], "score is 'loss'"),
        (["--data", "missing.csv"], "must be an existing .csv or .jsonl file"),
        (["--text-column", "body"], "must include 'body'"),
        (["--method", "magic"], "method is 'magic', but must be one of 'corda'"),
        (["--model", "nowhere"], "must be a folder with a transformers config.json"),
        (["--task", "vision"], "task is 'vision'"),
        (["--rho", "0.1"], "rho is 0.1, but must be >= 1"),
    ],
)
def test_bad_input_is_one_clear_line(change, message, folder, text, tmp_path, capsys):
    command = ["init", "--model", str(folder), "--data", str(text), "--out", str(tmp_path / "out")]
    assert cli.main([*command, *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_every_option_with_its_default(capsys):
    from dataclasses import fields

    from lora_kernels.init import METHODS

    for name, kind in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        for option in fields(kind):
            assert option.name.replace("_", "-") in printed, (name, option.name)
        if name == "init":
            assert "--rank RANK r of every layer (default: 16)" in printed
            assert "read at most this many batches (per process) (default: 64)" in printed
            assert "--progress, --no-progress show a progress bar" in printed and "(default: attention)" in printed
            assert all(f"{method}: " in printed for method in METHODS) and "gamma=16.0" in printed


def test_options_of_a_dataclass():
    import argparse
    from dataclasses import dataclass, field

    from lora_kernels.cli import add_options

    @dataclass
    class Options:
        """Options.

        Attributes:
            first: 5 % of all
            second_one: another text,
                on two lines.
            third: a switch
            fourth: many
            fifth: cannot be given as text
        """

        first: int | None
        second_one: float = 2.5
        third: bool = True
        fourth: list[int] = field(default_factory=list)
        fifth: object = None

    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    assert vars(parser.parse_args(["--first", "3"])) == {"first": 3}
    given = parser.parse_args(
        ["--first", "3", "--second-one", "1", "--no-third", "--fourth", "1", "2", "--fourth", "3"]
    )
    assert vars(given) == {"first": 3, "second_one": 1.0, "third": False, "fourth": [1, 2, 3]}
    text = " ".join(parser.format_help().split())
    assert "5 % of all" in text and "another text, on two lines (default: 2.5)" in text and "fifth" not in text


@pytest.mark.parametrize(
    "config, more, status, message",
    [
        ({"model_type": "clip"}, ["--task", "base"], 0, "a forward pass without weights failed"),
        ({"model_type": "vit", "image_size": [1, 2, 3]}, ["--task", "base"], 0, "inputs are not shared here"),
        ({"model_type": "llama", "num_attention_heads": 0}, [], 2, "cannot be made into a causal-lm model"),
        ({"model_type": "vit", "image_size": [1, 2, 3]}, ["--task", "base", "--world", "0"], 2, "world_size is 0"),
        ({"model_type": "resnet"}, ["--task", "base"], 2, "there is no layer"),
        ([], [], 2, "holds no object with a model_type"),
    ],
)
def test_plan_says_in_one_line_what_is_wrong(config, more, status, message, tmp_path, capfd):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert cli.main(["plan", "--config", str(file), "--method", "lora_ga", *more]) == status
    lines = [line for line in capfd.readouterr().err.splitlines() if message in line]
    assert len(lines) == 1 and (status == 0 or lines[0].startswith("lora-kernels plan: error: "))


def test_verify(folder, text, tmp_path, capsys, monkeypatch):
    command = ["verify", "--model", str(folder), "--data", str(text), "--rank", "4"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "7 LoRA layers: 7 fused" in printed and "as accurate as PEFT" in printed
    out = tmp_path / "adapter"
    assert cli.main(["init", "--model", str(folder), "--data", str(text), "--out", str(out), "--method", "pissa"]) == 0
    assert cli.main([*command, "--adapter", str(out)]) == 0
    monkeypatch.setattr("lora_kernels.training.verification.LIMIT", 0.0)
    assert cli.main(command) == 1
    assert "LESS ACCURATE" in capsys.readouterr().out


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "covariance_" in printed and "BROKEN" not in printed and "torch" in printed


def test_doctor_notices_a_broken_backend(monkeypatch, capsys):
    from lora_kernels.ops.covariance import op

    monkeypatch.setattr(op, "packed", lambda *_, **__: iter(()))  # torch's backend adds nothing
    assert cli.main(["doctor"]) == 1
    assert "BROKEN" in capsys.readouterr().out
    assert SelfTest("op", "torch", "cpu", float("nan"), 1e-5).broken
    assert not SelfTest("op", "triton", "cpu", None, 1e-5, "no GPU").broken
    assert any(each.op == "eigh" and each.error is not None for each in self_tests())


def test_import_is_lean():
    """Importing starts no CUDA, and needs neither the extension nor Triton nor PEFT."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "peft", "transformers", "jinja2") or name == "lora_kernels._C":
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import torch, warnings
import lora_kernels as lk
assert not torch.cuda.is_initialized()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        out = torch.zeros(3, 3)
        lk.ops.covariance_(out, torch.eye(3))
ours = [w for w in caught if "plain torch backend" in str(w.message)]
assert len(ours) == 1 and torch.equal(out, torch.eye(3)), caught
print("lean")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "lean", done.stderr
