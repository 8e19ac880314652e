"""LoRA layers that read the same input, as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_kernels.ops._checks import check_tensor
from lora_kernels.ops._dropout import Dropout, Mask, lowered, mask_of
from lora_kernels.ops.lora_linear import _passes
from lora_kernels.ops.lora_linear._passes import Factors, Member, Needs
from lora_kernels.ops.lora_linear.op import (
    autocast_dtype,
    check_factors,
    in_transform,
    linear_dispatcher,
    lora_delta,
    lora_linear,
)


@dataclass(frozen=True)
class LoraMember:
    """One of the layers that read the same input; see `lora_linear` on each.

    Attributes:
        weight: W `(m, n)`, or `None` where the base layer works out its own product.
        start: what is added: the bias `(m,)`, or, without a weight, the base layer's result `(..., m)`; or `None`.
        a: A `(r, n)`.
        b: B `(m, r)`.
        scaling: s.
        dropout: of the adapter's input, each layer's own.
        extra: a frozen pair `(A0, B0, e)`.
    """

    weight: torch.Tensor | None
    start: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout: Dropout | None = None
    extra: tuple[torch.Tensor, torch.Tensor, float] | None = None


# A member's tensors, in the order in which the function takes them.
_WEIGHT, _START, _A, _B, _A0, _B0, _SEED = range(7)
_TENSORS = 7


@dataclass(frozen=True)
class _Numbers:
    """What a member is besides its tensors."""

    scaling: float
    extra_scaling: float
    threshold: int
    stream: int

    def member(self, tensors: Sequence[Any]) -> Member:
        weight, start, a, b, a0, b0, seed = tensors
        mask: Mask | None = mask_of(self.threshold, seed, self.stream)
        return Member(Factors(a, b, self.scaling, a0, b0, self.extra_scaling), weight, start, mask)


def _split(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[low : low + _TENSORS] for low in range(0, len(tensors), _TENSORS)]


class _Group(torch.autograd.Function):
    """The group's forward and backward: no registered op, since a registered op's lists take no missing tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, numbers: tuple[_Numbers, ...], backend: str, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        given = _split(tensors)
        members = [each.member(own) for each, own in zip(numbers, given, strict=True)]
        outputs, t = _passes.forward(x, members, backend)
        needs = _split(ctx.needs_input_grad[3:])
        ctx.set_materialize_grads(False)  # a layer whose output nobody uses costs nothing
        kept: list[torch.Tensor | None] = []
        for own in given:
            weight, _, a, b, a0, b0, seed = own
            kept += (weight if ctx.needs_input_grad[0] else None, a, b, a0, b0, seed)
        keep_x = any(need[_A] or need[_WEIGHT] for need in needs)
        ctx.save_for_backward(x if keep_x else None, t if any(need[_B] for need in needs) else None, *kept)
        ctx.numbers, ctx.backend = numbers, backend
        ctx.row_starts = [own[_START] is not None and own[_START].dim() == 1 for own in given]
        ctx.dtypes = [tuple(None if each is None else each.dtype for each in own[: _START + 1]) for own in given]
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        x, t, *kept = ctx.saved_tensors
        given = [kept[low : low + _TENSORS - 1] for low in range(0, len(kept), _TENSORS - 1)]
        needs = _split(ctx.needs_input_grad[3:])
        members, wanted, found, columns, low = [], [], [], [], 0
        for i, ((weight, a, b, a0, b0, seed), g) in enumerate(zip(given, grads, strict=True)):
            high = low + a.shape[0]
            if g is not None:
                need = needs[i]
                found.append(i)
                members.append(ctx.numbers[i].member((weight, None, a, b, a0, b0, seed)))
                wanted.append(Needs(need[_WEIGHT], need[_START] and ctx.row_starts[i], need[_A], need[_B]))
                columns.append(slice(low, high))
            low = high
        results: list[list[torch.Tensor | None]] = [[None] * _TENSORS for _ in grads]
        dx = None
        if members:
            if t is not None and len(members) < len(grads):
                t = torch.cat([t[:, each] for each in columns], 1)
            used = [each for each in grads if each is not None]
            dx, own = _passes.backward(used, x, t, members, ctx.needs_input_grad[0], wanted, ctx.backend)
            for i, made, g in zip(found, own, used, strict=True):
                start = g if needs[i][_START] and not ctx.row_starts[i] else made.bias
                for place, grad in ((_WEIGHT, made.weight), (_START, start)):
                    results[i][place] = None if grad is None else grad.to(ctx.dtypes[i][place])
                results[i][_A], results[i][_B] = made.a, made.b
        return dx, None, None, *(each for result in results for each in result)


def _alone(x: torch.Tensor, member: LoraMember, backend: str) -> torch.Tensor:
    a, b = member.a, member.b
    if member.weight is None and member.start is not None and member.start.dim() > 1:
        return lora_delta(
            member.start, x, a, b, scaling=member.scaling, dropout=member.dropout, extra=member.extra, backend=backend
        )
    if member.weight is None:
        raise ValueError("start must be the base layer's result (..., m) where weight is None")
    return lora_linear(
        x, member.weight, member.start, a, b,
        scaling=member.scaling, dropout=member.dropout, extra=member.extra, backend=backend,
    )  # fmt: skip


def lora_linear_group(
    x: torch.Tensor, members: Sequence[LoraMember], *, backend: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """LoRA layers that read the same x (query, key and value; gate and up), their products side by side.

    The same numbers as `lora_linear` or `lora_delta` of each, up to rounding. x is read once for the `(tokens, r)`
    matrices of all layers and once for all gradients of A, and the gradient of x is accumulated in place instead of
    being made by every layer and added up. Where a layer has dropout its mask is its own, so the products that see the
    mask are taken layer by layer; x's gradient is accumulated in place all the same. Inside `torch.compile` and
    `torch.func` transforms the layers are taken one by one.

    Args:
        x: `(..., n)`, see `lora_linear`.
        members: at least one layer.
        backend: of the skinny products: `auto`, `triton`, `cpp` (CPU, not float16) or `torch`.

    Returns:
        `(..., m)` of each layer.

    Raises:
        TypeError: on a wrong type or dtype.
        ValueError: on a wrong shape, device or number, or if there is no layer.
        RuntimeError: if the backend asked for cannot take the call; the message says why.
    """
    if not members:
        raise ValueError("members must hold at least one layer")
    if len(members) == 1 or torch.compiler.is_compiling() or in_transform():
        return tuple(_alone(x, each, backend) for each in members)
    tensors: list[torch.Tensor | None] = []
    numbers = []
    cast = autocast_dtype(x)
    for each in members:
        tail = check_factors(x, each.a, each.b, each.scaling, each.extra, None)
        start = each.start
        if each.weight is not None:
            allowed = {} if cast is not None else {"dtypes": (x.dtype,)}
            check_tensor("weight", each.weight, shape=(each.b.shape[0], x.shape[-1]), device=x.device, **allowed)
            if start is not None:
                check_tensor("start", start, shape=(each.b.shape[0],), device=x.device, **allowed)
        else:
            if start is None:
                raise ValueError("start must be the base layer's result (..., m) where weight is None")
            check_tensor("start", start, shape=(*x.shape[:-1], each.b.shape[0]), device=x.device)
            start = start.to(x.dtype if cast is None else cast)
        threshold, seed, stream = lowered(each.dropout, x.device)
        tensors += (each.weight, start, each.a, each.b, tail[0], tail[1], seed)
        numbers.append(_Numbers(float(each.scaling), tail[2], threshold, stream))
    x = x if cast is None else x.to(cast)
    drops = any(each.threshold > 0 for each in numbers)
    chosen = linear_dispatcher.choose(backend, x.device, x.dtype, drops)
    found: tuple[torch.Tensor, ...] = _Group.apply(  # type: ignore[no-untyped-call]
        x, tuple(numbers), chosen, *tensors
    )
    return found
