import ast
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.demo import roundtrip
from benchmarks.demo.roundtrip import check_round_trip
from benchmarks.demo.side import Recipe, prepare
from benchmarks.demo.texts import Encoder, word_problems
from tests.helpers.warm import Warm


@pytest.fixture
def trained(tiny_decoder, tmp_path):
    """A trained LoRA-GA adapter in a folder: (arguments of the check, weights file)."""
    base = AutoModelForCausalLM.from_pretrained(tiny_decoder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.pad_token = tokenizer.eos_token
    encoder, task = Encoder(tokenizer, 96), word_problems(4)
    batches = [next(encoder.shuffled(task.train, 4, seed)) for seed in range(6)]
    side = prepare("ours", Recipe("lora_ga", accelerate=True), base, 2e-2, batches[:2], steps=6, rank=4)
    for batch in batches:
        side.step(batch)
    adapter = tmp_path / "adapter"
    side.model.save_pretrained(str(adapter))
    return (side.model, encoder.encode(task.test), tiny_decoder, adapter), adapter / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def warm():
    with Warm(("torch", "peft", "transformers"), {**os.environ, "HF_HUB_OFFLINE": "1"}) as made:
        yield made


@pytest.fixture
def imports_done(warm, tmp_path, monkeypatch):
    """From this call on, the fresh processes begin with PEFT imported."""

    def run(command, cwd, **_):
        _, option, script, job = command
        assert option == "-c"
        (tmp_path / "script.py").write_text(script)
        done = warm.run(str(tmp_path / "script.py"), job, cwd=cwd)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)

    patched = SimpleNamespace(run=run, SubprocessError=subprocess.SubprocessError)
    return lambda: monkeypatch.setattr(roundtrip, "subprocess", patched)


def test_the_true_adapter_passes_and_tampered_ones_do_not(trained, imports_done):
    arguments, weights = trained
    outcome = check_round_trip(*arguments)
    assert outcome.ok
    assert outcome.largest_difference <= 1e-5
    assert arguments[0].training

    imports_done()
    assert check_round_trip(*arguments).ok
    tensors = load_file(weights)
    (name,) = [name for name in tensors if "layers.1.self_attn.v_proj" in name and "lora_B" in name]
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


def test_non_finite_logits_do_not_pass(trained, imports_done):
    arguments, _ = trained
    imports_done()
    with torch.no_grad():
        next(parameter for parameter in arguments[0].parameters() if parameter.requires_grad)[0] = float("nan")
    assert not check_round_trip(*arguments).ok


def test_the_reloading_script_names_nothing_of_this_package():
    source = roundtrip.Path(roundtrip.__file__).with_name("_reload.py").read_text()
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert {name.split(".")[0] for name in imported} == {"json", "sys", "torch", "peft", "safetensors", "transformers"}
