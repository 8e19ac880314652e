"""Forward and backward of LoRA layers that read the same input, made of skinny products and the library's products.

For one layer:

    t  = s drop(x) A^T                       u  = s g B
    y  = bias + t B^T, then += x W^T         dx = mask * (u A), then += g W
                                             dA = u^T drop(x),  dB = g^T t,  dW = g^T x,  db = sum g

How a large product and the low-rank part come together is chosen in `forms`. By default the low-rank part is written
first and the library accumulates onto it: y is rounded once and no second matrix of its size exists. Every sum is
float32, and rounded once, to the dtype of what it is a gradient of.

A frozen pair `e (x A0^T) B0^T` is more rank, without a mask.

Several layers that read the same x lie side by side along the rank, wherever no mask stands between them: x is read
once for all t, once for all dA, and dx is written once and accumulated in place instead of being made by every layer
and added up. A mask is a layer's own, so what it touches is the layer's own, too; dx is still accumulated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lora_kernels.ops._dropout import Mask
from lora_kernels.ops.lora_linear import forms
from lora_kernels.ops.lora_linear.forms import Term
from lora_kernels.ops.skinny import _launch
from lora_kernels.ops.skinny._launch import cast

# Of a sum without a large product.
_ONLY = forms.Choice(forms.DEFAULT)


class Factors(NamedTuple):
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

    def tail(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The frozen pair, if there is one."""
        return None if self.a0 is None or self.b0 is None else (self.a0, self.b0)


class Member(NamedTuple):
    """One of the layers.

    Attributes:
        factors: of any dtype.
        weight: `(m, n)` of any dtype, or `None` if the base product is made elsewhere.
        start: what is added: the bias `(m,)`, or, without a weight, a base result `(..., m)`; or `None`.
        mask: dropout of the adapter's input.
    """

    factors: Factors
    weight: torch.Tensor | None
    start: torch.Tensor | None = None
    mask: Mask | None = None


class Needs(NamedTuple):
    """Which gradients of a layer are needed.

    Attributes:
        weight: dW.
        bias: db.
        a: dA.
        b: dB.
    """

    weight: bool
    bias: bool
    a: bool
    b: bool


class Gradients(NamedTuple):
    """The gradients of a layer's own tensors, those that are needed.

    Attributes:
        weight: dW `(m, n)` in the dtype of g.
        bias: db `(m,)` likewise.
        a: dA `(r, n)` in the dtype of A.
        b: dB `(m, r)` in the dtype of B.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    flat = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])  # not -1: there may be no features
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _side_by_side(
    parts: Sequence[tuple[torch.Tensor, float]], dtype: torch.dtype, dim: int
) -> tuple[torch.Tensor, float]:
    """Factors with their scales along the rank, and the scale that their product then takes.

    Scales that differ go into the factors, as a ratio: exactly 1 or -1 where a frozen pair takes off what its adapter
    starts from.
    """
    scale = next((each for _, each in parts if each != 0), 1.0)
    wide = torch.promote_types(dtype, torch.float32)  # a ratio of float32 factors is float64 in a float64 layer
    scaled = [
        cast(factor, dtype)
        if each == scale
        else (factor.to(torch.promote_types(factor.dtype, wide)) * (each / scale)).to(dtype)
        for factor, each in parts
    ]
    return _joined(scaled, dim), scale


def _joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def _project(rows: torch.Tensor, a: torch.Tensor, scale: float, mask: Mask | None, backend: str) -> torch.Tensor:
    return _launch.shrink(rows.new_empty(rows.shape[0], a.shape[0]), rows, a, scale, mask, backend)


def _low_rank(rows: torch.Tensor, members: Sequence[Member], backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The `s drop(x) A^T` of all layers, side by side, and that of each with the frozen part's columns after it."""
    parts = []
    for member in members:
        tail = member.factors.tail()
        if member.mask is None:
            parts.append((member.factors.a, member.factors.scaling))
        if tail is not None:
            parts.append((tail[0], member.factors.extra_scaling))
    if parts:
        stacked, scale = _side_by_side(parts, rows.dtype, 0)
        columns = _project(rows, stacked, scale, None, backend)
    own, every, low = [], [], 0
    for member in members:
        factors, tail = member.factors, member.factors.tail()
        frozen = 0 if tail is None else tail[0].shape[0]
        if member.mask is None:
            rank = factors.a.shape[0]
            own.append(columns[:, low : low + rank])
            every.append(columns[:, low : low + rank + frozen])
            low += rank + frozen
        else:
            own.append(_project(rows, cast(factors.a, rows.dtype), factors.scaling, member.mask, backend))
            every.append(own[-1] if tail is None else torch.cat((own[-1], columns[:, low : low + frozen]), 1))
            low += frozen
    plain = all(member.mask is None and member.factors.tail() is None for member in members)
    return columns if plain else own[0].contiguous() if len(own) == 1 else torch.cat(own, 1), every


def _assemble(
    product: str,
    out: torch.Tensor,
    large: Sequence[tuple[torch.Tensor, torch.Tensor]],
    terms: Sequence[Term],
    backend: str,
    *,
    bias: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
) -> None:
    """`out = (base or bias) + the large products + the terms`, in the form that is chosen for it."""
    if not large:
        forms.combine(out, out, None, terms, bias=bias, base=base, backend=backend, choice=_ONLY)
        return
    (left, right), *rest = large
    n, m = right.shape if product == "forward" else reversed(right.shape)
    rank, masked = sum(each.t.shape[1] for each in terms), any(each.mask is not None for each in terms)
    sizes = (left.shape[0], n, m)
    choice = forms.choose(product, out.device, out.dtype, sizes, rank, masked, backend, alone=not rest)
    forms.combine(out, left, right, terms, bias=bias, base=base, backend=backend, choice=choice)
    for left, right in rest:
        out.addmm_(left, right)


def _forward_one(x: torch.Tensor, member: Member, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` of a layer by itself, without a frozen pair: the same calls, without the bookkeeping of several."""
    (a, b, scaling, *_), weight, start, mask = member
    rows, dtype, base, row = _rows(x), x.dtype, None, None
    t = _project(rows, cast(a, dtype), scaling, mask, backend)
    y = x.new_empty((*x.shape[:-1], b.shape[0]))
    if start is not None:
        row, base = (cast(start, dtype).contiguous(), None) if start.dim() == 1 else (None, _rows(start))
    large = () if weight is None else ((rows, cast(weight, dtype).mT),)
    _assemble("forward", _matrix(y), large, (Term(t, cast(b, dtype).mT),), backend, bias=row, base=base)
    return y, t


def _backward_one(
    g: torch.Tensor,
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    member: Member,
    need_x: bool,
    need: Needs,
    backend: str,
) -> tuple[torch.Tensor | None, Gradients]:
    """`backward` likewise."""
    (a, b, scaling, *_), weight, _, mask = member
    need_weight, need_bias, need_a, need_b = need
    rows, dtype = _rows(g), g.dtype
    dx = dw = da = db = None
    if need_x or need_a:
        u = _project(rows, cast(b, dtype).mT, scaling, None, backend)
    if need_x:
        dx = g.new_empty((*g.shape[:-1], a.shape[1]))
        large = () if weight is None else ((rows, cast(weight, dtype)),)
        _assemble("backward", _matrix(dx), large, (Term(u, cast(a, dtype), mask),), backend)
    if x is not None and (need_a or need_weight):
        sources = _rows(x)
        da = cast(_launch.tsreduce(u, sources, mask, backend), a.dtype) if need_a else None
        dw = torch.mm(rows.mT, sources) if need_weight else None
    if need_b and t is not None:
        db = cast(_launch.tsreduce(t, rows, None, backend).mT, b.dtype).contiguous()
    return dx, Gradients(dw, rows.sum(0) if need_bias else None, da, db)


def _matrix(made: torch.Tensor) -> torch.Tensor:
    return made if made.dim() == 2 else made.view(made.shape[:-1].numel(), made.shape[-1])


def forward(x: torch.Tensor, members: Sequence[Member], backend: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The layers' outputs.

    Args:
        x: `(..., n)`, in the dtype of the arithmetic.
        members: at least one layer.
        backend: `triton`, `cpp` or `torch`.

    Returns:
        `(..., m)` per layer, and the t of all `(tokens, sum of r)`, all of x's dtype and memory of their own.
    """
    with _launch.device_of(x):
        if len(members) == 1 and members[0].factors.a0 is None:
            y, t = _forward_one(x, members[0], backend)
            return [y], t
        rows, dtype = _rows(x), x.dtype
        t, every = _low_rank(rows, members, backend)
        outputs = []
        for member, low_rank in zip(members, every, strict=True):
            factors, start, tail = member.factors, member.start, member.factors.tail()
            b = cast(factors.b, dtype)
            b = b if tail is None else torch.cat((b, cast(tail[1], dtype)), 1)
            y = x.new_empty(*x.shape[:-1], b.shape[0])
            out = y.view(rows.shape[0], b.shape[0])
            row = cast(start, dtype).contiguous() if start is not None and start.dim() == 1 else None
            base = _rows(start) if start is not None and row is None else None
            large = [] if member.weight is None else [(rows, cast(member.weight, dtype).mT)]
            _assemble("forward", out, large, [Term(low_rank, b.mT)], backend, bias=row, base=base)
            outputs.append(y)
        return outputs, t


def backward(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    members: Sequence[Member],
    need_x: bool,
    needs: Sequence[Needs],
    backend: str,
) -> tuple[torch.Tensor | None, list[Gradients]]:
    """The gradients that are needed.

    Args:
        grads: of each layer's y, `(..., m)`.
        x: `(..., n)`; needed for dW and dA.
        t: `(tokens, sum of r)`, as `forward` returned it; needed for dB.
        members: the layers, as in the forward; without a weight dx has no such part. Their `start` is not looked at.
        need_x: whether dx is.
        needs: which others are, per layer.
        backend: `triton`, `cpp` or `torch`.

    Returns:
        dx `(..., n)` in the dtype of the gradients, or `None`, and the layers' own.
    """
    first = grads[0]
    with _launch.device_of(first):
        if len(members) == 1 and members[0].factors.a0 is None:
            dx, made = _backward_one(first, x, t, members[0], need_x, needs[0], backend)
            return dx, [made]
        rows = [_rows(each) for each in grads]
        sources = None if x is None else _rows(x)
        ranks = [
            _back(g, member, need_x, need.a, backend) for g, member, need in zip(rows, members, needs, strict=True)
        ]
        own, tails = [u for u, _ in ranks], [tail for _, tail in ranks]
        dx = _input_gradient(first, rows, own, tails, members, backend) if need_x else None
        das = _a_gradients(sources, own, members, needs, backend)
        found, low = [], 0
        for g, member, need, da in zip(rows, members, needs, das, strict=True):
            rank, db = member.factors.b.shape[1], None
            if need.b and t is not None:
                db = _launch.tsreduce(t[:, low : low + rank], g, None, backend)
                db = cast(db.mT, member.factors.b.dtype).contiguous()
            low += rank
            dw = torch.mm(g.mT, sources) if need.weight and sources is not None else None
            found.append(Gradients(dw, g.sum(0) if need.bias else None, da, db))
    return dx, found


def _back(
    g: torch.Tensor, member: Member, need_x: bool, need_a: bool, backend: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`s g B`, and the same of the frozen part if dx needs it."""
    if not (need_x or need_a):
        return None, None
    factors, tail = member.factors, member.factors.tail() if need_x else None
    if tail is None:
        return _project(g, cast(factors.b, g.dtype).mT, factors.scaling, None, backend), None
    b, scale = _side_by_side([(factors.b, factors.scaling), (tail[1], factors.extra_scaling)], g.dtype, 1)
    every, rank = _project(g, b.mT, scale, None, backend), factors.b.shape[1]
    return every[:, :rank], every[:, rank:]


def _input_gradient(
    like: torch.Tensor,
    rows: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor | None],
    tails: Sequence[torch.Tensor | None],
    members: Sequence[Member],
    backend: str,
) -> torch.Tensor:
    features, dtype = members[0].factors.a.shape[1], like.dtype
    dx = like.new_empty(*like.shape[:-1], features)
    out = dx.view(rows[0].shape[0], features)
    left, right, masked = [], [], []
    for u, tail, member in zip(own, tails, members, strict=True):
        if u is not None and member.mask is None:
            left.append(u)
            right.append(cast(member.factors.a, dtype))
        elif u is not None:
            masked.append(Term(u, cast(member.factors.a, dtype), member.mask))
        if tail is not None and member.factors.a0 is not None:
            left.append(tail)
            right.append(cast(member.factors.a0, dtype))
    terms = [Term(_joined(left, 1), _joined(right, 0))] if left else []
    large = [(g, cast(each.weight, dtype)) for g, each in zip(rows, members, strict=True) if each.weight is not None]
    _assemble("backward", out, large, [*terms, *masked], backend)
    return dx


def _a_gradients(
    sources: torch.Tensor | None,
    own: Sequence[torch.Tensor | None],
    members: Sequence[Member],
    needs: Sequence[Needs],
    backend: str,
) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = [None] * len(members)
    if sources is None:
        return found
    wanted = [(i, u) for i, (u, need) in enumerate(zip(own, needs, strict=True)) if need.a and u is not None]
    together = [(i, u) for i, u in wanted if members[i].mask is None]
    if together:
        whole, low = _launch.tsreduce(_joined([u for _, u in together], 1), sources, None, backend), 0
        for i, u in together:
            found[i] = whole[low : low + u.shape[1]]
            low += u.shape[1]
    for i, u in wanted:
        if members[i].mask is not None:
            found[i] = _launch.tsreduce(u, sources, members[i].mask, backend)
    return [each if each is None else cast(each, members[i].factors.a.dtype) for i, each in enumerate(found)]
