"""`lora-kernels inspect` of adapters on experts: without the base model, their number follows from rank and shapes."""

import json

import pytest
from safetensors.torch import load_file, save_file

import lora_kernels as lk
from lora_kernels import cli
from lora_kernels.adapters.folders import CONFIG, WEIGHTS, read_adapter
from lora_kernels.api.diagnosis import inspect_folder
from tests.adapters.start_models import nudge
from tests.adapters.test_experts_files import CONVERTS, PARAMETERS, REGISTRY, adapted, experts_alone, make

pytestmark = REGISTRY
NAMES = [pytest.param("Qwen3Moe", marks=pytest.mark.skipif(not CONVERTS, reason="PEFT leaves them out")), "GptOss"]


def same_numbers(folder, model):
    """Spectra of the files are those of the model, for all that the model's own diagnosis has."""
    alone, truth = inspect_folder(read_adapter(folder)), lk.diagnose(model, weights=False)
    by_name = {layer.name: layer for layer in alone}
    for layer in truth:
        mine = by_name.pop(layer.name)
        assert mine.parameter == layer.parameter and mine.spectrum.rank == layer.spectrum.rank
        assert mine.spectrum.scaling == pytest.approx(layer.spectrum.scaling)
        assert mine.spectrum.values == pytest.approx(layer.spectrum.values, rel=1e-4, abs=1e-9)
        assert mine.spectrum.balance == pytest.approx(layer.spectrum.balance, rel=1e-4)
        if layer.spectrum.drift is None:
            assert mine.spectrum.drift is None
        else:
            assert mine.spectrum.drift == pytest.approx(layer.spectrum.drift, rel=1e-4)
    assert all(name.endswith("mlp.gate") for name in by_name)  # routers, single matrices, which a model's has not
    assert {summary.name: summary.ranks for summary in alone.experts} == {
        summary.name: summary.ranks for summary in truth.experts
    }
    return alone


@pytest.mark.parametrize("method", [None, "pissa"])
@pytest.mark.parametrize("name", NAMES)
def test_files_alone_give_the_experts_of_the_model(tmp_path, name, method):
    """Ranks and alphas by pattern, paths and bare names, both layouts, frozen starts joined as more rank."""
    model = adapted(name)
    if method is not None:
        lk.initialize(model, None, method, progress=False)
    nudge(model)
    model.save_pretrained(tmp_path)
    alone = same_numbers(tmp_path, model)
    assert [summary.count for summary in alone.experts] == [4, 4, 4, 4] and not alone.unsupported
    assert {summary.rank for summary in alone.experts} == ({4, 8} if name == "Qwen3Moe" else {2, 4})
    lk.export(model, tmp_path / "exported")
    assert len(inspect_folder(read_adapter(tmp_path / "exported")).experts) == 4


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_an_adapter_of_experts_alone_is_inspected(tmp_path, capsys, name):
    model = experts_alone(name)
    nudge(model)
    model.save_pretrained(tmp_path / "adapter")
    same_numbers(tmp_path / "adapter", model)
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--out", str(tmp_path / "page")]) in (0, 1)
    printed = capsys.readouterr().out
    assert printed.count("(4 experts)") == 4
    written = json.loads((tmp_path / "page" / "diagnosis.json").read_text())
    assert [entry["count"] for entry in written["experts"]] == [4] * 4 and len(written["layers"]) == 16


def test_with_its_base_a_folder_of_experts_fits(tmp_path, capsys):
    base, model = tmp_path / "base", experts_alone("GptOss")
    make("GptOss").save_pretrained(base)
    model.save_pretrained(tmp_path / "adapter")
    assert cli.main(["inspect", str(tmp_path / "adapter"), "--base", str(base), "--task", "causal-lm"]) in (0, 1)
    assert capsys.readouterr().out.count("(4 experts)") == 4


def rewrite(folder, tensors=None, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    if tensors is not None:
        save_file(tensors, folder / WEIGHTS)


def test_experts_whose_number_the_files_do_not_say_are_named(tmp_path, capsys):
    folder, experts = tmp_path / "adapter", PARAMETERS["GptOss"]
    adapted("GptOss").save_pretrained(folder)
    unknown = "target_parameters ({}): the files alone do not say of how many experts, or whose"
    for changes, parameters in (
        ({"rank_pattern": {f"{experts}.down_proj": 3}}, "gate_up_proj, down_proj"),  # 8 rows
        ({"rank_pattern": {}}, "gate_up_proj, down_proj"),  # 4 experts of the one, 2 of the other
        ({"target_parameters": [f"{experts}.gate_up_proj"]}, "gate_up_proj"),  # and two pairs of factors
        ({"target_parameters": [f"{experts}.one", f"{experts}.two"]}, "one, two"),  # nested in an unknown order
    ):
        saved = json.loads((folder / CONFIG).read_text())
        rewrite(folder, **changes)
        found = read_adapter(folder)
        assert [name.removeprefix("base_model.model.") for name, _ in found.unsupported] == [
            f"model.layers.{index}.{experts}" for index in (0, 1)
        ]
        assert all(why.startswith(unknown.format(parameters)) for _, why in found.unsupported), found.unsupported
        assert {layer.parameter for layer in found.layers} == {None}
        assert cli.main(["inspect", str(folder)]) in (0, 1)
        printed = " ".join(capsys.readouterr().out.split())
        assert f"target_parameters ({parameters})" in printed and "--base" in printed
        (folder / CONFIG).write_text(json.dumps(saved))
    alone = {key: value for key, value in load_file(folder / WEIGHTS).items() if ".experts." in key}
    rewrite(folder, alone, rank_pattern={})
    assert cli.main(["inspect", str(folder)]) == 2
    assert "no linear LoRA layer" in (error := capsys.readouterr().err) and "gate_up_proj, down_proj" in error


def test_gate_up_proj_is_told_by_its_size(tmp_path):
    """Whatever the order in which a module has its parameters, and PEFT nests them."""
    folder = tmp_path / "adapter"
    adapted("GptOss").save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    swapped = {}
    for key, value in tensors.items():
        other = key.replace(".experts.base_layer.", ".experts.*.").replace(".experts.lora", ".experts.base_layer.lora")
        swapped[other.replace(".experts.*.", ".experts.")] = value
    assert swapped.keys() == tensors.keys()
    before = {layer.name: layer.spectrum.rank for layer in inspect_folder(read_adapter(folder))}
    rewrite(folder, swapped)
    after = {layer.name: layer.spectrum.rank for layer in inspect_folder(read_adapter(folder))}
    assert before == after and any(".down_proj.3" in name for name in after)
