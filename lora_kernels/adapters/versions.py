"""Which versions of PEFT are supported."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys

# The first whose layers store per adapter whether it is rank-stabilized, which a change of rank needs.
MINIMUM = (0, 18)


@functools.cache
def require_peft() -> None:
    """Raise an ImportError if PEFT is missing or too old, before it is used."""
    needed = ".".join(map(str, MINIMUM))
    module = sys.modules.get("peft")
    try:
        installed = getattr(module, "__version__", None) or importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"peft is not installed, but lora_kernels needs peft>={needed} for this: pip install 'lora_kernels[peft]'"
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and tuple(map(int, numbers.groups())) < MINIMUM:
        raise ImportError(
            f"peft {installed} is installed, but lora_kernels needs peft>={needed}: pip install --upgrade peft"
        )
