import ast

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.demo import roundtrip
from benchmarks.demo.files import read_task
from benchmarks.demo.roundtrip import check_round_trip
from benchmarks.demo.training import Inputs, Run, train


@pytest.fixture
def trained(tiny_model, colour_file, tmp_path):
    """A trained EVA adapter in a folder: (arguments of the check, weights file)."""
    inputs = Inputs(tiny_model, read_task(colour_file), max_tokens=8)
    model, _ = train(Run("eva", 0, 2e-2, method="eva", rank=4, batch_size=8, evaluate_at=(8,)), inputs)
    adapter = tmp_path / "adapter"
    model.save_pretrained(str(adapter))
    batch = inputs.batches.encode(inputs.task.test)
    return (model, batch, tiny_model, adapter, inputs.tokenizer.pad_token_id), adapter / "adapter_model.safetensors"


def test_the_true_adapter_passes_and_tampered_ones_do_not(trained):
    arguments, weights = trained
    outcome = check_round_trip(*arguments)
    assert outcome.ok
    assert outcome.largest_difference <= 1e-5
    assert arguments[0].training

    tensors = load_file(weights)
    (name,) = [name for name in tensors if "layer.1.attention.self.value" in name and "lora_B" in name]
    assert tensors[name].abs().max() > 1e-3
    # One factor one percent off, as a wrong scaling of one layer would be.
    save_file({**tensors, name: tensors[name] * 1.01}, weights, metadata={"format": "pt"})
    outcome = check_round_trip(*arguments)
    assert not outcome.ok
    assert outcome.largest_difference > 1e-5
    assert "DIFFER" in outcome.message

    weights.write_bytes(b"no safetensors")
    outcome = check_round_trip(*arguments)
    assert not outcome.ok
    assert outcome.largest_difference is None
    assert "does not load in a fresh process" in outcome.message


def test_a_head_that_was_not_saved_is_noticed(trained):
    arguments, weights = trained
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "classifier" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    outcome = check_round_trip(*arguments)
    assert not outcome.ok
    assert outcome.largest_difference is None or outcome.largest_difference > 0.01


def test_non_finite_logits_do_not_pass(trained):
    (model, batch, *rest), _ = trained
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias[0] = float("nan")
    assert not check_round_trip(model, batch, *rest).ok


def test_the_reloading_script_names_nothing_of_this_package():
    source = roundtrip.Path(roundtrip.__file__).with_name("_reload.py").read_text()
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert {name.split(".")[0] for name in imported} == {"json", "sys", "torch", "peft", "safetensors", "transformers"}
