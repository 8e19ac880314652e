"""What stock PEFT, vLLM, SGLang and llama.cpp compute from what is saved and exported; the table of docs/starting.md.

Each cell is a test by the reader's own arithmetic: the same change of every weight as the model's own, another one, or
a refusal.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import servers
from lora_kernels.adapters.folders import read_adapter
from tests.adapters.start_models import BATCH, BATCHES, TARGETS, nudge, wrapped
from tests.helpers.readers import READERS, Refused, read
from tests.statistics.models import tiny_llama

ROOT = Path(__file__).parents[2]
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}


def launched(model):
    """LoRA-Dash with coordinates that count."""
    run = lk.LoraDash(k=2).attach(model)
    run.launch(torch.optim.AdamW([each for each in model.parameters() if each.requires_grad]), progress=False)
    nudge(model, 0.5)


# By the name of the row: method, settings of the config, what is done to the adapter, and what readers make of
# `save_pretrained` and `export`, in the order of READERS: "=" the same, "x" other numbers, "-" refused.
ROWS = {
    "EVA, LoRA-DA, plain LoRA": ("eva", {}, None, "====", "===="),
    "LoRA-GA, PiSSA, CorDA, task directions": ("lora_ga", {}, None, "====", "===="),
    "LoRA-Dash": ("eva", {}, launched, "=---", "===="),
    "`EVA(rho=2)` or `ranks=`": (lk.init.EVA(rho=2.0), {}, None, "==-x", "==-x"),
    "the same, `adjust_scaling_factors=False`": (
        lk.init.EVA(rho=2.0, adjust_scaling_factors=False),
        {},
        None,
        "=x-=",
        "==-x",
    ),
    "your own `rank_pattern` or `alpha_pattern`": ("eva", PATTERNS, None, "=x-x", "==-x"),
    "rsLoRA": ("eva", {"use_rslora": True}, None, "==xx", "===="),
    "`target_modules` as an expression": ("eva", {"target_modules": r".*(q|v)_proj"}, None, "==-=", "===="),
    "DoRA": ("eva", {"use_dora": True}, None, "=---", "=---"),
}
WRITERS = ("save_pretrained", "export", "serving")


def made(row):
    method, settings, then, _, _ = ROWS[row]
    model = wrapped(**settings)
    lk.initialize(model, BATCHES, method=method, progress=False)
    nudge(model)
    if then is not None:
        then(model)
    return model


def true_changes(model):
    merged, found = copy.deepcopy(model).merge_and_unload().double(), {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")  # noqa: PLW2901
            found[name] = (merged.get_submodule(name).weight - module.get_base_layer().weight).detach().float()
    return found


def written(model, folder, writer):
    if writer == "save_pretrained":
        model.save_pretrained(folder)
    else:
        lk.export(model, folder, serving=writer == "serving")


def base_weights():
    return {name: module.weight.detach() for name, module in tiny_llama().named_modules() if hasattr(module, "weight")}


def outcome(folder, reader, truth):
    try:
        found = READERS[reader](folder, base_weights())
    except Refused:
        return "-"
    assert found.keys() == truth.keys()
    error = max(float((found[name] - each).norm() / each.norm()) for name, each in truth.items())
    assert error < 1e-5 or error > 0.05  # nothing in between, which rounding could explain
    return "=" if error < 1e-5 else "x"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made_ones = {}

    def folder(row, writer):
        if (row, writer) not in made_ones:
            model, where = made(row), tmp_path_factory.mktemp("adapter")
            for each in WRITERS:
                if row == "DoRA" and each == "serving":
                    continue
                written(model, where / each, each)
                made_ones[row, each] = (where / each, true_changes(model))
        return made_ones[row, writer]

    return folder


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("row", ROWS)
def test_what_readers_compute(row, writer, reader, folders):
    if row == "DoRA" and writer == "serving":
        with pytest.raises(ValueError, match="DoRA: merge the adapter"):
            lk.export(made(row), "nowhere", serving=True)
        return
    expected = "====" if writer == "serving" else ROWS[row][3 if writer == "save_pretrained" else 4]
    folder, truth = folders(row, writer)
    assert outcome(folder, reader, truth) == expected[list(READERS).index(reader)]


@pytest.mark.parametrize("method", ["lora_da", "lora_ga", "pissa", "corda", "task_directions"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 6}], ids=["", "rslora"])
def test_every_method_is_right_in_every_reader(method, settings, tmp_path):
    model = wrapped(**settings)
    data = None if method in ("pissa", "task_directions") else BATCHES
    if method == "task_directions":
        nudge(model)
        method = lk.init.TaskDirections(update="adapter")
    lk.initialize(model, data, method=method, force=not isinstance(method, str), progress=False)
    nudge(model)
    truth = true_changes(model)
    for writer in WRITERS:
        written(model, tmp_path / writer, writer)
        for reader in READERS:
            known = reader in ("PEFT", "vLLM") or not settings or writer != "save_pretrained"
            # What is saved with a start has no rsLoRA any more: it is one scaling of a larger rank.
            expected = "=" if known or method != "lora_da" else "x"
            assert outcome(tmp_path / writer, reader, truth) == expected, (writer, reader)


SIGNS = {"=": "yes", "x": "**no**", "-": "refused"}


def table():
    """The lines of the table, as docs/starting.md has them."""
    lines = [
        "| | " + " | ".join(f"{reader}: saved / exported" for reader in READERS) + " | `serving=True` |",
        "| --- |" + " --- |" * (len(READERS) + 1),
    ]
    for row, (_, _, _, saved, exported) in ROWS.items():
        cells = [f"{SIGNS[one]} / {SIGNS[other]}" for one, other in zip(saved, exported, strict=True)]
        lines.append(f"| {row} | {' | '.join(cells)} | {'refused' if row == 'DoRA' else 'yes in all'} |")
    return lines


def test_the_page_says_what_the_tests_found():
    page = (ROOT / "docs" / "starting.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page


def logits(model):
    with torch.no_grad():
        return model.eval()(**{key: BATCH[key] for key in ("input_ids", "attention_mask")}).logits


@pytest.mark.parametrize("row", ROWS)
def test_stock_peft_itself_agrees_with_its_reader(row, folders, tmp_path):
    model = made(row)
    for writer in WRITERS:
        if row == "DoRA" and writer == "serving":
            continue
        written(model, tmp_path / writer, writer)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / writer)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(("serving", "rank"), [(True, 8), ("vllm", 8), ("llama.cpp", 6)])
def test_a_folder_for_servers(serving, rank, tmp_path):
    model = wrapped(r=6, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True)
    nudge(model)
    report = lk.export(model, tmp_path, serving=serving)
    config, factors, others = read(tmp_path)
    assert not others and config["r"] == rank and {len(a) for a, _ in factors.values()} == {rank}
    assert {each.rank for each in report.values()} == {rank} and {each.error for each in report.values()} == {0.0}
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["use_rslora"] is False
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    truth = true_changes(model)
    for reader in READERS:
        assert outcome(tmp_path, reader, truth) == "="
    torch.testing.assert_close(logits(lk.load(tiny_llama(), tmp_path)), logits(model), rtol=1e-5, atol=2e-6)
    cut = lk.export(model, tmp_path / "cut", serving=serving, rank=1)
    assert {each.rank for each in cut.values()} == {8 if rank == 8 else 1} and max(each.error for each in cut.values())


def test_layers_of_the_common_scaling_keep_their_bits(tmp_path):
    model = wrapped(alpha_pattern={"q_proj": 3.3})
    nudge(model)
    lk.export(model, tmp_path, serving="llama.cpp")
    _, factors, _ = read(tmp_path)
    for name, (a, b) in factors.items():
        module = model.get_submodule(f"base_model.model.{name}")
        assert torch.equal(a, module.lora_A["default"].weight)
        assert torch.equal(b, module.lora_B["default"].weight) == ("q_proj" not in name)


def test_a_scaling_of_zero_stays_zero_where_an_alpha_of_zero_means_one(tmp_path):
    model = wrapped()
    nudge(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.0)
    lk.export(model, tmp_path, serving=True)
    for read_all in READERS.values():
        assert all(not change.any() for change in read_all(tmp_path, base_weights()).values())


class Tails(nn.Module):
    """Names of which one is the tail of another: as a list they match too much."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.a = nn.Linear(16, 16), nn.ModuleDict({"q": nn.Linear(16, 16), "v": nn.Linear(16, 16)})

    def forward(self, x):
        return self.q(x) + self.a["q"](x.relu()) + self.a["v"](x.abs())


def test_a_list_of_modules_where_only_an_expression_tells_them_apart(tmp_path):
    model = get_peft_model(Tails(), LoraConfig(r=4, target_modules="q|a.v"))
    nudge(model)
    lk.export(model, tmp_path, serving=True)
    config, factors, _ = read(tmp_path)
    assert sorted(config["target_modules"]) == ["a.v", "q"] == sorted(factors)
    again, x = PeftModel.from_pretrained(Tails(), tmp_path), torch.randn(5, 16)
    torch.testing.assert_close(again(x), model(x))
    assert [name for name, module in again.named_modules() if isinstance(module, LoraLayer)] == [
        name for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, "embeddings"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, "target_parameters"),
    ],
)
@pytest.mark.parametrize("serving", [True, "llama.cpp"])
def test_what_servers_do_not_compute_is_refused_before_anything_is_written(settings, named, serving, tmp_path):
    model = wrapped(**settings)
    with pytest.raises(ValueError, match=rf"{re.escape(named)}.*: merge the adapter instead"):
        lk.export(model, tmp_path / "out", serving=serving)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "saved")
    assert any(named in note and "merge" in note for note in read_adapter(tmp_path / "saved").notes)


def test_ranks_that_vllm_has_no_place_for(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(640, 640)), LoraConfig(r=600, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"rank 600, but vLLM's --max-lora-rank ends at 512: cut it \(rank=512\)"):
        lk.export(model, tmp_path / "out", serving=True)
    assert not (tmp_path / "out").exists()
    assert lk.export(model, tmp_path / "out", serving="llama.cpp")["base_model.model.0"].rank == 600
    assert [servers.slot(rank) for rank in (1, 8, 9, 33, 257, 321, 512)] == [8, 8, 16, 64, 320, 512, 512]
    with pytest.raises(ValueError, match="serving is 'tgi', but must be one of"):
        lk.export(model, tmp_path / "other", serving="tgi")


@pytest.mark.parametrize("row", [row for row in ROWS if row != "DoRA"])
@pytest.mark.parametrize("writer", WRITERS)
def test_inspect_says_what_the_readers_do(row, writer, folders):
    """A server that computes the adapter gets the option it needs; any other the way out."""
    folder, truth = folders(row, writer)
    said = {note.partition(":")[0]: note for note in read_adapter(folder).notes}
    if row == "LoRA-Dash" and writer == "save_pretrained":
        assert "LoRA-Dash" in said["servers (vLLM, SGLang, llama.cpp)"] and "serving=True" in str(said)
        return
    for reader in ("vLLM", "SGLang", "llama.cpp"):
        assert ("serving=True" in said[reader]) == (outcome(folder, reader, truth) != "="), said[reader]
    if writer == "serving":
        assert said["vLLM"] == "vLLM: --max-lora-rank 8"
