"""The three products on all backends, on tensors that are already checked. Every function fills what it is given.

Wide operands have unit column stride; b and a have any strides. All are of one dtype, but the result of `tsreduce`, and
that factors may be float32 for Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._backend import provider
from lora_kernels.ops._dropout import Mask

# Elements per chunk where a mask, or a wider copy, comes on the way: a chunk of float32 fits a CPU's cache.
_CPU_CHUNK, _GPU_CHUNK = 2**18, 2**24
# What the names of the C++ functions end in, by dtype of the wide operand; the others are float32.
CPP_NAMES = {torch.float32: "", torch.bfloat16: "_bfloat16"}


def _kept(wide: torch.Tensor, mask: Mask | None) -> Iterator[tuple[slice, Any]]:
    # Chunks of rows, and which of their elements dropout keeps; `None`: all.
    tokens, size = wide.shape
    step = max((_CPU_CHUNK if wide.device.type == "cpu" else _GPU_CHUNK) // max(size, 1), 1)
    mask = None if mask is None else mask.on(wide.device)
    for low in range(0, tokens, step):
        part = slice(low, min(low + step, tokens))
        yield part, None if mask is None else mask.keep(part, size, wide.device)


def _shrink_torch(out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None) -> None:
    # The scale goes along with the product, which rounds once.
    if mask is None:
        out.addmm_(x, a.mT, beta=0, alpha=scale)
        return
    for part, keep in _kept(x, mask):
        out[part].addmm_(torch.where(keep, x[part], 0), a.mT, beta=0, alpha=scale * mask.factor)


def _tsreduce_torch(out: torch.Tensor, t: torch.Tensor, z: torch.Tensor, mask: Mask | None) -> None:
    if mask is None and z.dtype == out.dtype:
        torch.mm(t.mT, z, out=out)
        return
    out.zero_()
    for part, keep in _kept(z, mask):
        rows = z[part] if keep is None else torch.where(keep, z[part], 0)
        out.addmm_(t[part].to(out.dtype).mT, rows.to(out.dtype), alpha=1.0 if mask is None else mask.factor)


def _expand_torch(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    base: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask | None,
) -> None:
    start = bias if base is None else base
    if mask is None:
        if start is None:
            torch.mm(t, b, out=out)
        else:
            torch.addmm(start, t, b, out=out)
        return
    wide = torch.promote_types(out.dtype, torch.float32)
    right = b.to(wide)
    for part, keep in _kept(out, mask):
        delta = torch.where(keep, torch.mm(t[part].to(wide), right).mul_(mask.factor), 0)
        if start is not None:
            delta += start if base is None else base[part]
        out[part].copy_(delta)


def _cpp_mask(mask: Mask | None) -> tuple[int, int, int, int]:
    drop = (0, 0, 0) if mask is None else (mask.threshold, mask.key(), mask.stream)
    return *drop, torch.get_num_threads()


@functools.cache
def _cpp(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(_ext.extension(), f"{name}{CPP_NAMES[dtype]}")
    return function


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which takes its time even where there is nothing to do: a layer asks for many."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _single(matrix: torch.Tensor) -> torch.Tensor:
    matrix = cast(matrix, torch.float32)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _shrink_cpp(out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None) -> None:
    a, t = _single(a), out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _cpp("lora_shrink", x.dtype)(
        x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), t.data_ptr(), t.stride(0),
        *x.shape, a.shape[0], scale, *_cpp_mask(mask),
    )  # fmt: skip
    if t is not out:
        out.copy_(t)


def _tsreduce_cpp(out: torch.Tensor, t: torch.Tensor, z: torch.Tensor, mask: Mask | None) -> None:
    t = _single(t)
    _cpp("lora_tsreduce", z.dtype)(
        t.data_ptr(), t.stride(0), z.data_ptr(), z.stride(0), out.data_ptr(), out.stride(0),
        *z.shape, t.shape[1], *_cpp_mask(mask),
    )  # fmt: skip


def _expand_cpp(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    base: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Mask | None,
) -> None:
    t, b, bias = _single(t), _single(b), None if bias is None else cast(bias, torch.float32)
    if base is not None and base is not out:
        out.copy_(base)
    _cpp("lora_expand", out.dtype)(
        t.data_ptr(), t.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), out.stride(0),
        *out.shape, t.shape[1], base is not None, 0 if bias is None else bias.data_ptr(), *_cpp_mask(mask),
    )  # fmt: skip


@functools.cache
def _of(product: str, backend: str) -> Callable[..., Any]:
    return provider(f"skinny.kernel:{product}" if backend == "triton" else f"skinny._launch:_{product}_{backend}")


def shrink(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None, backend: str
) -> torch.Tensor:
    """`out = scale * drop(x) a^T`: `(tokens, n)` and `(r, n)` give `(tokens, r)`, contiguous."""
    if out.numel() == 0 or x.shape[1] == 0:
        return out.zero_()
    _of("shrink", backend)(out, x, a, scale, mask)
    return out


def tsreduce(
    t: torch.Tensor, z: torch.Tensor, mask: Mask | None, backend: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`t^T drop(z)`: `(tokens, r)` and `(tokens, d)` give `(r, d)`, new by default: float32 (float64 for float64).

    Another dtype, or a transposed view, only Triton writes.
    """
    if out is None:
        out = z.new_empty(t.shape[1], z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    if out.numel() == 0 or z.shape[0] == 0:
        return out.zero_()
    _of("tsreduce", backend)(out, t, z, mask)
    return out


def factor_gradients(
    a: torch.Tensor,
    b: torch.Tensor,
    u: torch.Tensor | None,
    x: torch.Tensor | None,
    mask: Mask | None,
    t: torch.Tensor | None,
    g: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Mask | None]:
    """`u^T drop(x)` like A `(r, n)` and `g^T t` like B `(m, r)`, contiguous; `None` without x or without t.

    And the mask, with its bits if a kernel has written them.
    """
    if backend != "triton":
        da = None if x is None or u is None else cast(tsreduce(u, x, mask, backend), a.dtype)
        db = None if t is None else cast(tsreduce(t, g, None, backend), b.dtype).mT.contiguous()
        return da, db, mask
    da = None if x is None else torch.empty_like(a, memory_format=torch.contiguous_format)
    db = None if t is None else torch.empty_like(b, memory_format=torch.contiguous_format)
    if da is not None and db is not None and 0 not in (g.shape[0], da.numel(), db.numel()):
        mask = _of("tsreduce_pair", backend)((da, db), u, x, mask, t, g)
    else:
        if u is not None and x is not None:
            tsreduce(u, x, mask, backend, da)
        if t is not None and db is not None:
            tsreduce(t, g, None, backend, db.mT)
    return da, db, mask


def expand(
    out: torch.Tensor,
    t: torch.Tensor,
    b: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: Mask | None = None,
    backend: str,
) -> torch.Tensor:
    """`out = (base or bias) + drop(t b)`: `(tokens, r)` and `(r, d)` give `(tokens, d)`; the base may be `out`."""
    if out.numel() == 0:
        return out
    if t.shape[1] == 0:
        start = bias if base is None else base
        return out.zero_() if start is None else out if start is out else out.copy_(start.expand_as(out))
    _of("expand", backend)(out, t, b, base, bias, mask)
    return out
