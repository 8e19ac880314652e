"""Sizes in bytes: a user's budget, what is free, and how sizes are shown."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lora_kernels._checks import check_range

# Of the free memory, what `auto` takes.
AUTO_SHARE = 0.5
_UNITS = {
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}

Budget = int | float | str | None


def show_bytes(size: float) -> str:
    """A size in words."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device, or what Linux calls available on the host; a ValueError if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        raise ValueError("the free memory of this system is not known: give the budget in bytes") from None


def parse_budget(budget: Budget, device: torch.device | None = None) -> int | None:
    """A memory budget in bytes.

    Args:
        budget: bytes (int), a share of the free memory in (0, 1) (float), text such as `"40GB"` or `"512MiB"`,
            `"auto"` for half of the free memory, or `None` for no limit.
        device: whose free memory is meant; the host's by default.

    Raises:
        ValueError: if it is anything else.
        TypeError: if it is of another type.
    """
    if budget is None:
        return None
    where = device or torch.device("cpu")
    if isinstance(budget, str):
        if budget == "auto":
            return int(AUTO_SHARE * free_memory(where))
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?i?B)?\s*", budget, re.IGNORECASE)
        if match is None:
            raise ValueError(f'budget is {budget!r}, but must be bytes, a share, "auto" or a size such as "40GB"')
        number, unit = match.groups()
        return int(float(number) * _UNITS[(unit or "B").upper()])
    if isinstance(budget, float):
        if not 0 < budget < 1:
            raise ValueError(f"budget is {budget!r}: a float is a share of the free memory, between 0 and 1")
        return int(budget * free_memory(where))
    check_range("budget", budget, low=1, integer=True)
    return budget
