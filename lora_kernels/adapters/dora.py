"""DoRA's magnitudes (arXiv 2402.09353): the norms of the rows of `W + s B A`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_kernels.adapters.base_weight import row_blocks
from lora_kernels.adapters.view import LoraView
from lora_kernels.adapters.writing import copy_whole
from lora_kernels.ops import _backend, _ext

# Entries that are computed at a time: on a CPU by every thread, few enough for its second-level cache.
NORM_BLOCK, _GPU_BLOCK = 2**18, 2**24


def block_entries(device: torch.device, of_a_thread: int) -> int:
    """Entries that are computed at a time."""
    return of_a_thread * torch.get_num_threads() if device.type == "cpu" else _GPU_BLOCK


def block_height(device: torch.device, columns: int, of_a_thread: int) -> int:
    """Rows that are computed at a time."""
    return max(1, block_entries(device, of_a_thread) // max(1, columns))


def row_norms(
    weight: torch.Tensor | Iterable[torch.Tensor], a: torch.Tensor, b: torch.Tensor, scaling: Any
) -> torch.Tensor:
    """`|W + s B A|` by row, `(m,)` float32 (float64 where one of the three is), without a graph."""
    # From the sums themselves, a few rows at a time: `|w|^2 + 2 s <w A^T, b> + s^2 <b A A^T, b>` costs as much, and is
    # wrong where the two nearly cancel. W is `(m, n)`, or its rows, in order, in blocks of any height.
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        if isinstance(weight, torch.Tensor):
            wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
            if torch.compiler.is_compiling():
                total: torch.Tensor = weight.to(wide) + (b.to(wide) * scaling) @ a.to(wide)
                return torch.linalg.vector_norm(total, dim=1)  # type: ignore[no-any-return]
            weight = weight.split(block_height(a.device, a.shape[1], NORM_BLOCK))  # type: ignore[no-untyped-call]
        else:
            wide = torch.promote_types(a.dtype, torch.float32)
        left, right = (b.to(wide) * scaling).contiguous(), a.to(wide).contiguous()
        norms = left.new_empty(b.shape[0])
        buffer, low = left.new_empty(0, a.shape[1]), 0
        for rows in weight:
            high = low + rows.shape[0]
            if len(buffer) < len(rows):
                buffer = left.new_empty(rows.shape)
            total, part = buffer[: len(rows)], left[low:high]
            if (extension := extension_for(rows, part, right)) is not None and wide == torch.float32:
                extension.dora_sum(
                    rows.dtype == torch.bfloat16, rows.data_ptr(), rows.stride(0), right.data_ptr(), part.data_ptr(),
                    total.data_ptr(), *rows.shape, len(right), torch.get_num_threads(),
                )  # fmt: skip
            else:
                total.copy_(rows).addmm_(part, right)
            torch.linalg.vector_norm(total, dim=1, out=norms[low:high])
            low = high
    return norms  # type: ignore[no-any-return]


def extension_for(*tensors: torch.Tensor) -> Any:
    """The compiled extension where it can read tensors `(..., n)`, float32 or bfloat16, with dense rows; or `None`."""
    if torch.compiler.is_compiling() or _backend.requested() not in ("auto", "cpp"):
        return None
    for tensor in tensors:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.stride(-1) != 1:
            return None
    return None if torch._C._are_functorch_transforms_active() else _ext.load()[0]


def magnitudes(module: Any, adapter: str) -> Any:
    """The module that holds DoRA's magnitudes `(m,)` of an adapter of a linear layer, or `None`."""
    modules = getattr(module, "lora_magnitude_vector", {})
    return modules[adapter] if adapter in modules else None  # noqa: SIM401  (a ModuleDict has no get)


def reset_magnitudes(module: Any, adapter: str) -> None:
    """Set the magnitudes of a layer, if it is DoRA, so that it computes W + s B A as it is now."""
    if (holder := magnitudes(module, adapter)) is None:
        return
    view = LoraView("", module)
    a, b = view.factors(adapter)
    blocks = (rows.to(a.device) for rows in row_blocks(module)())
    copy_whole(holder.weight, row_norms(blocks, a.to(torch.float32), b.to(torch.float32), view.scaling(adapter)))
    getattr(holder, "_dora_cache", {}).clear()


def caching_enabled() -> bool:
    """Whether the caller is inside of `peft.helpers.DoraCaching`."""
    return bool(getattr(sys.modules.get("peft.tuners.lora.dora"), "ENABLE_DORA_CACHING", False))
