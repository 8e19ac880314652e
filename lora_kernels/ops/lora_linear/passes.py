"""The arithmetic of one LoRA layer, forward and backward.

    y  = (base or bias) + x W^T + s drop(x) A^T B^T + e x A0^T B0^T
    t  = [s drop(x) A^T, e x A0^T]                      (tokens, r + q)
    u  = s g B                                          (tokens, r)
    dA = u^T drop(x),  dB = g^T t,  dW = g^T x,  dbias = sum of g
    dx = g W + mask(u A) + e (g B0) A0

The frozen pair (A0, B0) is more rank of the same products: where it is what the adapter started from, the two cancel
in the float32 sums. On the CPU the library makes the product with W, and one call of C++ all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from lora_kernels.ops import _ext
from lora_kernels.ops._dropout import Mask, mask_of
from lora_kernels.ops._tiles import build_platform
from lora_kernels.ops.lora_linear import forms
from lora_kernels.ops.skinny import _launch
from lora_kernels.ops.skinny._launch import cast

_Optional = torch.Tensor | None
# Of a sum without a large product, and of all where nothing was measured.
_ONLY = forms.Choice(forms.DEFAULT)
_WORD, _FLOAT = 2**64 - 1, torch.float32


class Scalars(NamedTuple):
    """What a layer is besides its tensors."""

    scaling: float  # s
    frozen_scaling: float  # e, of the frozen pair
    threshold: int  # of dropout; 0 for none
    stream: int  # of dropout
    backend: str  # of the skinny products: `triton`, `cpp` or `torch`


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """`(..., n)` as `(tokens, n)` with contiguous rows."""
    if tensor.dim() == 2 and (tensor.is_contiguous() or tensor.stride(1) == 1):
        return tensor
    flat = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])  # not -1: there may be no features
    return flat if flat.is_contiguous() or flat.stride(1) == 1 else flat.contiguous()


def forward(
    x: torch.Tensor,
    weight: _Optional,
    start: _Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: _Optional,
    b0: _Optional,
    seed: _Optional,
    scalars: Scalars,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y `(tokens, m)`, contiguous, and t `(tokens, r + q)`.

    x is `(tokens, n)` with contiguous rows, W `(m, n)`, A `(r, n)`, B `(m, r)`, A0 `(q, n)` and B0 `(m, q)`, of
    any dtype; `start` is the bias `(m,)`, or a base result `(tokens, m)` of x's dtype with contiguous rows.
    """
    scaling, frozen_scaling, threshold, stream, backend = scalars
    dtype, tokens = x.dtype, x.shape[0]
    if backend == "cpp" and forms.override is None and forms.untuned():
        (rank, inputs), (outputs, columns), flags = a.shape, b.shape, 0
        if columns != rank or x.shape[1] != inputs or not (a.is_cpu and b.is_cpu):
            _refuse(x, a, b)
        if a0 is not None or not (dtype is a.dtype is b.dtype is _FLOAT and a.is_contiguous() and b.is_contiguous()):
            a, b, a0, b0, flags = _readable(dtype, a, b, a0, b0)
        ranks = rank if a0 is None else rank + a0.shape[0]
        if weight is None:
            y = torch.clone(start, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
        else:
            weight = weight if weight.dtype is dtype else weight.to(dtype)
            y = linear(x, weight, start if start is None or start.dtype is dtype else start.to(dtype))
        if y.shape[1] != outputs:
            _refuse(y, a, b)
        # Sizes one by one, and a dtype only where it differs, are what torch reads fastest.
        t = x.new_empty(tokens, ranks) if flags == 0 else x.new_empty(tokens, ranks, dtype=_FLOAT)
        _calls()[0](
            flags, tokens, inputs, outputs, rank, ranks - rank, a.data_ptr(), b.data_ptr(),
            0 if a0 is None else a0.data_ptr(), 0 if b0 is None else b0.data_ptr(), scaling, frozen_scaling, threshold,
            0 if seed is None else int(seed) & _WORD, stream, torch.get_num_threads(),
            x.data_ptr(), inputs if x.is_contiguous() else x.stride(0), t.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y, t
    mask = mask_of(threshold, seed, stream)
    if a0 is not None or not _casts_itself(backend, a, b):
        a, b = cast(a, dtype), cast(b, dtype)
    if a0 is None or b0 is None:
        t = _project(x, a, scaling, mask, backend)
    elif mask is None and scaling != 0:
        t = _project(x, torch.cat((a, cast(a0, dtype))), scaling, None, backend)
        b = torch.cat((b, _scaled(b0, frozen_scaling / scaling, dtype)), 1)
    else:
        tail = _project(x, cast(a0, dtype), frozen_scaling, None, backend)
        t = torch.cat((_project(x, a, scaling, mask, backend), tail), 1)
        b = torch.cat((b, cast(b0, dtype)), 1)
    y = x.new_empty(tokens, b.shape[0])
    bias = base = None
    if start is not None:
        bias, base = (cast(start, dtype).contiguous(), None) if start.dim() == 1 else (None, start)
    right = None if weight is None else cast(weight, dtype).mT
    _combine("forward", y, x, right, [forms.Term(t, b.mT)], backend, bias=bias, base=base)
    return y, t


def backward(
    g: torch.Tensor,
    x: _Optional,
    t: _Optional,
    weight: _Optional,
    a: torch.Tensor,
    b: torch.Tensor,
    a0: _Optional,
    b0: _Optional,
    seed: _Optional,
    scalars: Scalars,
    need_x: bool,
) -> tuple[_Optional, _Optional, _Optional]:
    """Dx `(tokens, n)` of g's dtype, dA `(r, n)` and dB `(m, r)` of their factors' dtypes.

    g is `(tokens, m)` with contiguous rows, t as `forward` returned it. x is `None` where dA is not needed, t where dB
    is not, W where dx has no such part.
    """
    scaling, frozen_scaling, threshold, stream, backend = scalars
    dtype, tokens = g.dtype, g.shape[0]
    dx = da = db = None
    kinds = a.dtype, b.dtype
    if backend == "cpp" and forms.override is None and forms.untuned():
        (rank, inputs), (outputs, columns), flags = a.shape, b.shape, 0
        if columns != rank or g.shape[1] != outputs or not (a.is_cpu and b.is_cpu):
            _refuse(g, a, b)
        if x is not None and x.shape[1] != inputs:
            _refuse(x, a, b)
        if a0 is not None or not (dtype is a.dtype is b.dtype is _FLOAT and a.is_contiguous() and b.is_contiguous()):
            a, b, a0, b0, flags = _readable(dtype, a, b, a0, b0)
        x_at = x_stride = t_at = dx_at = da_at = db_at = 0
        if need_x:
            if weight is None:
                dx = g.new_empty(tokens, inputs)
            else:
                dx = torch.mm(g, weight if weight.dtype is dtype else weight.to(dtype))
            dx_at = dx.data_ptr()
        if x is not None:
            da = torch.empty_like(a) if flags & 2 == 0 else torch.empty_like(a, dtype=_FLOAT)
            x_at, x_stride, da_at = x.data_ptr(), inputs if x.is_contiguous() else x.stride(0), da.data_ptr()
        frozen_rank = 0 if a0 is None else a0.shape[0]
        if dx is not None and dx.shape[1] != inputs or t is not None and t.shape[1] != rank + frozen_rank:
            _refuse(g, a, b)
        if t is not None:
            db = torch.empty_like(b) if flags & 2 == 0 else torch.empty_like(b, dtype=_FLOAT)
            t_at, db_at = t.data_ptr(), db.data_ptr()
        _calls()[1](
            flags, tokens, inputs, outputs, rank, frozen_rank, a.data_ptr(), b.data_ptr(),
            0 if a0 is None else a0.data_ptr(), 0 if b0 is None else b0.data_ptr(), scaling, frozen_scaling, threshold,
            0 if seed is None else int(seed) & _WORD, stream, torch.get_num_threads(),
            g.data_ptr(), outputs if g.is_contiguous() else g.stride(0), x_at, x_stride, t_at, dx_at,
            weight is not None, da_at, db_at,
        )  # fmt: skip
        return dx, None if da is None else cast(da, kinds[0]), None if db is None else cast(db, kinds[1])
    mask, rank, factors, u = mask_of(threshold, seed, stream), a.shape[0], (a, b), None
    stacked = need_x and b0 is not None and scaling != 0
    if need_x or x is not None:
        if a0 is not None or not _casts_itself(backend, a, b):
            a, b = cast(a, dtype), cast(b, dtype)
        if stacked and b0 is not None:
            both = torch.cat((b, _scaled(b0, frozen_scaling / scaling, dtype)), 1)
            u = _project(g, both.mT, scaling, None, backend)
        else:
            u = _project(g, b.mT, scaling, None, backend)
    # The columns of the frozen pair need no gradient. First, as what draws the mask here writes it for dx.
    own_u, own_t = (part if part is None or a0 is None else part[:, :rank] for part in (u, t))
    da, db, mask = _launch.factor_gradients(*factors, own_u, x, mask, own_t, g, backend)
    if need_x and u is not None and own_u is not None:
        terms = [forms.Term(own_u, a, mask)]
        if a0 is not None and b0 is not None:
            frozen = cast(a0, dtype)
            if stacked and mask is None:
                terms = [forms.Term(u, torch.cat((a, frozen)))]
            elif stacked:
                terms.append(forms.Term(u[:, rank:], frozen))
            else:
                tail = _project(g, cast(b0, dtype).mT, frozen_scaling, None, backend)
                terms.append(forms.Term(tail, frozen))
        dx = g.new_empty(tokens, a.shape[1])
        _combine("backward", dx, g, None if weight is None else cast(weight, dtype), terms, backend)
    return dx, da, db


def _casts_itself(backend: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the kernels round factors where they load them, which saves two launches per pass; AMD's would spill."""
    return backend == "triton" and a.dtype == b.dtype == _FLOAT and build_platform() == "cuda"


def _combine(
    product: str,
    out: torch.Tensor,
    left: torch.Tensor,
    right: _Optional,
    terms: Sequence[forms.Term],
    backend: str,
    *,
    bias: _Optional = None,
    base: _Optional = None,
) -> None:
    """`out = (base or bias) + left right + the terms`, in the form that is chosen for it."""
    choice = _ONLY
    if right is not None and (forms.override is not None or not forms.untuned()):
        n, m = right.shape if product == "forward" else reversed(right.shape)
        rank, masked = sum(term.t.shape[1] for term in terms), any(term.mask is not None for term in terms)
        choice = forms.choose(product, out.device, out.dtype, (left.shape[0], n, m), rank, masked, backend)
    forms.combine(out, left, right, terms, bias=bias, base=base, backend=backend, choice=choice)


def _refuse(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Refuse sizes that do not go together, as after `parameter.data = ...`: C++ would leave its memory."""
    raise ValueError(
        f"factors have shapes {tuple(a.shape)} and {tuple(b.shape)} on {a.device} and {b.device}, but must be (r, n) "
        f"and (m, r) on the CPU, as when the layer was prepared, for rows of {rows.shape[1]}"
    )


@functools.cache
def _calls() -> tuple[Callable[..., None], Callable[..., None]]:
    extension = _ext.extension()
    return extension.lora_forward, extension.lora_backward


def _readable(
    dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor, a0: _Optional, b0: _Optional
) -> tuple[torch.Tensor, torch.Tensor, _Optional, _Optional, int]:
    """Factors as C++ reads them, dense and both of a pair float32 or bfloat16, and the flags that say which."""
    flags = 1 if dtype is torch.bfloat16 else 0
    pairs: list[tuple[_Optional, _Optional]] = [(a, b), (a0, b0)]
    for i, (one, other) in enumerate(pairs):
        if one is not None and other is not None:
            narrow = one.dtype is other.dtype is torch.bfloat16
            kind = torch.bfloat16 if narrow else _FLOAT
            pairs[i] = cast(one, kind).contiguous(), cast(other, kind).contiguous()
            flags |= (2 << i) if narrow else 0
    if a0 is not None and b0 is not None and (a0.shape[1] != a.shape[1] or b0.shape != (b.shape[0], a0.shape[0])):
        _refuse(a0, a, b)
    (first, second), (third, fourth) = pairs
    return first, second, third, fourth, flags  # type: ignore[return-value]


def _project(rows: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None, backend: str) -> torch.Tensor:
    return _launch.shrink(rows.new_empty(rows.shape[0], a.shape[0]), rows, a, scale, mask, backend)


def _scaled(factor: torch.Tensor, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """A factor times a ratio, rounded once; the ratio is exactly -1 where a frozen pair takes off a start."""
    if ratio == 1:
        return cast(factor, dtype)
    wide = torch.promote_types(factor.dtype, torch.promote_types(dtype, torch.float32))
    return (factor.to(wide) * ratio).to(dtype)
