"""The saved adapter is a stock PEFT adapter: a fresh process loads it and must compute the same logits."""

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
from safetensors.torch import load_file, save_file

from benchmarks.demo.texts import Batch

# Two processes may take different paths through the same library (memory alignment); a wrong factor shows at 1e-2.
TOLERANCE = 1e-5
TIME_LIMIT_SECONDS = 300


@dataclass(frozen=True)
class RoundTrip:
    """Whether the logits agree, their largest difference over the largest logit (None without logits), and a line."""

    ok: bool
    largest_difference: float | None
    message: str


def check_round_trip(model: Any, batch: Batch, base: Path, adapter: Path) -> RoundTrip:
    """Compare a model's logits with those that `PeftModel.from_pretrained` gives elsewhere; its failure is a result."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(**inputs).logits.cpu()
    finally:
        model.train(was_training)
    job = {"base": str(base.resolve()), "adapter": str(adapter.resolve()), "threads": torch.get_num_threads()}
    try:
        reloaded = _logits_elsewhere(job, {name: tensor.cpu().contiguous() for name, tensor in inputs.items()})
    except (subprocess.SubprocessError, OSError) as error:
        text = getattr(error, "stderr", None) or str(error)
        return RoundTrip(False, None, f"the saved adapter does not load in a fresh process: {text.splitlines()[-1]}")
    if bool(reloaded["imported_lora_kernels"]):
        return RoundTrip(False, None, "the fresh process imported lora_kernels, but must do without")
    logits = reloaded["logits"]
    if logits.shape != expected.shape:
        return RoundTrip(False, None, f"reloaded logits are {tuple(logits.shape)}, but must be {tuple(expected.shape)}")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    where = f"{len(expected)} texts, fresh process, stock PEFT"
    if not difference <= TOLERANCE:
        return RoundTrip(False, difference, f"reloaded logits DIFFER by {difference:.1e} of the largest ({where})")
    size = "identical to the bit" if difference == 0 else f"equal, largest relative difference {difference:.1e}"
    return RoundTrip(True, difference, f"reloaded logits are {size} ({where})")


def _logits_elsewhere(job: dict[str, Any], inputs: Batch) -> dict[str, torch.Tensor]:
    """The fresh process's tensors."""
    # The source goes in as text, run from an empty folder, so that this repository is not on the path by place.
    script = Path(__file__).with_name("_reload.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, f"{name}.safetensors")) for name in ("inputs", "outputs")}
        save_file(inputs, files["inputs"])
        subprocess.run(
            [sys.executable, "-c", script, json.dumps({**job, **files})],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_SECONDS,
            check=True,
        )
        return dict(load_file(files["outputs"]))
