"""The compiled extension `lora_kernels._C`: looked up once, never required."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """`lora_kernels._C` and `None`, or `None` and the reason why it was not built."""
    # The extension brings the system's OpenMP, torch its own. Idle threads of ours would spin on the cores that torch's
    # next matrix product needs (5 ms a call on 2 cores): they must sleep. The runtime reads this when it is loaded.
    before = os.environ.get("GOMP_SPINCOUNT")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        return importlib.import_module("lora_kernels._C"), None
    except ImportError as error:
        return None, f"the compiled extension lora_kernels._C cannot be imported ({error})"
    finally:
        if before is None:
            del os.environ["GOMP_SPINCOUNT"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing() -> str | None:
    """Why the extension cannot be used, or `None`; a constant to `torch.compile`."""
    return load()[1]


def extension() -> ModuleType:
    """`lora_kernels._C`, or a `RuntimeError` that says why it was not built."""
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module
