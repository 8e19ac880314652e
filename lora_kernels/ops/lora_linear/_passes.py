"""Forward and backward of the LoRA layer, made of skinny products and the library's matrix product.

    t  = s drop(x) A^T                       u  = s g B
    y  = bias + t B^T, then += x W^T         dx = mask * (u A), then += g W
                                             dA = u^T drop(x),  dB = g^T t,  dW = g^T x,  db = sum g

The skinny part is written first and the library accumulates onto it: y is rounded once and no second matrix of its size
exists. Every sum is float32 and rounded once, to the dtype of what it is a gradient of.

A frozen pair `e (x A0^T) B0^T` is more rank: without dropout it lies beside A and B in the same two products, else only
where no mask is made (`u` and `y`). Its scale goes into A0 (forward) or B0 (backward) as `e / s`, exactly 1 or -1 where
it takes off what the adapter starts from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops.skinny import _launch


@dataclass(frozen=True)
class Factors:
    """The adapter, and what is frozen beside it.

    Attributes:
        a: `(r, n)`.
        b: `(m, r)`.
        scaling: s.
        a0: `(q, n)`, or `None`.
        b0: `(m, q)`, or `None`.
        extra_scaling: e.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    a0: torch.Tensor | None = None
    b0: torch.Tensor | None = None
    extra_scaling: float = 0.0


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _stacked(
    first: torch.Tensor, second: torch.Tensor, factors: Factors, dtype: torch.dtype, dim: int
) -> tuple[torch.Tensor, float]:
    """Two factors along the rank, and the scale that their product then takes."""
    scale, ratio = factors.scaling, factors.extra_scaling
    if scale == 0:  # no ratio: both scales go into the factors
        first, scale = torch.zeros_like(first), 1.0
    else:
        ratio /= scale
    if ratio != 1:
        second = second.to(torch.promote_types(second.dtype, torch.float32)) * ratio
    return torch.cat((first.to(dtype), second.to(dtype)), dim), scale


def _project(rows: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None, backend: str) -> torch.Tensor:
    return _launch.shrink(rows.new_empty(rows.shape[0], a.shape[0]), rows, a, scale, mask, backend)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    start: torch.Tensor | None,
    factors: Factors,
    mask: Mask | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output.

    Args:
        x: `(..., n)`, in the dtype of the arithmetic.
        weight: `(m, n)` of any dtype, or `None`.
        start: what is added: the bias `(m,)`, or, without a weight, a base result `(..., m)`; or `None`.
        factors: of any dtype.
        mask: dropout of the adapter's input.
        backend: `triton`, `cpp` or `torch`.

    Returns:
        `(..., m)`, and t `(tokens, r)`, both of x's dtype.
    """
    with _launch.device_of(x):
        rows, dtype, rank = _rows(x), x.dtype, factors.a.shape[0]
        b = factors.b.to(dtype)
        if factors.a0 is None or factors.b0 is None:
            every = t = _project(rows, factors.a.to(dtype), factors.scaling, mask, backend)
        else:
            if mask is None:
                a, scale = _stacked(factors.a, factors.a0, factors, dtype, 0)
                every = _project(rows, a, scale, None, backend)
                t = every[:, :rank].contiguous()
            else:
                t = _project(rows, factors.a.to(dtype), factors.scaling, mask, backend)
                frozen = _project(rows, factors.a0.to(dtype), factors.extra_scaling, None, backend)
                every = torch.cat((t, frozen), 1)
            b = torch.cat((b, factors.b0.to(dtype)), 1)
        y = x.new_empty(*x.shape[:-1], b.shape[0])
        out = y.view(rows.shape[0], b.shape[0])
        row = start.to(dtype).contiguous() if start is not None and start.dim() == 1 else None
        base = _rows(start) if start is not None and row is None else None
        _launch.expand(out, every, b.mT, base=base, bias=row, backend=backend)
        if weight is not None:
            out.addmm_(rows, weight.to(dtype).mT)
    return y, t


def backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    t: torch.Tensor | None,
    factors: Factors,
    mask: Mask | None,
    needs: tuple[bool, bool, bool, bool, bool],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients that are needed; the others are empty.

    Args:
        g: `(..., m)`, of y.
        x: `(..., n)`; needed for dW and dA.
        weight: `(m, n)`, or `None` if dx has no such part.
        t: `(tokens, r)`; needed for dB.
        factors: as in the forward.
        mask: as in the forward.
        needs: whether dx, dW, db, dA, dB are.
        backend: `triton`, `cpp` or `torch`.

    Returns:
        dx `(..., n)`, dW and db in g's dtype, dA `(r, n)` and dB `(m, r)` in the dtypes of A and B.
    """
    need_x, need_weight, need_bias, need_a, need_b = needs
    dx = dw = dbias = da = db = g.new_empty(0)
    with _launch.device_of(g):
        rows, dtype, rank = _rows(g), g.dtype, factors.a.shape[0]
        sources = None if x is None else _rows(x)
        if need_x or need_a:
            b, scale = factors.b.to(dtype), factors.scaling
            extra = need_x and factors.a0 is not None and factors.b0 is not None
            if extra and factors.b0 is not None:
                b, scale = _stacked(factors.b, factors.b0, factors, dtype, 1)
            every = _project(rows, b.mT, scale, None, backend)
            u = every[:, :rank] if extra else every
        if need_x:
            dx = g.new_empty(*g.shape[:-1], factors.a.shape[1])
            out = dx.view(rows.shape[0], factors.a.shape[1])
            a = factors.a.to(dtype)
            if extra and factors.a0 is not None and mask is None:
                _launch.expand(out, every, torch.cat((a, factors.a0.to(dtype))), backend=backend)
            else:
                _launch.expand(out, u, a, mask=mask, backend=backend)
                if extra and factors.a0 is not None:
                    _launch.expand(out, every[:, rank:], factors.a0.to(dtype), base=out, backend=backend)
            if weight is not None:
                out.addmm_(rows, weight.to(dtype))
        if need_a and sources is not None:
            da = _launch.tsreduce(u, sources, mask, backend).to(factors.a.dtype)
        if need_b and t is not None:
            db = _launch.tsreduce(t, rows, None, backend).mT.to(factors.b.dtype).contiguous()
        if need_weight and sources is not None:
            dw = torch.mm(rows.mT, sources)
        if need_bias:
            dbias = rows.sum(0)
    return dx, dw, dbias, da, db
