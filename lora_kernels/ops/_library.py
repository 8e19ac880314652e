"""The library's product of 16-bit matrices, added to a float32 matrix in place."""

from __future__ import annotations

import functools

import torch


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`out += left right`, `(m, k)` and `(k, n)` of a 16-bit dtype into `(m, n)` float32, where `adds` says so."""
    torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)


@functools.lru_cache(maxsize=64)
def adds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add_product` works: torch from 2.8 on NVIDIA. Tried once per device and dtype, the sum checked."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in (torch.float16, torch.bfloat16):
        return False
    out, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        add_product(out, ones, ones)
    except (AttributeError, RuntimeError):  # NotImplementedError is one, too
        return False
    return bool(out.eq(17).all())
