"""Shows that a saved adapter is a stock PEFT adapter: a fresh process loads it and must give the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.batches import Batch

# Two processes may take different paths through the same library (memory alignment); a wrong factor shows at 1e-2.
TOLERANCE = 1e-5
TIME_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class RoundTrip:
    """Outcome of the check.

    Attributes:
        ok: Whether the logits agree and the fresh process did without this package.
        largest_difference: Largest absolute difference of two logits, over the largest logit; None if none came back.
        message: One line for the user.
    """

    ok: bool
    largest_difference: float | None
    message: str


def check_round_trip(model: Any, batch: Batch, base: Path, adapter: Path, pad_token_id: int) -> RoundTrip:
    """Compares a model's logits with those of its saved adapter, loaded by `PeftModel.from_pretrained` elsewhere.

    Args:
        model: The trained `PeftModel`, a sequence classifier.
        batch: Encoded examples; the labels are not used.
        base: Folder of the base model.
        adapter: Folder that `model.save_pretrained` wrote.
        pad_token_id: The tokenizer's padding token.

    Returns:
        The outcome; a process that fails is an outcome too, with the last line of its error.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(**inputs).logits
    finally:
        model.train(was_training)
    with tempfile.TemporaryDirectory() as folder:
        found = _logits_elsewhere(Path(folder), inputs, base, adapter, expected.shape[-1], pad_token_id)
    if isinstance(found, str):
        return RoundTrip(False, None, f"the saved adapter does not load in a fresh process: {found}")
    if bool(found["saw_lora_kernels"].any()):
        return RoundTrip(False, None, "the fresh process imported lora_kernels, must do without")
    if found["logits"].shape != expected.shape:
        shapes = f"{tuple(found['logits'].shape)}, must be {tuple(expected.shape)}"
        return RoundTrip(False, None, f"the reloaded logits had shape {shapes}")
    difference = float((found["logits"] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    where = f"{len(expected)} texts, fresh process, stock PEFT"
    if not difference <= TOLERANCE:
        return RoundTrip(False, difference, f"reloaded logits DIFFER by {difference:.1e} of the largest ({where})")
    size = "identical to the bit" if difference == 0 else f"equal, largest relative difference {difference:.1e}"
    return RoundTrip(True, difference, f"reloaded logits are {size} ({where})")


def _logits_elsewhere(
    folder: Path, inputs: Batch, base: Path, adapter: Path, classes: int, pad_token_id: int
) -> dict[str, torch.Tensor] | str:
    """The fresh process's tensors, or the last line of its error."""
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    job = {
        "base": str(base.resolve()),
        "adapter": str(adapter.resolve()),
        "inputs": str(folder / "inputs.safetensors"),
        "outputs": str(folder / "outputs.safetensors"),
        "classes": classes,
        "threads": torch.get_num_threads(),
        "pad_token_id": pad_token_id,
    }
    # The source goes in as text, run from an empty folder, so that this package is not on the path by place.
    script = Path(__file__).with_name("_reload.py").read_text(encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(job)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIME_LIMIT_SECONDS} s"
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {done.returncode}"
    return dict(load_file(folder / "outputs.safetensors"))
